"""Measures how true utilities are: to float64 in each precision and to the optimizer's step, and what raw ones decide.

python benchmarks/precision.py               # rates: Spearman of ``directional`` with float64, by learning rate
python benchmarks/precision.py operators     # P_t beside the optimizer's real step on a batch
python benchmarks/precision.py paper_picks   # picks of selection=opus_paper that are not those of all-zero utilities
python benchmarks/precision.py gram          # inner products of sketches beside those of the updates

A row per cell is added to --results as it is done; cells that have one are not measured again. All on a CPU, on the
small GPT of the tests after 150 updates (``LATER``: of some also after more), and free of timings.

rates        {engine, optimizer, dtype, direction, lr, updates, spearman, signal_to_error, spread}: 96 candidates of 48
             tokens, scored as a run scores them (the step is found and judged), against float64 gradients of the same
             weights and optimizer state. ``library`` is a torch model, in bf16 under autocast; the engines train in
             ``dtype``. lr: of the optimizer that is named; where AdamW has a part of the model, its rate is changed in
             proportion. spread: standard deviation of float64's utilities over the size of their mean.
operators    {optimizer, operator, batch, fall, linear}: Spearman, and the slope of predicted over real (1 is to scale),
             with the fall of the proxy's loss in a float64 step on a batch of 8 that holds the candidate, and with that
             fall's linear part (``real_falls`` of tests/exact/estimators_toy.py); 48 candidates, two batches.
paper_picks  {optimizer, lr, others, ratio}: share of picks that noise alone would not have made, and the least and
             largest ratio of the largest probability to the uniform one; N = 64, K = 32, 60 steps that score.
gram         {optimizer, gram_sketch, sketch_dim, numbers, spearman, error, picks}: CountSketches of the matrices with a
             linear use, means over seeds of hashes; numbers: of a candidate. spearman: of inner products of two updates
             with the exact ones, over all pairs; error: root mean square, in products of the two norms; picks: share
             that the exact matrix has picked too, redundancy=1; N = 64, K = 32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.common import ROOT, commit
from benchmarks.study import Results
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import OPTIMIZERS, spec_of
from megaopus.selection import (
    CountSketchEstimator,
    SelectionConfig,
    Selector,
    TensorCandidates,
    exact_utilities,
    sampler,
)
from megaopus.selection.backend import Gradient, ScoringBackend, UpdateOperator
from megaopus.selection.estimators.exact import exact_estimate
from tests.exact import estimators_toy as toy
from tests.harness import TokenCandidates, tiny_engine

STEPS = 150
LATER = {"adafactor": 600, "sgd": 600}
"""More updates for what has learnt little after ``STEPS``: all candidates gain alike, and ranks are of small
differences."""
RATES = (1e-3, 1e-4, 1e-5, 1e-6)
TWO_FORMS = ("muon", "namo", "namo_d")
"""Optimizers whose operator may be the paper's formula or the derivative of the step."""
BATCHES = (70, 71)
"""Seeds of the sequences that a real step takes beside the candidate."""
PAPER_RATES: dict[str, tuple[tuple[float, ...], ...]] = {"adamw": ((3e-3,),), "muon": ((0.01, 8e-3), (0.02, 8e-3))}
"""Optimizer -> learning rates of its torch optimizers: of the matrices, and AdamW's for the rest."""
Row = dict[str, Any]


# -- against float64, by learning rate -------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A model after its updates, as it scores and as float64 sees it."""

    backend: ScoringBackend
    optimizers: list[Optimizer]
    rate: str
    """Key of a parameter group that holds its learning rate."""
    candidates: list[Gradient]
    """float64 gradients of each."""
    directions: Mapping[str, Gradient]
    """float64 gradients of what candidates are scored for: 'proxy', 'contrast'."""


def tokens(batch: TensorCandidates) -> TokenCandidates:
    """Make candidates as the engines take them: ``length`` positions are so many tokens and one."""
    return TokenCandidates(batch.batch(), batch.ids)


CANDIDATES, PROXY, POOL = tokens(toy.buffer(96, 4500)), tokens(toy.proxy(3)), tokens(toy.buffer(32, 9000))


def kinds_of_engine(optimizer: str) -> dict[str, EngineConfig | None]:
    """Name -> settings of what serves the optimizer; None: a torch model without an engine."""
    found: dict[str, EngineConfig | None] = {"library": None, "megatron": EngineConfig(device="cpu")}
    if spec_of(optimizer).refusal_of_pieces() is None and find_spec("deepspeed"):
        for stage in (1, 3):
            found[f"deepspeed, stage {stage}"] = EngineConfig(name="deepspeed", zero_stage=stage, device="cpu")
    return found


@contextmanager
def trained(kind: EngineConfig | None, optimizer: str, dtype: str, updates: int) -> Iterator[Trained]:
    """A model after its updates."""
    if kind is None:
        backend = toy.train(optimizer, updates)
        yield seen_in_float64(backend, backend.optimizers, "lr", backend)
        return
    own = {**spec_of(optimizer).example, **toy.GENTLER.get(optimizer, {})}
    optim = OptimConfig(name=optimizer, **{**own, "warmup_steps": 5, "schedule": "constant"})
    shape: dict[str, Any] = {"seq_len": toy.SEQ_LEN, "vocab_size": toy.VOCAB, "micro_batch_size": 4}
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        engine = tiny_engine(mesh, optim=optim, engine=replace(kind, precision=dtype), **shape)
        losses = [engine.train_step(tokens(toy.buffer(8, 10_000 + 7 * step))).loss for step in range(updates)]
        assert losses[-1] < losses[0] - 0.5, f"{optimizer} learnt nothing: {losses[0]:.2f} -> {losses[-1]:.2f}"
        backend = engine.scoring_backend()
        plain = tiny_engine(mesh, engine=EngineConfig(device="cpu", precision="fp32"), **shape).scoring_backend()
        main = backend.parameters()
        with torch.no_grad():
            for name, weight in plain.parameters().items():
                weight.copy_(main[name])
        yield seen_in_float64(backend, engine.optimizer.torch_optimizers, "peak_lr", plain)
    finally:
        mesh.close()


def seen_in_float64(backend: ScoringBackend, optimizers: list[Optimizer], rate: str, plain: ScoringBackend) -> Trained:
    """``plain``: of the same weights in fp32, which float64 gradients are taken of."""

    def mean(batch: TokenCandidates) -> Gradient:
        gradients = list(plain.exact_gradients(batch.batch()))
        return {name: torch.stack([each[name] for each in gradients]).mean(0) for name in gradients[0]}

    proxy, pool = mean(PROXY), mean(POOL)
    contrast = {name: value - pool[name] for name, value in proxy.items()}
    own = list(plain.exact_gradients(CANDIDATES.batch()))
    return Trained(backend, optimizers, rate, own, {"proxy": proxy, "contrast": contrast})


@contextmanager
def learning_at(model: Trained, lr: float) -> Iterator[None]:
    """The first optimizer's rate is ``lr`` inside, the others' in proportion."""
    groups = [group for each in model.optimizers for group in each.param_groups]
    before = [group[model.rate] for group in groups]
    try:
        for group, own in zip(groups, before, strict=True):
            group[model.rate] = own * (lr / before[0])
        yield
    finally:
        for group, own in zip(groups, before, strict=True):
            group[model.rate] = own


def score(model: Trained, dtype: str, direction: str, lr: float) -> Row:
    """Return what a run finds beside what float64 says."""
    config = SelectionConfig(
        method="opus", proxy_half_life=0.0, score_micro_batch_size=32, contrast=direction == "contrast"
    )
    library = isinstance(model.backend.module, toy.ToyGPT)  # type: ignore[attr-defined]
    low = torch.autocast("cpu", dtype=torch.bfloat16) if library and dtype == "bf16" else nullcontext()
    with learning_at(model, lr), low:
        selector = Selector(
            config, model.backend, num_selected=8, proxy=lambda step: PROXY, pool=lambda step: POOL, seed=7
        )
        found = selector.select(CANDIDATES, STEPS)
        operator = model.backend.operator()
    assert found.utilities is not None
    assert operator is not None
    gradient = model.directions[direction]
    exact = alignments(model.candidates, operator.bounded(gradient), gradient)
    kinds = [event.kind for event in found.events]
    return {
        "spearman": toy.spearman(found.utilities, exact),
        "signal_to_error": found.signal_to_error,
        "spread": float(exact.std(correction=0) / exact.mean().abs()),
        "events": kinds,
    }


def alignments(own: list[Gradient], operator: UpdateOperator, gradient: Gradient) -> Tensor:
    """(N,) float64 <P g_z, g>: ``own`` are the g_z."""
    updates = map(operator.apply, own)
    return torch.stack([sum(((u[name] * gradient[name]).sum() for name in u), torch.zeros(())) for u in updates])


def measure_rates(results: Results, quick: bool, only: str, console: Console) -> None:
    for optimizer in ("adamw", "sgd") if quick else OPTIMIZERS:
        for engine, kind in kinds_of_engine(optimizer).items():
            for dtype in ("bf16",) if quick or engine.startswith("deepspeed") else ("bf16", "fp32"):
                for updates in (STEPS, *([LATER[optimizer]] if optimizer in LATER and not quick else [])):
                    of = {"engine": engine, "optimizer": optimizer, "dtype": dtype, "updates": updates}
                    measure_cells(results, of, kind, quick, only, console)


def measure_cells(
    results: Results, of: Row, kind: EngineConfig | None, quick: bool, only: str, console: Console
) -> None:
    """Add the rows that one model lacks: a row a direction and a learning rate."""
    directions = ("proxy", "contrast") if kind is None and not quick else ("proxy",)
    later = "" if of["updates"] == STEPS else f"/{of['updates']}"
    missing = {
        key: (direction, lr)
        for direction in directions
        for lr in (RATES[:: len(RATES) - 1] if quick else RATES)
        if (key := f"rates/{of['engine']}/{of['optimizer']}/{of['dtype']}/{direction}/{lr:g}{later}")
        not in results.rows
        and only in key
    }
    if not missing:
        return
    with trained(kind, of["optimizer"], of["dtype"], of["updates"]) as model:
        for key, (direction, lr) in missing.items():
            row = {**of, "direction": direction, "lr": lr, **score(model, of["dtype"], direction, lr)}
            results.add(key, {**row, "commit": commit()})
            console.print(f"{key}: {row['spearman']:.4f}", highlight=False)


def print_rates(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="Spearman of directional with float64, by learning rate", box=SIMPLE, padding=0)
    rates = sorted({row["lr"] for row in rows}, reverse=True)
    for name in ("engine", "optimizer", "dtype", "direction", "updates", *(f"{lr:g}" for lr in rates)):
        table.add_column(name, no_wrap=True)
    groups: dict[tuple[str, ...], dict[float, float]] = {}
    for row in rows:
        of = (*(row[name] for name in ("engine", "optimizer", "dtype", "direction")), str(row.get("updates", STEPS)))
        groups.setdefault(of, {})[row["lr"]] = row["spearman"]
    for of, found in groups.items():
        table.add_row(*of, *(f"{found[lr]:.4f}" if lr in found else "-" for lr in rates))
    console.print(table)
    least: dict[tuple[str, ...], list[float]] = {}
    for (engine, _, dtype, direction, updates), found in groups.items():
        least.setdefault((engine, dtype, direction, f"{updates} updates"), []).extend(found.values())
    for of, values in least.items():
        console.print(f"{', '.join(of)}: {min(values):.4f} and more in {len(values)} cells", highlight=False)


# -- beside the optimizer's own step ---------------------------------------------------------------------------------


def measure_operators(results: Results, quick: bool, only: str, console: Console) -> None:
    for optimizer in ("adamw", "muon") if quick else OPTIMIZERS:
        forms = ("paper", "full") if optimizer in TWO_FORMS else ("paper",)
        missing = {
            key: (form, batch)
            for form in forms
            for batch in (BATCHES[:1] if quick else BATCHES)
            if (key := f"operators/{optimizer}/{form}/{batch}") not in results.rows and only in key
        }
        if not missing:
            continue
        backend = toy.train(optimizer, STEPS)
        candidates = toy.buffer(48, 1)
        for key, (form, batch) in missing.items():
            wanted = toy.proxy(batch)
            operator = backend.operator(form)
            assert operator is not None
            gradient = backend.gradient(wanted)
            predicted = exact_utilities(backend, candidates, operator.bounded(gradient), gradient)
            falls = toy.real_falls(backend, optimizer, candidates, toy.buffer(7, batch).batch(), wanted.batch())
            fall, linear = ([toy.spearman(predicted, real), toy.slope(real, predicted)] for real in falls)
            row = {"optimizer": optimizer, "operator": form, "batch": batch, "fall": fall, "linear": linear}
            results.add(key, {**row, "commit": commit()})
            console.print(f"{key}: {fall[0]:.2f} / {fall[1]:.1f}, {linear[0]:.2f} / {linear[1]:.1f}", highlight=False)


def print_operators(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="Spearman / slope with a real step, a number for each batch", box=SIMPLE, padding=0)
    for name in ("optimizer", "operator", "fall of the loss", "its linear part"):
        table.add_column(name, no_wrap=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["optimizer"], row["operator"] != "paper", row["batch"])):
        groups.setdefault((row["optimizer"], row["operator"]), []).append(row)
    for (optimizer, form), found in groups.items():
        pairs = [[row[what] for row in found] for what in ("fall", "linear")]
        cells = [", ".join(f"{s:.2f}" for s, _ in p) + " / " + ", ".join(f"{r:.1f}" for _, r in p) for p in pairs]
        table.add_row(optimizer, form if optimizer in TWO_FORMS else "", *cells)
    console.print(table)


# -- the paper's recipe ----------------------------------------------------------------------------------------------


def measure_paper_picks(results: Results, quick: bool, only: str, console: Console) -> None:
    for optimizer, tried in PAPER_RATES.items():
        for rates in tried:
            steps = 10 if quick else 60
            key = f"paper_picks/{optimizer}/{rates[0]:g}/{steps}"
            if key not in results.rows and only in key:
                row = {
                    "optimizer": optimizer,
                    "lr": list(rates),
                    "steps": steps,
                    **paper_picks(optimizer, rates, steps),
                }
                results.add(key, {**row, "commit": commit()})
                console.print(f"{key}: {row['others']:.1%}", highlight=False)


def paper_picks(optimizer: str, rates: Sequence[float], steps: int, size: int = 64, count: int = 32) -> Row:
    """Train on the picks of ``selection=opus_paper`` for ``steps`` steps that score, after one that cannot."""
    backend = toy.train(optimizer, 0)
    for each, lr in zip(backend.optimizers, rates, strict=True):
        for group in each.param_groups:
            group["lr"] = lr
    config = SelectionConfig.preset("opus_paper")
    selector = Selector(
        config,
        backend,
        num_selected=count,
        proxy=lambda step: toy.proxy(step).take(torch.arange(config.proxy_batch_size)),
        seed=7,
    )
    blind, ratios = 0, []
    for step in range(steps + 1):
        candidates = TensorCandidates(toy.buffer(size, 10_000 + 7 * step).batch(), step * size + torch.arange(size))
        found = selector.select(candidates, step)
        if found.utilities is not None:
            draws = sampler.Draws(config.sampler, config.temperature, 7, step)
            nothing = torch.zeros(size, size, dtype=torch.float64)  # of redundancy: draws one by one, as with it
            by_noise = sampler.pick(nothing[0], candidates.ids, count, draws, nothing)
            blind += int(torch.isin(found.picked_ids, candidates.ids[by_noise]).sum())
            ratios.append(found.max_p_ratio)
        toy.per_sequence_loss(backend.module, candidates.take(found.indices).batch()).mean().backward()
        for each in backend.optimizers:
            each.step()
            each.zero_grad()
    assert len(ratios) == steps
    return {"others": 1 - blind / (steps * count), "ratio": [min(ratios), max(ratios)]}


def print_paper_picks(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="picks of opus_paper that noise alone would not have made", box=SIMPLE, padding=0)
    for name in ("optimizer", "lr", "steps", "others", "largest p over uniform"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        ratio = " to ".join(f"{value:.3g}" for value in row["ratio"])
        lr = ", ".join(f"{lr:g}" for lr in row["lr"])
        table.add_row(row["optimizer"], lr, str(row["steps"]), f"{row['others']:.1%}", ratio)
    console.print(table)


# -- the Gram matrix of sketches -------------------------------------------------------------------------------------


def measure_gram(results: Results, quick: bool, only: str, console: Console) -> None:
    size, seeds = (12, 2) if quick else (64, 16)
    for optimizer in ("adamw",) if quick else ("adamw", "muon"):
        backend = toy.train(optimizer, STEPS)
        gradient = backend.gradient(toy.proxy(0))
        given = (backend, toy.buffer(size, seed=1), backend.operator().bounded(gradient), gradient)
        names = dict.fromkeys(layer.parameter for layer in CountSketchEstimator(1, 0).layers(backend))
        utilities, updates = exact_estimate(*given, parameters=names, keep_updates=True)
        assert updates is not None
        exact = updates @ updates.t()
        dims = {"per_layer": (512, 8192), "summed": (512, 512 * len(names), 8192)}
        for way, dim in ((way, dim) for way, each in dims.items() for dim in each):
            key = f"gram/{optimizer}/{way}/{dim}/{size}/{seeds}"
            if key in results.rows or only not in key:
                continue
            found = []
            for seed in range(seeds):
                sketch = CountSketchEstimator(dim, seed, summed=way == "summed")
                _, kept = sketch.estimate(*given, keep_sketches=True)
                assert kept is not None
                rows = torch.cat(list(kept.values()), 1).double()
                found.append(gram_fidelity(rows @ rows.t(), exact, utilities))
            means = dict(zip(("spearman", "error", "picks"), torch.tensor(found).mean(0).tolist(), strict=True))
            row = {"optimizer": optimizer, "gram_sketch": way, "sketch_dim": dim, "numbers": rows.shape[1], **means}
            results.add(key, {**row, "commit": commit()})
            console.print(f"{key}: {means}", highlight=False)


def gram_fidelity(found: Tensor, exact: Tensor, utilities: Tensor) -> tuple[float, float, float]:
    """(Spearman over pairs, root mean square error in products of norms, share of picks in common)."""
    first, second = torch.triu_indices(len(exact), len(exact), offset=1)
    norms = exact.diagonal().sqrt()
    errors = (found - exact) / torch.outer(norms, norms)
    count, ids = len(exact) // 2, torch.arange(len(exact))
    scores, draws = (utilities - utilities.mean()) / utilities.std(), sampler.Draws("top_k", 1.0, 0, 0)
    picks = [sampler.pick(scores, ids, count, draws, gram / gram.diagonal().mean() / count) for gram in (found, exact)]
    same = len(set(picks[0].tolist()) & set(picks[1].tolist())) / count
    spearman = toy.spearman(found[first, second], exact[first, second])
    return spearman, float(errors[first, second].square().mean().sqrt()), same


def print_gram(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="inner products of sketches beside exact ones", box=SIMPLE, padding=0)
    for name in ("optimizer", "gram_sketch", "sketch_dim", "numbers", "Spearman", "error", "same picks"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        counts = (str(row["sketch_dim"]), str(row["numbers"]))
        shares = (f"{row['spearman']:.3f}", f"{row['error']:.4f}", f"{row['picks']:.1%}")
        table.add_row(row["optimizer"], row["gram_sketch"], *counts, *shares)
    console.print(table)


TABLES = {
    "rates": (measure_rates, print_rates),
    "operators": (measure_operators, print_operators),
    "paper_picks": (measure_paper_picks, print_paper_picks),
    "gram": (measure_gram, print_gram),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("table", nargs="?", choices=TABLES, default="rates", help="(%(default)s)")
    command.add_argument("--quick", action="store_true", help="a few cells, to a file of their own")
    command.add_argument("--results", type=Path, help="rows there are, and new ones (default: those of the repository)")
    command.add_argument("--only", default="", metavar="TEXT", help="measure cells whose key has this in it")
    command.add_argument("--no-measuring", action="store_true", help="print what there is")
    command.add_argument("--threads", type=int, default=1, metavar="N", help="(%(default)s)")
    args = command.parse_args(arguments)
    torch.set_num_threads(args.threads)
    console = Console()
    usual = Path("runs/bench/precision_quick.jsonl") if args.quick else ROOT / "benchmarks/results/precision.jsonl"
    results = Results(args.results or usual)
    measure, show = TABLES[args.table]
    if not args.no_measuring:
        measure(results, args.quick, args.only, console)
    show([row for key, row in results.rows.items() if key.startswith(f"{args.table}/")], console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
