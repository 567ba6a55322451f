"""Does selection reach uniform's final loss with fewer update tokens, and in less time?

On the demo corpus, for each optimizer and seed: one uniform warm-up, then every arm goes on from it with the same
number of update tokens. Prints a table and writes rows {corpus, optimizer, arm, seeds, tokens_ratio, time_ratio,
final_loss, final_loss_std, p_value, ...}. Resumable: finished runs under --folder are not run again, killed ones go on.

tokens_ratio: fraction of uniform's update tokens after the warm-up at which the arm reaches uniform's final loss.
time_ratio: tokens_ratio times the arm's seconds per step (data, proxy, scoring, update) over uniform's, both measured
here side by side: the arms take turns step by step in one process, median. wall_time_ratio: by the runs' own clocks.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import interleaved, machine, parser, progress, start, write_results
from megaopus.arms import OPUS, UNIFORM, Stretch
from megaopus.build import Corpora, build_trainer
from megaopus.checkpoint.checkpointer import locate
from megaopus.config import compose
from megaopus.demo import WANTED, ensure_corpus, picked_share
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.monitor.base import SelectionRecord, StepRecord, ValidationRecord
from megaopus.monitor.compare import Run, aggregate, compare, load_run
from megaopus.monitor.health import StopSignal

ARMS: dict[str, tuple[str, ...]] = {
    "uniform": UNIFORM,
    "high_ppl": ("selection=high_ppl", "selection.warmup_steps=0"),
    "opus_top_k": OPUS,
    "opus_boltzmann": ("selection=opus_boltzmann", "selection.warmup_steps=0", "selection.score_length=64"),
    "countsketch_published": ("selection=opus_paper", "selection.warmup_steps=0"),
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("optim=adamw", "optim.lr=2e-3"),
    "muon": ("optim=muon", "optim.lr=8e-3", "optim.muon_lr=0.01"),
}
# Learning rates are the best for uniform after 400 updates of one seed, run by hand (python -m megaopus train
# experiment=demo train.steps=400 optim=muon optim.lr=... optim.muon_lr=...): of {1, 2, 3}e-3 for AdamW; for (AdamW on
# the rest, Muon on the matrices) of ten pairs, {2, 4, 8, 16}e-3 with {.0025, .005, .01, .02}: 4.548 at (8e-3, .01),
# 4.550 at (16e-3, .005), 4.560 at (8e-3, .005), 4.58 to 4.84 elsewhere. Every arm has the same.
COMMON = ("experiment=demo", f"data.wanted=[{WANTED}]", "logging.every=50")


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    warm_steps: int
    steps: int
    eval_every: int
    seeds: tuple[int, ...]
    timing_repeats: int


FULL = Plan(warm_steps=300, steps=300, eval_every=20, seeds=(1, 2, 3), timing_repeats=20)
QUICK = Plan(warm_steps=60, steps=40, eval_every=10, seeds=(1,), timing_repeats=5)


def train_all(plan: Plan, folder: Path, corpus: Path, jobs: int, console: Console) -> None:
    """Every run of the plan; ``jobs`` chains (one optimizer and seed each) at a time, the cores shared evenly."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    total = len(OPTIMIZERS) * len(plan.seeds) * len(ARMS)
    done = 0

    def chain(optimizer: str, seed: int) -> None:
        nonlocal done
        stretch = stretch_of(plan, folder, corpus, optimizer, seed, threads)
        for arm, overrides in ARMS.items():
            started = time.monotonic()
            stretch.run(arm, overrides)
            done += 1
            seconds = time.monotonic() - started
            console.print(f"[{done}/{total}] {optimizer} seed {seed} {arm}: {seconds:.0f} s", markup=False)

    with ThreadPoolExecutor(jobs) as pool:
        chains = [pool.submit(chain, optimizer, seed) for seed in plan.seeds for optimizer in OPTIMIZERS]
        for each in chains:
            each.result()


def stretch_of(plan: Plan, folder: Path, corpus: Path, optimizer: str, seed: int, threads: int | None) -> Stretch:
    """The runs of one optimizer and seed."""
    settings = (*COMMON, f"data.path={corpus}", *OPTIMIZERS[optimizer], f"train.eval_every={plan.eval_every}")
    return Stretch(
        folder=folder / optimizer,
        settings=settings,
        warm_steps=plan.warm_steps,
        steps=plan.steps,
        seed=seed,
        threads=threads,
        quiet=True,
        echo=lambda text: None,
    )


def step_seconds(stretch: Stretch, repeats: int, clock: str, bar: Progress) -> dict[str, float]:
    """Median seconds of one step of each arm after the warm-up, all arms taking turns in this process."""
    mesh = Mesh(ParallelConfig())
    try:
        steps = {arm: _step(stretch, overrides, mesh) for arm, overrides in ARMS.items()}
        title = f"timing the arms side by side, {stretch.folder.name}"
        seconds = interleaved(steps, repeats, clock, bar, title)
    finally:
        mesh.close()
    return {arm: statistics.median(values) for arm, values in seconds.items()}


def _step(stretch: Stretch, overrides: Sequence[str], mesh: Mesh) -> Callable[[], None]:
    """One step of an arm that goes on from the warm-up; it writes nothing."""
    own = [f"seed={stretch.seed}", f"train.steps={stretch.warm_steps + stretch.steps}"]
    config = compose([*stretch.settings, *overrides, *own, f"run_dir={stretch.folder / 'timing'}"])
    trainer = build_trainer(config, mesh, Corpora(config), StopSignal())
    checkpoint = locate(str(stretch.warm_up()), Path(config.run_dir), mesh)
    assert checkpoint is not None
    trainer.restore(checkpoint)
    return lambda: trainer.update(_Nobody())


class _Nobody:
    """A monitor that does not listen."""

    def step(self, record: StepRecord, selection: SelectionRecord | None) -> None: ...

    def validation(self, record: ValidationRecord) -> None: ...

    def event(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


def rows_of(plan: Plan, folder: Path, seconds: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One row per optimizer and arm, over the seeds; ratios are null unless every seed reached uniform's final loss.

    ``seconds``: of a step, by optimizer and arm.
    """
    rows = []
    for optimizer in OPTIMIZERS:
        runs = {arm: [load_run(folder / optimizer / f"{arm}_seed{s}", arm) for s in plan.seeds] for arm in ARMS}
        for arm in ARMS:
            cost = seconds[optimizer][arm] / seconds[optimizer]["uniform"]
            row = _row(plan, runs["uniform"], runs[arm], cost)
            rows.append({"corpus": "demo", "optimizer": optimizer, "arm": arm, **row})
    return rows


def _row(plan: Plan, uniform: Sequence[Run], arm: Sequence[Run], step_cost: float) -> dict[str, Any]:
    pairs = [compare(base, other, plan.warm_steps) for base, other in zip(uniform, arm, strict=True)]
    result = aggregate(pairs)
    shares = [picked_share(run, plan.warm_steps)[WANTED] for run in arm]
    return {
        "seeds": result.seeds,
        "tokens_ratio": result.tokens_ratio,
        "tokens_ratio_std": result.tokens_ratio_std,
        "time_ratio": None if result.tokens_ratio is None else result.tokens_ratio * step_cost,
        "wall_time_ratio": result.time_ratio,
        "step_cost": step_cost,
        "final_loss": result.final_loss,
        "final_loss_std": result.final_loss_std,
        "p_value": None if arm is uniform else result.p_value,
        "reached": result.reached,
        "uniform_fall": result.uniform_fall,
        "wanted_share": sum(shares) / len(shares),
        "final_domains": {
            domain: sum(pair.final_domains[domain] for pair in pairs) / len(pairs) for domain in pairs[0].final_domains
        },
    }


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """The table a person reads."""
    title = f"{rows[0]['seeds']} seed(s), paired with uniform; ratios: less is better, - never reached"
    table = Table(title=title, box=SIMPLE, padding=0)
    for name in ("", "arm", "tokens", "time", "final loss", "p", "step", "wanted"):
        table.add_column(name, justify="left" if name in ("", "arm") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["optimizer"],
            row["arm"],
            _spread(row["tokens_ratio"], row["tokens_ratio_std"], 2),
            _spread(row["time_ratio"], None, 2),
            _spread(row["final_loss"], row["final_loss_std"], 3),
            "-" if row["p_value"] is None else f"{row['p_value']:.3f}",
            f"{row['step_cost']:.2f}x",
            f"{row['wanted_share']:.0%}",
        )
    console.print(table)


def _spread(mean: float | None, std: float | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--folder", type=Path, help="run folders (default: runs/quality, or runs/quality_quick)")
    command.add_argument("--jobs", type=int, help="chains at a time (default: 1; with --quick, the cores)")
    args = command.parse_args(arguments)
    console = Console()
    start(args, console)
    plan = QUICK if args.quick else FULL
    folder = args.folder or Path("runs/quality_quick" if args.quick else "runs/quality")
    jobs = args.jobs or ((os.cpu_count() or 1) if args.quick else 1)
    corpus = ensure_corpus(args.corpus, console)
    train_all(plan, folder, corpus, jobs, console)
    with progress(console) as bar:
        seconds = {
            name: step_seconds(
                stretch_of(plan, folder, corpus, name, plan.seeds[0], None), plan.timing_repeats, args.clock, bar
            )
            for name in OPTIMIZERS
        }
    rows = rows_of(plan, folder, seconds)
    print_rows(rows, console)
    if args.json:
        write_results(args.json, rows, {**machine(args), "plan": asdict(plan), "step_seconds": seconds})
        console.print(f"rows: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
