"""The scoring service: cost of each estimator against its floor, agreement of layouts, overhead of a step, bytes sent.

Prints five tables and writes an object:
rows      {estimator, optimizer, cost_ratio, floor_ratio}: as in estimators.py, at one shape
layouts   {layout, engine, model, estimator, optimizer, max_rel_error, identical_picks}: against one process, over two
          steps
overhead  {measured, floor, ratio}: seconds of a selection over those of a uniform training step, N = 2K candidates
          scored over a twelfth of their length; floor by FLOPs: (N/K)(L_score/L)(2/3) for two forwards + proxy / K
passes    {estimator, tokens, tokens_per_second}: scoring by passes of 256 to 8192 tokens, for selection's PASS_TOKENS
growth    {ranks, N, bytes_per_rank, gradient_bytes_per_rank, seconds}: what a data-parallel rank sends for one
          selection: for utilities, and for the proxy gradient
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import estimators
from benchmarks.common import interleaved, machine, parser, progress, single_engine, start, write_results
from megaopus.cli.demo import WANTED, ensure_corpus
from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig
from megaopus.selection import SelectionConfig, Selector, adjoint_utilities
from tests.exact.scoring_runs import LAYOUTS, relative_error, same_picks, select_all
from tests.harness import random_batch, tiny_engine
from tests.pool import Pool

TARGETS = {"directional": 0.70, "adjoint": 1.0, "countsketch_8192": 1.0}
OVERHEAD_TARGET = 1.3
TABLES = ("rows", "overhead", "layouts", "passes", "growth")
ESTIMATORS = ("directional", "adjoint", "countsketch_8192", "kronecker_8192", "high_ppl")


COST = replace(estimators.FULL, train_steps=30, repeats=9)
QUICK_COST = replace(estimators.QUICK, train_steps=12, repeats=5)


@dataclass(frozen=True)
class Plan:
    """``cost``: the shape whose estimators are timed. The overhead is measured at K sequences of seq_len tokens."""

    cost: estimators.Plan = COST
    seq_len: int = 384
    num_selected: int = 16
    proxy_batch_size: int = 4
    repeats: int = 9
    ranks: tuple[int, ...] = (1, 2, 4)


FULL = Plan()
QUICK = Plan(cost=QUICK_COST, repeats=5, ranks=(1, 2))


def costs(plan: estimators.Plan, corpus: Corpus, clock: str, bar: Progress) -> list[dict[str, Any]]:
    """Time of the estimators over that of training, per token."""
    rows = []
    for optim in plan.optimizers:
        found, _ = estimators.measure(optim, plan, corpus, clock, bar, only=ESTIMATORS)
        keys = ("optimizer", "estimator", "cost_ratio", "cost_ratio_low", "cost_ratio_high", "floor", "floor_ratio")
        rows += [{key: row[key] for key in keys} for row in found]
    return rows


def layouts(bar: Progress) -> list[dict[str, Any]]:
    """Utilities and picks of each layout beside those of one process: every setting, model style and optimizer."""
    alone = select_all("one")
    task = bar.add_task("layouts", total=1)
    with Pool(pinned=False) as pool:
        jobs = pool.jobs({layout: size for layout, (size, _) in LAYOUTS.items()}, select_all).begin(LAYOUTS)
        found = {layout: jobs[layout] for layout in LAYOUTS}
    bar.advance(task)
    return [
        {
            "layout": layout,
            "engine": "megatron",
            "model": case[0],
            "estimator": name,
            "optimizer": case[1],
            "max_rel_error": max(relative_error(rank[case][name], alone[case][name]) for rank in ranks),
            "identical_picks": all(same_picks(rank[case][name], alone[case][name]) for rank in ranks),
        }
        for layout, ranks in found.items()
        for case in ranks[0]
        for name in ranks[0][case]  # what the layout serves
    ]


def overhead(plan: Plan, corpus: Corpus, clock: str, bar: Progress) -> dict[str, Any]:
    """Selection by the default estimator beside uniform training steps, taking turns."""
    model = ModelConfig(num_layers=4, hidden_size=256, num_heads=4)
    config = SelectionConfig(
        method="opus",
        score_length=plan.seq_len // 12,
        score_micro_batch_size=2 * plan.num_selected,
        proxy_batch_size=plan.proxy_batch_size,
    )
    optim = OptimConfig(name="adamw", lr=1e-3, schedule="constant")
    pool = CandidateStream(Sequences(corpus, "pool", plan.seq_len), 2 * plan.num_selected, 1)
    proxy = CandidateStream(Sequences(corpus, "proxy", plan.seq_len, [WANTED]), plan.proxy_batch_size, 1, "proxy")
    size = {"seq_len": plan.seq_len, "micro_batch_size": plan.proxy_batch_size}
    with single_engine(model, optim, vocab_size=corpus.vocab_size, total_steps=10_000, **size) as engine:
        selector = Selector(config, engine.scoring_backend(), num_selected=plan.num_selected, proxy=proxy.at, seed=1)
        batch = pool.at(0).take(torch.arange(plan.num_selected))
        engine.train_step(batch)
        passes = {
            "train": lambda: engine.train_step(batch),
            "select": lambda: selector.select(pool.at(engine.step), engine.step),
        }
        seconds = interleaved(passes, plan.repeats, clock, bar, "overhead of a selection")
    measured = statistics.median(s / t for s, t in zip(seconds["select"], seconds["train"], strict=True))
    floor = 2 / 12 * 2 / 3 + plan.proxy_batch_size / plan.num_selected
    return {"measured": measured, "floor": floor, "ratio": measured / floor}


def pass_sizes(plan: Plan, clock: str, bar: Progress) -> list[dict[str, Any]]:
    """Return how fast the same 8192 tokens are scored by small and by large passes, taking turns."""
    shape = {"vocab_size": 2048, "seq_len": 128}
    optim = OptimConfig(name="adamw", lr=1e-3, schedule="constant")
    with single_engine(plan.cost.model, optim, micro_batch_size=8, total_steps=10, **shape) as engine:
        engine.train_step(random_batch(8, 0, **shape))
        backend, candidates = engine.scoring_backend(), random_batch(64, 2, **shape)
        operator, gradient = backend.operator(), backend.gradient(random_batch(8, 1, **shape))
        assert operator is not None  # there was an update
        passes: dict[tuple[str, int], Any] = {}
        for size in (2, 4, 8, 16, 32, 64):
            passes["losses", size] = partial(backend.losses, candidates, micro_batch_size=size)
            given = (backend, candidates, operator, gradient)
            passes["adjoint", size] = partial(adjoint_utilities, *given, micro_batch_size=size)
        seconds = interleaved(passes, plan.repeats, clock, bar, "tokens per pass")
    return [
        {
            "estimator": estimator,
            "tokens": size * shape["seq_len"],
            "tokens_per_second": 64 * shape["seq_len"] / statistics.median(found),
        }
        for (estimator, size), found in seconds.items()
    ]


def growth(plan: Plan, bar: Progress) -> list[dict[str, Any]]:
    """Bytes and seconds of a selection as ranks and candidates grow together, 16 candidates per rank."""
    rows = []
    task = bar.add_task("bytes per rank", total=len(plan.ranks))
    with Pool(pinned=False) as pool:
        for ranks in plan.ranks:
            found = pool.run(ranks, count_bytes, 16 * ranks)
            rows.append({"ranks": ranks, "N": 16 * ranks, **found[0]})
            bar.advance(task)
    return rows


def count_bytes(num_candidates: int) -> dict[str, Any]:
    """On each rank: what one selection sends, the proxy gradient's reduction apart."""
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        engine = tiny_engine(mesh)
        config = SelectionConfig(method="opus", proxy_batch_size=8)
        sent = {"gradient": 0, "rest": 0}
        backend = engine.scoring_backend()
        gradient = backend.gradient

        def counted(*args: Any, **kwargs: Any) -> Any:
            with counting(sent, "gradient"):
                return gradient(*args, **kwargs)

        backend.gradient = counted
        selector = Selector(config, backend, num_selected=8, proxy=lambda step: random_batch(8, step), seed=1)
        engine.train_step(random_batch(8, 0))
        selector.select(random_batch(num_candidates, 0), 0)
        seconds = []
        for step in range(1, 6):
            sent.update(gradient=0, rest=0)
            started = time.perf_counter()
            with counting(sent, "rest"):
                selector.select(random_batch(num_candidates, step), step)
            seconds.append(time.perf_counter() - started)
        return {
            "bytes_per_rank": sent["rest"],
            "gradient_bytes_per_rank": sent["gradient"],
            "seconds": statistics.median(seconds),
        }
    finally:
        mesh.close()


_counter: list[str] = []


@contextmanager
def counting(sent: dict[str, int], what: str) -> Iterator[None]:
    """Add the bytes of the tensors given to collectives inside to ``sent[what]``; the innermost block counts."""
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
    saved = {name: getattr(dist, name) for name in names}

    def wrap(name: str) -> Any:
        place = 1 if name.startswith(("all_gather", "reduce_scatter")) else 0

        def call(*args: Any, **kwargs: Any) -> Any:
            if dist.get_world_size(kwargs.get("group")) > 1 and _counter[-1] == what:
                sent[what] += args[place].numel() * args[place].element_size()
            return saved[name](*args, **kwargs)

        return call

    _counter.append(what)
    try:
        for name in names:
            setattr(dist, name, wrap(name))
        yield
    finally:
        _counter.pop()
        for name, function in saved.items():
            setattr(dist, name, function)


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Print the tables a person reads, of what was measured."""
    for name, show in (
        ("rows", _show_costs),
        ("layouts", _show_layouts),
        ("overhead", _show_overhead),
        ("passes", _show_passes),
        ("growth", _show_growth),
    ):
        if name in result:
            show(result[name], console)


def _show_costs(rows: list[dict[str, Any]], console: Console) -> None:
    table = _table(
        "cost of scoring a token, in tokens trained", "optimizer", "estimator", "cost", "quartiles", "/floor"
    )
    for row in rows:
        target = TARGETS.get(row["estimator"])
        cost = f"{row['cost_ratio']:.2f}" + (f" (target {target:.2f})" if target else "")
        quartiles = f"{row['cost_ratio_low']:.2f}-{row['cost_ratio_high']:.2f}"
        table.add_row(row["optimizer"], row["estimator"], cost, quartiles, f"{row['floor_ratio']:.2f}")
    console.print(table)


def _show_layouts(found: list[dict[str, Any]], console: Console) -> None:
    table = _table("layouts beside one process", "layout", "comparisons", "largest relative error", "identical picks")
    for layout in dict.fromkeys(row["layout"] for row in found):
        rows = [row for row in found if row["layout"] == layout]
        same = sum(row["identical_picks"] for row in rows)
        worst = max(row["max_rel_error"] for row in rows)
        table.add_row(layout, str(len(rows)), f"{worst:.1e}", f"{same} of {len(rows)}")
    console.print(table)


def _show_overhead(over: dict[str, Any], console: Console) -> None:
    console.print(
        f"selection at N = 2K, a twelfth of the length: {over['measured']:.3f} of a training step, floor"
        f" {over['floor']:.3f}: {over['ratio']:.2f}x (target {OVERHEAD_TARGET}x)",
        highlight=False,
    )


def _show_passes(rows: list[dict[str, Any]], console: Console) -> None:
    table = _table("scoring by the size of a pass", "estimator", "tokens", "tokens/s")
    for row in rows:
        table.add_row(row["estimator"], f"{row['tokens']:,}", f"{row['tokens_per_second']:,.0f}")
    console.print(table)


def _show_growth(rows: list[dict[str, Any]], console: Console) -> None:
    table = _table("what a rank sends for a selection", "ranks", "N", "utilities (bytes)", "proxy gradient", "seconds")
    for row in rows:
        values = (row["ranks"], row["N"], row["bytes_per_rank"], row["gradient_bytes_per_rank"])
        table.add_row(*(f"{value:,}" for value in values), f"{row['seconds']:.3f}")
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, padding=0)
    for name in columns:
        table.add_column(name, justify="left" if name in ("optimizer", "estimator", "layout") else "right")
    return table


def main(arguments: list[str] | None = None, plan: Plan | None = None) -> int:
    """Measure, print, write; ``plan`` replaces what --quick chooses from."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help="%(choices)s")
    args = options.parse_args(arguments)
    plan = plan or (QUICK if args.quick else FULL)
    console = Console()
    start(args, console)
    corpus = Corpus.open(ensure_corpus(args.corpus, console))
    with progress(console) as bar:
        measure: dict[str, Callable[[], Any]] = {
            "rows": lambda: costs(plan.cost, corpus, args.clock, bar),
            "overhead": lambda: overhead(plan, corpus, args.clock, bar),
            "layouts": lambda: layouts(bar),
            "passes": lambda: pass_sizes(plan, args.clock, bar),
            "growth": lambda: growth(plan, bar),
        }
        result = {name: run() for name, run in measure.items() if name in args.only}
    print_tables(result, console)
    if args.json:
        write_results(args.json, result, {**machine(args), "plan": asdict(plan)})
        console.print(f"result: {args.json}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
