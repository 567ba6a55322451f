"""Compares the optimizers on the demo corpus, and what selection adds to each.

Uniform selection at three learning rates on one seed; the best of them on all seeds; then with selection, against its
own uniform runs: the default recipe, and exact utilities of every candidate. Equal update tokens, cosine schedule,
random initial weights. A row per run is appended to --results as it finishes; runs that have one are not repeated.
Rows {optimizer, lr, final_loss, state_mb, step_time_ratio, tokens_ratio, ...}; lr is the one that was tried, of the
blocks' matrices where they have an optimizer of their own (AdamW then has the rest, at a fixed rate).

final_loss: trailing mean of validations on the wanted domain. step_time_ratio: seconds of a uniform step over AdamW's,
taking turns in one process, median. tokens_ratio: fraction of uniform's update tokens to uniform's final loss.
"""

from __future__ import annotations

import os
import statistics
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, parser, progress, start, write_results
from benchmarks.study import Results, Task, refuse_other_corpora, run_of, step_costs, task, train_all
from megaopus.build import build_trainer
from megaopus.cli.demo import WANTED, ensure_corpus
from megaopus.config.compose import compose
from megaopus.data.run_data import RunData
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.report.compare import aggregate, compare
from megaopus.side_by_side import silent_recorder
from megaopus.training.signals import StopSignal

COMMON = (
    "model=tiny",
    "data.seq_len=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "optim.schedule=cosine",
    "optim.warmup_steps=40",
    "logging.every=100",
)
ARMS = {
    "uniform": ("selection=uniform",),
    "screened": ("selection=screened", "selection.score_length=64"),
    "exact": ("selection=opus_exact", "selection.score_length=64"),
}
SEED = 1


@dataclass(frozen=True)
class Tried:
    """An optimizer's settings and the learning rates to try: ``key`` is the setting that is one of ``rates``."""

    key: str
    rates: tuple[float, ...]
    settings: tuple[str, ...] = ()


REST = ("optim.lr=2e-3", "optim.betas=[0.9,0.95]", "optim.weight_decay=0.1")
OPTIMIZERS = {
    "adamw": Tried("lr", (1e-3, 2e-3, 4e-3)),
    "sgd": Tried("lr", (0.1, 0.3, 1.0)),
    "lion": Tried("lr", (1e-4, 3e-4, 1e-3), ("optim.weight_decay=0.5",)),
    "muon": Tried("matrix_lr", (0.005, 0.01, 0.02), (*REST, "optim.settings.momentum_warmup_steps=40")),
    "namo": Tried("matrix_lr", (0.006, 0.012, 0.024), REST),
    "namo_d": Tried("matrix_lr", (0.0045, 0.009, 0.018), REST),
    "conda": Tried("matrix_lr", (0.004, 0.008, 0.016), (*REST, "optim.settings.projection_every=100")),
    "sophia_g": Tried("lr", (5e-4, 1e-3, 2e-3)),
    "sgd_sai": Tried("lr", (1e-3, 4e-3, 1.6e-2)),
}


@dataclass(frozen=True)
class Plan:
    """Says how long and how often."""

    steps: int
    eval_every: int
    eval_sequences: int
    seeds: tuple[int, ...]
    timing_repeats: int
    optimizers: tuple[str, ...]
    arms: tuple[str, ...]


FULL = Plan(400, 20, 32, (1, 2, 3), 5, tuple(OPTIMIZERS), ("screened", "exact"))
QUICK = Plan(40, 10, 8, (1,), 1, ("adamw", "muon"), ("screened",))


@dataclass(frozen=True)
class Comparison:
    """The runs of a plan, each found by what it depends on."""

    plan: Plan
    corpus: Path
    results: Results

    def overrides(self, optimizer: str, rate: float, arm: str, seed: int) -> list[str]:
        plan, tried = self.plan, OPTIMIZERS[optimizer]
        length = (f"train.steps={plan.steps}", f"train.eval_every={plan.eval_every}")
        more = (f"train.eval_sequences={plan.eval_sequences}", f"seed={seed}", f"data.path={self.corpus}")
        chosen = (f"optim={optimizer}", *tried.settings, f"optim.{tried.key}={rate}", *ARMS[arm])
        return [*COMMON, *chosen, *length, *more, f"data.target_domains=[{WANTED}]"]

    def task(self, optimizer: str, rate: float, arm: str, seed: int) -> Task:
        title = f"{optimizer} {rate:g} {arm}, seed {seed}"
        fields = {"optimizer": optimizer, "lr": rate, "arm": arm, "seed": seed}
        path = f"optimizers/{optimizer}/{rate:g}/{arm}/{seed}"
        return task(title, path, self.overrides(optimizer, rate, arm, seed), fields)

    def row(self, optimizer: str, rate: float, arm: str, seed: int) -> dict[str, Any] | None:
        return self.results.rows.get(self.task(optimizer, rate, arm, seed).key)

    def loss(self, optimizer: str, rate: float) -> float | None:
        """Final loss of the first seed; None: has not run."""
        row = self.row(optimizer, rate, "uniform", SEED)
        return None if row is None else compare(run_of(row), run_of(row)).final_loss

    def best(self, optimizer: str) -> float | None:
        """The rate of the least loss on the first seed; None until all have run."""
        rates = OPTIMIZERS[optimizer].rates
        losses = {rate: loss for rate in rates if (loss := self.loss(optimizer, rate)) is not None}
        return min(losses, key=lambda rate: losses[rate]) if len(losses) == len(rates) else None

    def first_tasks(self) -> Iterator[Task]:
        """Every learning rate."""
        for optimizer in self.plan.optimizers:
            for rate in OPTIMIZERS[optimizer].rates:
                yield self.task(optimizer, rate, "uniform", SEED)

    def second_tasks(self, arms: Sequence[str]) -> Iterator[Task]:
        """The best rate on every seed, without selection and with ``arms``."""
        for seed in self.plan.seeds:
            for optimizer in self.plan.optimizers:
                if (rate := self.best(optimizer)) is not None:
                    for arm in ("uniform", *arms):
                        yield self.task(optimizer, rate, arm, seed)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One per optimizer and learning rate; ``best`` ones over all seeds, with selection."""
        timing = self.results.rows.get("optimizers/timing", {"seconds": {}})["seconds"]
        for optimizer in self.plan.optimizers:
            best = self.best(optimizer)
            held = state_mb(self.overrides(optimizer, OPTIMIZERS[optimizer].rates[0], "uniform", SEED))
            for rate in OPTIMIZERS[optimizer].rates:
                seeds = [s for s in self.plan.seeds if self.row(optimizer, rate, "uniform", s) is not None]
                if not seeds:
                    continue
                uniform = {seed: self.row(optimizer, rate, "uniform", seed) for seed in seeds}
                losses = [compare(run_of(row), run_of(row)).final_loss for row in uniform.values() if row is not None]
                found: dict[str, Any] = {
                    "optimizer": optimizer,
                    "lr": rate,
                    "best": rate == best,
                    "seeds": len(seeds),
                    "final_loss": statistics.fmean(losses),
                    "final_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
                    "state_mb": held,
                    "step_time_ratio": timing[optimizer] / timing["adamw"] if optimizer in timing else None,
                    "tokens_ratio": None,
                }
                for arm in self.plan.arms if rate == best else ():
                    found |= self._with_selection(optimizer, rate, arm, uniform)
                yield found

    def _with_selection(self, optimizer: str, rate: float, arm: str, uniform: dict[int, Any]) -> dict[str, Any]:
        """tokens_ratio (of screened; others have their name behind) and the like over the seeds that have run.

        Null: not every seed got to uniform's loss.
        """
        rows = {seed: self.row(optimizer, rate, arm, seed) for seed in uniform}
        pairs = [compare(run_of(uniform[seed]), run_of(row)) for seed, row in rows.items() if row is not None]
        if not pairs:
            return {}
        result, behind = aggregate(pairs), "" if arm == "screened" else f"_{arm}"
        return {
            f"tokens_ratio{behind}": result.tokens_ratio,
            f"tokens_ratio{behind}_std": result.tokens_ratio_std,
            f"selected_loss{behind}": result.final_loss,
            f"p{behind}": result.p_value,
        }


def state_mb(overrides: Sequence[str]) -> float:
    """MB of optimizer state after an update, counted on the tensors themselves."""
    mesh = Mesh(ParallelConfig())
    try:
        config = compose([*overrides, "run_dir=runs/bench/nothing_is_written"])
        trainer = build_trainer(config, mesh, RunData.open(config.data, config.data_needs()), StopSignal())
        trainer.update(silent_recorder())
        optimizer = typing.cast(MegatronEngine, trainer.engine).optimizer
        return sum(s.numel() * s.element_size() for each in optimizer.states() for s in each.state.values()) / 1e6
    finally:
        mesh.close()


def print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table a person reads."""
    table = Table(title="demo corpus; ratios: less is better, - not reached or not run", box=SIMPLE, padding=0)
    known = ("optimizer", "lr", "seeds", "final loss", "state MB", "step time")
    for name in (*known, "tokens screened", "p", "tokens exact", "p"):
        table.add_column(name, justify="left" if name == "optimizer" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["optimizer"],
            f"{row['lr']:g}{'*' if row['best'] else ' '}",
            str(row["seeds"]),
            _number(row["final_loss"], row["final_loss_std"], 3),
            f"{row['state_mb']:.2f}",
            _number(row["step_time_ratio"], None, 2),
            _number(row["tokens_ratio"], row.get("tokens_ratio_std"), 2),
            _number(row.get("p"), None, 3),
            _number(row.get("tokens_ratio_exact"), row.get("tokens_ratio_exact_std"), 2),
            _number(row.get("p_exact"), None, 3),
        )
    console.print(table)


def _number(mean: float | None, std: float | None, digits: int) -> str:
    return "-" if mean is None else f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--folder", type=Path, help="run folders (default: runs/optimizers)")
    command.add_argument("--results", type=Path, help="rows of finished runs (default: FOLDER/results.jsonl)")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (%(default)s)")
    command.add_argument("--arms", nargs="+", choices=[arm for arm in ARMS if arm != "uniform"], help="these alone")
    command.add_argument("--no-training", action="store_true", help="times and table of the runs there are")
    command.add_argument("--no-timing", action="store_true", help="leave the seconds of a step as they are")
    args = command.parse_args(arguments)
    console = Console()
    start(args, console)
    plan = QUICK if args.quick else FULL
    folder = args.folder or Path("runs/optimizers_quick" if args.quick else "runs/optimizers")
    study = Comparison(plan, ensure_corpus(args.corpus, console), Results(args.results or folder / "results.jsonl"))
    if not args.no_training:
        refuse_other_corpora(study.first_tasks(), study.results)
    config = compose(study.overrides("adamw", 1e-3, "uniform", SEED))
    RunData.open(config.data, config.data_needs()).ensure_text_features(console)
    if not args.no_training:
        train_all(list(study.first_tasks()), study.results, folder, args.jobs, console)
        train_all(list(study.second_tasks(args.arms or plan.arms)), study.results, folder, args.jobs, console)
    if not args.no_timing:
        runs = {o: study.overrides(o, OPTIMIZERS[o].rates[0], "uniform", SEED) for o in plan.optimizers}
        with progress(console) as bar:
            costs = step_costs(runs, folder, plan.timing_repeats, args.clock, bar, "timing")
        seconds = {name: cost.step for name, cost in costs.items()}
        study.results.add("optimizers/timing", {"seconds": seconds, **machine(args)})
    rows = list(study.rows())
    print_rows(rows, console)
    if args.json:
        write_results(args.json, rows, machine(args))
        console.print(f"rows: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
