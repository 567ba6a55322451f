"""Does selection reach uniform's final loss with fewer update tokens, and in less time? What does it cost elsewhere?

Trains every arm from random weights with the same number of update tokens, one learning rate (tuned for uniform) and
schedule, on several pools of text (see pools.py; 'demo' is the demo corpus). A row per run is appended to --results as
it finishes, and runs that have one are not repeated: a study may take several sittings, and several machines.
Then prints a table and writes rows {corpus, optimizer, arm, seeds, tokens_ratio, time_ratio, final_loss, ...}.

tokens_ratio: fraction of uniform's update tokens at which the arm reaches uniform's final loss on the wanted domain.
time_ratio: tokens_ratio times the arm's seconds per step (data, proxy, scoring, update) over uniform's, measured side
by side: the arms take turns step by step in one process, median. Kept in --results too, as is the part of it that the
prescreen takes (prescreen_cost, in uniform's steps).
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.columns import ensure_column
from benchmarks.common import machine, parser, progress, start, write_results
from benchmarks.pools import ensure_pool
from benchmarks.study import (
    COMMON,
    SCORED,
    Results,
    Task,
    mean_share,
    p_value,
    refuse_other_corpora,
    run_of,
    spread,
    step_costs,
    task,
    train_all,
)
from megaopus.cli.demo import WANTED as DEMO_WANTED
from megaopus.cli.demo import ensure_corpus
from megaopus.config.compose import compose
from megaopus.data.corpus import Corpus
from megaopus.data.run_data import RunData
from megaopus.report.compare import Comparison, aggregate, compare

POOLS = ("demo", "mixed", "hard", "clean")
FILTERS = {
    column: (f"data.filter.column={column}", "data.filter.keep=0.25")
    for column in ("dsir", "fasttext", "perplexity", "utility")
}  # a quarter of the tokens, about as many as are wanted in the pool 'mixed'
UNKNOWING = ("selection.prescreen.prior=0",)  # what is promising is learnt from utilities alone
GUARDED = (
    *("selection.guards.exposure_cap=1", "selection.guards.min_ess=1.2", "selection.guards.min_distinct=0.5"),
    *("selection.guards.min_unique=0.5", "selection.score_length=null"),
)  # as opus_paper was when its runs were made
ARMS: dict[str, tuple[str, ...]] = {
    "uniform": ("selection=uniform",),
    "dsir": ("selection=dsir",),
    "exact": ("selection=opus_exact", SCORED),
    "published_guarded": ("selection=opus_paper", *GUARDED),
    "importance": ("selection=importance",),
    "screened": ("selection=screened", SCORED),
    "opus": ("selection=opus", SCORED),
    "opus_auto": ("selection=opus_auto", SCORED),
    "high_ppl": ("selection=high_ppl",),
    "greats": ("selection=greats", SCORED),
    "cascade": ("selection=opus_cascade", SCORED),
    "predict": ("selection=screened", SCORED, *UNKNOWING, "selection.prescreen.text_features=[ngrams,domain,shape]"),
    "predict_dsir": ("selection=screened", SCORED, *UNKNOWING),
    "exact_8": ("selection=opus_exact", "selection.rho=0.125", SCORED),
    "exact_proxy32": ("selection=opus_exact", "selection.proxy_batch_size=32", SCORED),
    "exact_contrast": ("selection=opus_exact", "selection.contrast=true", SCORED),
    "oracle": ("selection=domain_oracle", "selection.rho=0.125"),
    "filter_dsir": ("selection=uniform", *FILTERS["dsir"]),
    "filter_fasttext": ("selection=uniform", *FILTERS["fasttext"]),
    "filter_perplexity": ("selection=uniform", *FILTERS["perplexity"]),
    "filter_utility": ("selection=uniform", *FILTERS["utility"]),
    "filter_dsir_opus": ("selection=screened", SCORED, *FILTERS["dsir"]),
}
HALF_LIVES: dict[str, tuple[str, ...]] = {
    f"half_life_{steps}": ("selection=screened", SCORED, *UNKNOWING, f"selection.proxy_half_life={steps}")
    for steps in (16, 50, 300)
}
"""As predict_dsir, whose is 99 steps; trained only where --arms names them. Without the prior, under which picks hardly
depend on utilities."""
ARMS |= HALF_LIVES
MAIN = ("uniform", "dsir", "importance", "opus", "exact", "published_guarded")
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("optim=adamw", "optim.lr=2e-3"),
    "muon": ("optim=muon", "optim.lr=8e-3", "optim.matrix_lr=0.01"),
}


@dataclass(frozen=True)
class Plan:
    """Says how long and how often."""

    steps: int
    eval_every: int
    eval_sequences: int
    seeds: tuple[int, ...]
    headline_seeds: tuple[int, ...]
    timing_repeats: int
    pools: tuple[str, ...]
    arms: tuple[str, ...]
    """On every pool, with AdamW."""
    more_arms: tuple[str, ...]
    """On the pool 'mixed' too, and there the main ones with Muon."""


FULL = Plan(
    600, 30, 32, (1, 2, 3), (1, 2, 3, 4, 5), 5, POOLS, MAIN, tuple(a for a in ARMS if a not in {*MAIN, *HALF_LIVES})
)
QUICK = Plan(60, 10, 8, (1,), (1,), 2, ("demo",), ("uniform", "dsir", "opus"), ())
PROBES = ("exact_8", "exact_proxy32", "exact_contrast")
"""What exact scoring lacks: leads, with one seed each (docs/decisions/007)."""
HEADLINE = ("uniform", "dsir", "importance", "opus")
HEADLINE_POOLS = ("mixed", "hard")


@dataclass(frozen=True, order=True)
class Job:
    """One training run."""

    seed: int
    pool: str
    optimizer: str
    arm: str


def jobs_of(plan: Plan, pools: Sequence[str]) -> list[Job]:
    """Seed after seed, so that an early stop leaves whole comparisons."""
    found = []
    for pool in pools:
        chosen = [("adamw", arm) for arm in plan.arms]
        if pool == "mixed":
            chosen += [("adamw", arm) for arm in plan.more_arms]
            chosen += [("muon", arm) for arm in plan.arms] if plan.more_arms else []
        for optimizer, arm in chosen:
            seeds = plan.seeds[:1] if arm in PROBES else plan.seeds
            found += [Job(seed, pool, optimizer, arm) for seed in seeds]
        if pool in HEADLINE_POOLS:
            extra = set(plan.headline_seeds) - set(plan.seeds)
            found += [Job(seed, pool, "adamw", arm) for arm in HEADLINE for seed in extra]
    return sorted(found, key=lambda job: (job.seed, pools.index(job.pool), job.optimizer, list(ARMS).index(job.arm)))


@dataclass(frozen=True)
class Study:
    """A plan, where its pools lie, and what is known of its runs."""

    plan: Plan
    jobs: list[Job]
    places: dict[str, list[str]]
    """Pool -> the settings that train on it."""
    results: Results
    folder: Path

    def overrides(self, job: Job) -> list[str]:
        """Everything that the run's outcome depends on."""
        plan = self.plan
        length = (f"train.steps={plan.steps}", f"train.eval_every={plan.eval_every}")
        more = (f"train.eval_sequences={plan.eval_sequences}", f"seed={job.seed}")
        return [*COMMON, *OPTIMIZERS[job.optimizer], *length, *more, *self.places[job.pool], *ARMS[job.arm]]

    def task(self, job: Job) -> Task:
        """The run as study.py takes it."""
        title = f"{job.pool} {job.optimizer} {job.arm}, seed {job.seed}"
        path = f"{job.pool}/{job.optimizer}/{job.arm}/{job.seed}"
        return task(title, path, self.overrides(job), asdict(job))

    def done(self) -> dict[tuple[str, str, str], dict[int, dict[str, Any]]]:
        """(pool, optimizer, arm) -> seed -> row, of the runs that are done."""
        found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
        for job in self.jobs:
            if (row := self.results.rows.get(self.task(job).key)) is not None:
                found.setdefault((job.pool, job.optimizer, job.arm), {})[job.seed] = row
        return found


def _prepare(study: Study, jobs: Sequence[Job], console: Console) -> None:
    """Score columns and traits that ``jobs`` need, once, not in each of the runs at the same time."""
    for job in {(job.pool, job.arm): job for job in jobs}.values():
        config = compose(study.overrides(job))
        if config.data.filter.column is not None:
            ensure_column(Corpus.open(config.data.path), config.data.filter.column, console)
        if config.selection.needs_text_features:
            RunData.open(config.data, config.data_needs()).ensure_text_features(console)


# -- what came of it ---------------------------------------------------------------------------------------------------


def rows_of(study: Study) -> list[dict[str, Any]]:
    """One row per pool, optimizer and arm, over the seeds that have run; null ratios: not every seed got there."""
    runs = study.done()
    rows = []
    for (pool, optimizer, arm), found in runs.items():
        uniform, dsir = (runs.get((pool, optimizer, name), {}) for name in ("uniform", "dsir"))
        seeds = sorted(found.keys() & uniform.keys())
        if not seeds:
            continue
        pairs = [compare(run_of(uniform[seed]), run_of(found[seed])) for seed in seeds]
        result = aggregate(pairs)
        cost, prescreen = (_cost(study.results, pool, optimizer, arm, of) for of in ("seconds", "prescreen_seconds"))
        tokens = result.tokens_ratio
        rows.append(
            {
                "corpus": pool,
                "optimizer": optimizer,
                "arm": arm,
                "seeds": len(seeds),
                "tokens_ratio": tokens,
                "tokens_ratio_std": result.tokens_ratio_std,
                "time_ratio": None if tokens is None or cost is None else tokens * cost,
                "step_cost": cost,
                "prescreen_cost": prescreen,
                "reached": result.reached,
                "final_loss": result.final_loss,
                "final_loss_std": result.final_loss_std,
                "uniform_fall": result.uniform_fall,
                "gain_std": _gain_std(pairs),
                "p_uniform": None if arm == "uniform" else result.p_value,
                "p_dsir": None if arm == "dsir" else p_value(dsir, found),
                "final_domains": {
                    name: statistics.fmean(pair.final_domains[name] for pair in pairs)
                    for name in pairs[0].final_domains
                },
                "share": mean_share([found[seed] for seed in seeds]),
                "unique_share": statistics.fmean(found[seed]["unique_share"] for seed in seeds),
            }
        )
    return rows


def _gain_std(pairs: Sequence[Comparison]) -> float | None:
    """Nats: the standard deviation over seeds of uniform's final loss less the arm's; None: fewer than two seeds."""
    gains = [pair.uniform_final_loss - pair.final_loss for pair in pairs]
    return statistics.stdev(gains) if len(gains) > 1 else None


def _cost(results: Results, pool: str, optimizer: str, arm: str, of: str) -> float | None:
    """In uniform's steps."""
    timing = results.rows.get(f"timing/{pool}/{optimizer}")
    if timing is None or arm not in timing.get(of, {}):
        return None
    return timing[of][arm] / timing["seconds"]["uniform"]


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(pool, optimizer) -> its rows."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["corpus"], row["optimizer"]), []).append(row)
    return found


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """The tables a person reads, one per pool and optimizer."""
    for (pool, optimizer), here in _groups(rows).items():
        title = f"{pool}, {optimizer}; ratios: less is better, - not reached by every seed"
        table = Table(title=title, box=SIMPLE, padding=0)
        for name in ("arm", "seeds", "tokens", "time", "step", "final loss", "p uni", "p dsir", "uniq"):
            table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
        for row in here:
            table.add_row(
                row["arm"],
                str(row["seeds"]),
                spread(row["tokens_ratio"], row["tokens_ratio_std"], 2),
                spread(row["time_ratio"], None, 2),
                spread(row["step_cost"], None, 2),
                spread(row["final_loss"], row["final_loss_std"], 3),
                spread(row["p_uniform"], None, 3),
                spread(row["p_dsir"], None, 3),
                f"{row['unique_share']:.0%}",
            )
        console.print(table)
    spreads = [row["gain_std"] for row in rows if row["arm"] != "uniform" and row["gain_std"] is not None]
    if spreads:
        words = "final loss less uniform's of the same seed, standard deviation over seeds: {:.3f} nats"
        console.print(words.format(statistics.median(spreads)), f"(median of {len(spreads)} arms)", highlight=False)


def draw(study: Study, rows: list[dict[str, Any]], folder: Path) -> None:
    """A picture per pool and optimizer: the loss on the wanted domain over update tokens, mean of the seeds.

    The main arms are drawn in full, the others dashed; the legend has the arms as they end, the worst on top, with the
    final losses of the tables (``rows``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, pyplot

    runs = study.done()
    folder.mkdir(parents=True, exist_ok=True)
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # the light half of the map last
    colours = {arm: colormaps["tab20"](index) for arm, index in zip(ARMS, cycle(order), strict=False)}
    for (pool, optimizer), here in _groups(rows).items():
        finals = {row["arm"]: row["final_loss"] for row in here}
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        for arm in sorted(finals, key=lambda name: -finals[name]):
            found = list(runs[pool, optimizer, arm].values())
            curves = list(zip(*(each["validations"] for each in found), strict=True))[1:]
            tokens = [points[0]["tokens"] / 1e6 for points in curves]
            losses = [statistics.fmean(point["loss"] for point in points) for points in curves]
            axes.plot(
                tokens,
                losses,
                color=colours[arm],
                linewidth=2.4 if arm in HEADLINE else 1.4,
                linestyle="-" if arm in MAIN else "--",
                label=f"{arm}: {finals[arm]:.3f} ({len(found)})",
            )
        axes.axhline(finals["uniform"], color="grey", linewidth=0.8, linestyle=":")
        axes.set_ylim(min(finals.values()) - 0.05, max(finals.values()) + 1.0)
        axes.set(
            title=f"{pool}, {optimizer}: loss on the wanted domain",
            xlabel="update tokens (millions)",
            ylabel="loss (nats a token)",
        )
        figure.legend(title="arm: final loss (seeds)", fontsize=8, loc="outside right upper")
        suffix = "" if optimizer == "adamw" else f"_{optimizer}"
        figure.savefig(folder / f"quality_{pool}{suffix}.png", dpi=110)
        pyplot.close(figure)


def _plan(quick: bool, asked: Sequence[str]) -> Plan:
    plan = QUICK if quick else FULL
    return replace(plan, arms=(*plan.arms, *(arm for arm in asked if arm in HALF_LIVES)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--data", type=Path, metavar="FOLDER", help="with books.jsonl.gz and the rest; not for 'demo'")
    command.add_argument("--pools", nargs="+", choices=POOLS, help="default: all")
    command.add_argument("--arms", nargs="+", choices=ARMS, help="of the plan's, these alone")
    command.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, help="of the plan's, these alone")
    command.add_argument("--seeds", nargs="+", type=int, help="of the plan's, these alone")
    command.add_argument("--folder", type=Path, help="corpora and run folders (default: runs/quality)")
    command.add_argument("--results", type=Path, help="rows of finished runs (default: FOLDER/results.jsonl)")
    command.add_argument("--plots", type=Path, metavar="FOLDER", help="a picture per pool and optimizer")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (%(default)s)")
    command.add_argument("--no-training", action="store_true", help="times and tables of the runs there are")
    command.add_argument("--no-timing", action="store_true", help="leave the seconds of a step as they are")
    args = command.parse_args(arguments)
    console = Console()
    start(args, console)
    plan = _plan(args.quick, args.arms or ())
    folder = args.folder or Path("runs/quality_quick" if args.quick else "runs/quality")
    pools = args.pools or plan.pools
    if args.data is None and set(pools) - {"demo"}:
        command.error("--data is needed for other pools than demo")
    places = {
        pool: [f"data.path={ensure_corpus(args.corpus, console)}", f"data.target_domains=[{DEMO_WANTED}]"]
        if pool == "demo"
        else ensure_pool(pool, args.data, folder / "pools", console)
        for pool in pools
    }
    results = Results(args.results or folder / "results.jsonl")
    study = Study(plan, jobs_of(plan, pools), places, results, folder)
    asked = {"arm": args.arms, "optimizer": args.optimizers, "seed": args.seeds}
    chosen = [job for job in study.jobs if all(not only or getattr(job, name) in only for name, only in asked.items())]
    if not args.no_training:
        refuse_other_corpora(map(study.task, study.jobs), results)
    if not (args.no_training and args.no_timing):
        _prepare(study, chosen, console)
    if not args.no_training:
        train_all([study.task(job) for job in chosen], results, folder, args.jobs, console)
    if not args.no_timing:
        with progress(console) as bar:
            for group in dict.fromkeys((job.pool, job.optimizer) for job in chosen):
                arms = {job.arm: study.overrides(job) for job in chosen if (job.pool, job.optimizer) == group}
                title = f"timing {group[0]}, {group[1]}"
                costs = step_costs(arms, folder, plan.timing_repeats, args.clock, bar, title)
                seconds = {arm: cost.step for arm, cost in costs.items()}
                prescreen = {arm: cost.prescreen for arm, cost in costs.items()}
                row = {"seconds": seconds, "prescreen_seconds": prescreen, **machine(args)}
                results.add(f"timing/{group[0]}/{group[1]}", row)
    rows = rows_of(study)
    print_rows(rows, console)
    runs = [row for found in study.done().values() for row in found.values()]
    hours = sum(row["validations"][-1]["time_s"] for row in runs) / 3600
    said = f"{len(runs)} of {len(study.jobs)} runs, {hours:.1f} hours of training, one after another"
    console.print(said, highlight=False)
    if args.plots:
        draw(study, rows, args.plots)
    if args.json:
        write_results(args.json, rows, {**machine(args), "plan": asdict(plan)})
        console.print(f"rows: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
