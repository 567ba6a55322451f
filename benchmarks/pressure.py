"""Should selection press harder as training goes, or less, and are repeats worth more than a cap lets through?

On the demo's text, from the same random weights, three seeds, the oracle and uniform beside them. Each question has
two that are pressed alike throughout, and three that change: at half of the updates, one way and the other, and by
chance from step to step (the placebo):

draws: opus takes the best (``opus``), or draws at temperature 1 (``drawn``): ``rising``, ``falling``, ``placebo``.
buffers: importance takes the best of 128 (``wide``) or of 32 (``narrow``): ``widening``, ``narrowing``,
    ``width_placebo``.
repeats: opus with no cap (``uncapped``) and one of three exposures (``thrice``), where ``opus`` has one: what a
    measured decay of repeats could win lies between them.

A row a run goes to --results {arm, seed, steps, final_loss, share, step_s}; what has one is not run again. Prints a
table, paired by seed, of how each ends against what it is to beat. About two minutes of one core a run.

    python benchmarks/pressure.py --work runs/pressure [--results FILE] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.study import Results, summary_of, trained
from megaopus.cli.demo import WANTED, ensure_corpus
from megaopus.report.compare import paired_t_test

OPUS = ("selection=opus", "selection.score_length=32", "selection.proxy_batch_size=8")
DRAWN = ("selection.sampler=boltzmann", "selection.temperature=1.0")
WIDE = ("selection=importance", "selection.rho=0.0625", "selection.sampler=top_k")
NARROW = (*WIDE, "selection.method=pressure_narrow")
ARMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "uniform": (("selection=uniform", "selection.rho=0.125"),),
    "opus": (OPUS,),
    "drawn": ((*OPUS, *DRAWN),),
    "rising": ((*OPUS, *DRAWN), OPUS),
    "falling": (OPUS, (*OPUS, *DRAWN)),
    "placebo": ((*OPUS, "selection.sampler=pressure_placebo", "selection.temperature=1.0"),),
    "wide": (WIDE,),
    "narrow": (NARROW,),
    "widening": (NARROW, WIDE),
    "narrowing": (WIDE, NARROW),
    "width_placebo": ((*WIDE, "selection.method=pressure_width_placebo"),),
    "uncapped": ((*OPUS, "selection.guards.exposure_cap=0"),),
    "thrice": ((*OPUS, "selection.guards.exposure_cap=3"),),
    "oracle": (("selection=domain_oracle", "selection.rho=0.125"),),
}
"""Arm -> settings of each of its parts, equally long, one after the other."""
TO_BEAT = {"wide": "opus", **dict.fromkeys(("narrow", "widening", "narrowing", "width_placebo"), "wide")}
"""Arm -> what it is held against; the others: ``opus``."""
ALLOWED = "resume_allow=[train.steps,selection.sampler,selection.temperature,selection.method]"


@dataclass(frozen=True)
class Plan:
    """Says how long and how often."""

    steps: int = 400
    seeds: tuple[int, ...] = (1, 2, 3)


def run(arm: str, seed: int, plan: Plan, corpus: Path, work: Path) -> dict[str, Any]:
    """Train an arm, part after part, and sum it up."""
    folder, parts = work / f"{arm}_{seed}", ARMS[arm]
    for number, settings in enumerate(parts, 1):
        steps = plan.steps * number // len(parts)
        common = ["experiment=demo", f"data.path={corpus}", f"data.target_domains=[{WANTED}]", f"seed={seed}"]
        common += [
            "plugins=[benchmarks.pressure_arms]",
            f"train.steps={steps}",
            f"optim.warmup_steps={min(40, plan.steps // 2)}",
            "checkpoint.keep=1",
        ]
        done = trained([*common, *settings, *([ALLOWED] if number > 1 else [])], folder, 1)
    found = summary_of(done)
    kept = {"final_loss": found["validations"][-1]["loss"], "share": found["share"], "step_s": found["step_s"]}
    return {"arm": arm, "seed": seed, "steps": plan.steps, **kept, "commit": done.environment.get("git")}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print what each arm ends at, and against what it is to beat."""
    table = Table(title="final loss on the wanted text", box=SIMPLE, padding=0)
    for name in ("arm", "seeds", "mean", "std", "against", "less", "p"):
        table.add_column(name, justify="left" if name in ("arm", "against") else "right")
    by_arm = {arm: {row["seed"]: row["final_loss"] for row in rows if row["arm"] == arm} for arm in ARMS}
    for arm, losses in by_arm.items():
        if not losses:
            continue
        other = TO_BEAT.get(arm, "opus" if arm != "opus" else "uniform")
        shared = sorted(losses.keys() & by_arm[other].keys())
        pair = [losses[seed] for seed in shared], [by_arm[other][seed] for seed in shared]
        less = f"{statistics.fmean(a - b for a, b in zip(*pair, strict=True)):+.4f}" if shared else "-"
        spread = f"{statistics.stdev(losses.values()):.4f}" if len(losses) > 1 else "-"
        p = paired_t_test(*pair) if len(shared) > 1 else None
        mean = f"{statistics.fmean(losses.values()):.4f}"
        table.add_row(arm, str(len(losses)), mean, spread, other, less, "-" if p is None else f"{p:.3f}")
    console.print(table)


def main() -> None:
    """Train what has no row yet, seed after seed, and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, default=Path("runs/pressure"), metavar="FOLDER", help="%(default)s")
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/pressure.jsonl"), metavar="FILE")
    made.add_argument("--quick", action="store_true", help="one seed, 40 updates, rows in --work: shows that it runs")
    args, console = made.parse_args(), Console()
    plan = Plan(40, (1,)) if args.quick else Plan()
    results = Results(args.work / "quick.jsonl" if args.quick else args.results)
    corpus = ensure_corpus(args.work / "corpus", console)
    for seed in plan.seeds:
        for arm in ARMS:
            key = f"{arm}/{seed}/{plan.steps}"
            if key not in results.rows:
                results.add(key, run(arm, seed, plan, corpus.resolve(), args.work))
                console.print(f"{key}: {results.rows[key]['final_loss']:.4f}", highlight=False)
    show(list(results.rows.values()), console)


if __name__ == "__main__":
    main()
