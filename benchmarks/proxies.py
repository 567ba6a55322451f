"""Is a proxy made of the documents nearest to benchmark items better than a random one, for benchmark text?

Pool: books, code, command-line help, French novels and shuffled words (pools.py). Items: ARC (easy, challenge) and
OpenBookQA, every other one; the rest is held out, and its text is what validation is on. Both proxies have as many
tokens: documents drawn at random from the pool, or those that the verb 'proxy' finds. Each selection trains from random
weights with each proxy, beside uniform batches. A row per run is appended to --results as it finishes, and runs that
have one are not repeated.

Rows {arm, proxy, seeds, final_loss, final_loss_std, tokens_ratio, p_uniform, p_random, share}: loss on held-out items
(nats a token), fraction of uniform's update tokens at which its final loss is reached, p of paired t-tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, parser, start, write_results
from benchmarks.pools import mixed, prepare_texts
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
    task,
    train_all,
)
from megaopus.config.compose import compose
from megaopus.corpus_tools import benchmark_proxy
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import MANIFEST, TOKENIZER, Corpus
from megaopus.data.run_data import RunData
from megaopus.report.compare import aggregate, compare

BENCHMARKS = (
    *("arc_easy_train", "arc_easy_val", "arc_easy_test", "arc_challenge_val", "arc_challenge_test"),
    *("openbookqa_val", "openbookqa_test"),
)
PROXY_FRACTION = 0.025
ARMS: dict[str, tuple[str, ...]] = {
    "uniform": ("selection=uniform",),
    "screened": ("selection=screened", SCORED),
    "exact": ("selection=opus_exact", SCORED),
}


@dataclass(frozen=True)
class Plan:
    """Says how long and how often."""

    steps: int
    eval_every: int
    eval_sequences: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]


FULL = Plan(400, 20, 128, (1, 2, 3), ("uniform", "screened", "exact"))
QUICK = Plan(40, 10, 16, (1,), ("uniform", "screened"))


@dataclass(frozen=True)
class Places:
    """Names the corpora on disk."""

    random: Path
    """The pool with a random proxy."""
    near: Path
    """The pool with the nearest documents for a proxy."""
    held_out: Path
    """Text of the items that no proxy was made with."""


def make(data: Path, folder: Path, console: Console) -> Places:
    """Prepare what is not there."""
    places = Places(folder / "random", folder / "near", folder / "held_out")
    rule = SplitRule(PROXY_FRACTION, 0.02)
    prepare_texts(places.random, lambda: mixed(data), rule, console=console)
    sources = [Source(data / "benchmarks" / f"{name}.jsonl.gz") for name in BENCHMARKS]
    items = benchmark_proxy.read_items(sources, ["query", "choices"])
    tokenizer = places.random / TOKENIZER
    asked = {"items": [(str(number), item.text) for number, item in enumerate(items[1::2])]}
    prepare_texts(places.held_out, lambda: asked, SplitRule(0, 0.98), tokenizer=tokenizer, console=console)
    if not (places.near / MANIFEST).is_file():
        budget = sum(counts["proxy"]["tokens"] for counts in Corpus.open(places.random).manifest["counts"].values())
        pool = Corpus.open(places.random)
        # as the rows in results/ were made, before there were limits and a held-out target
        no = benchmark_proxy.Limits()
        benchmark_proxy.build(pool, items[::2], places.near, tokens=budget, limits=no, held_out=0, console=console)
    return places


@dataclass(frozen=True)
class Study:
    """A plan, its corpora, and what is known of its runs."""

    plan: Plan
    places: Places
    results: Results

    def tasks(self) -> dict[tuple[str, str, int], Task]:
        """(arm, proxy, seed) -> run; uniform has no proxy."""
        found = {}
        for seed in self.plan.seeds:
            for arm in self.plan.arms:
                for proxy in ("-",) if arm == "uniform" else ("random", "near"):
                    found[arm, proxy, seed] = self._task(arm, proxy, seed)
        return found

    def _task(self, arm: str, proxy: str, seed: int) -> Task:
        plan = self.plan
        corpus = self.places.near if proxy == "near" else self.places.random
        settings = [f"data.path={corpus}", f"data.validation_path={self.places.held_out}", f"seed={seed}"]
        settings += [f"train.steps={plan.steps}", f"train.eval_every={plan.eval_every}"]
        settings += [f"train.eval_sequences={plan.eval_sequences}", "optim=adamw", "optim.lr=2e-3"]
        fields = {"arm": arm, "proxy": proxy, "seed": seed}
        path = f"{arm}/{proxy}/{seed}"
        return task(f"{arm}, {proxy} proxy, seed {seed}", path, [*COMMON, *settings, *ARMS[arm]], fields)

    def rows(self) -> list[dict[str, Any]]:
        """One per arm and proxy, over the seeds that have run."""
        runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for (arm, proxy, seed), each in self.tasks().items():
            if (row := self.results.rows.get(each.key)) is not None:
                runs.setdefault((arm, proxy), {})[seed] = row
        uniform = runs.get(("uniform", "-"), {})
        rows = []
        for (arm, proxy), found in runs.items():
            seeds = sorted(found.keys() & uniform.keys())
            if not seeds:
                continue
            result = aggregate([compare(run_of(uniform[seed]), run_of(found[seed])) for seed in seeds])
            other = runs.get((arm, "random"), {})
            rows.append(
                {
                    "arm": arm,
                    "proxy": proxy,
                    "seeds": len(seeds),
                    "final_loss": result.final_loss,
                    "final_loss_std": result.final_loss_std,
                    "tokens_ratio": result.tokens_ratio,
                    "p_uniform": None if arm == "uniform" else result.p_value,
                    "p_random": p_value(other, found) if proxy == "near" else None,
                    "share": mean_share([found[seed] for seed in seeds]),
                }
            )
        return rows


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """The table a person reads."""
    table = Table(title="loss on held-out benchmark items; - not reached or not run", box=SIMPLE)
    for name in ("arm", "proxy", "seeds", "final loss", "tokens", "p uniform", "p random", "picked"):
        table.add_column(name, justify="left" if name in ("arm", "proxy", "picked") else "right")
    for row in rows:
        picked = ", ".join(f"{name} {share:.0%}" for name, share in row["share"].items())
        cells = [row["arm"], row["proxy"], str(row["seeds"]), spread(row["final_loss"], row["final_loss_std"], 3)]
        cells += [spread(row[name], None, digits) for name, digits in _COLUMNS]
        table.add_row(*cells, picked)
    console.print(table)


_COLUMNS = (("tokens_ratio", 2), ("p_uniform", 3), ("p_random", 3))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--data", type=Path, metavar="FOLDER", required=True, help="with books.jsonl.gz and the rest")
    command.add_argument("--arms", nargs="+", choices=ARMS, help="of the plan's, these alone")
    command.add_argument("--seeds", nargs="+", type=int, help="of the plan's, these alone")
    command.add_argument("--folder", type=Path, help="corpora and run folders (default: runs/proxies)")
    command.add_argument("--results", type=Path, help="rows of finished runs (default: FOLDER/results.jsonl)")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (%(default)s)")
    command.add_argument("--no-training", action="store_true", help="the table of the runs there are")
    args = command.parse_args(arguments)
    console = Console()
    start(args, console)
    plan = QUICK if args.quick else FULL
    folder = args.folder or Path("runs/proxies_quick" if args.quick else "runs/proxies")
    study = Study(plan, make(args.data, folder / "corpora", console), Results(args.results or folder / "results.jsonl"))
    chosen = [
        each
        for (arm, _, seed), each in study.tasks().items()
        if (not args.arms or arm in args.arms) and (not args.seeds or seed in args.seeds)
    ]
    if not args.no_training:
        refuse_other_corpora(study.tasks().values(), study.results)
        for corpus in (study.places.random, study.places.near):  # once, not in each of the runs at the same time
            config = compose([*COMMON, f"data.path={corpus}", f"data.validation_path={study.places.held_out}"])
            RunData.open(config.data, config.data_needs()).ensure_text_features(console)
        train_all(chosen, study.results, folder, args.jobs, console)
    rows = study.rows()
    print_rows(rows, console)
    if args.json:
        write_results(args.json, rows, {**machine(args), "plan": asdict(plan)})
        console.print(f"rows: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
