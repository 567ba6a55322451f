"""Does a mixture of experts serve from random weights on this machine, and does selection serve it?

``moe_tiny`` (8 experts, 2 a token) beside the same model with one MLP as wide as two experts, so that a token uses as
many parameters of either but for the routers; uniform and ``selection=opus``; three seeds, on the demo's text. A row a
run goes to --results {model, arm, seed, steps, final_loss, seconds, step_s, busiest}; what has one is not run again.
Prints means and spreads: described, not claimed. About three minutes of one core a run.

    python benchmarks/mixture.py --work runs/mixture [--results FILE] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.study import Results, summary_of, trained
from megaopus.cli.demo import WANTED, ensure_corpus

MODELS = {"dense": ("model=moe_tiny", "model.num_experts=null"), "mixture": ("model=moe_tiny",)}
ARMS = {
    "uniform": ("selection=uniform", "selection.rho=0.125"),
    "opus": ("selection=opus", "selection.score_length=32", "selection.proxy_batch_size=8"),
}
STEPS, SEEDS = 400, (1, 2, 3)


def run(model: str, arm: str, seed: int, steps: int, corpus: Path, work: Path) -> dict[str, Any]:
    """Train, and sum it up."""
    common = ["experiment=demo", f"data.path={corpus}", f"data.target_domains=[{WANTED}]", f"seed={seed}"]
    common += [f"train.steps={steps}", f"optim.warmup_steps={min(40, steps // 2)}", "checkpoint.keep=1"]
    done = trained([*common, *MODELS[model], *ARMS[arm]], work / f"{model}_{arm}_{seed}", 1)
    found, busiest = summary_of(done), [row.expert_busiest for row in done.steps if row.expert_busiest is not None]
    last = found["validations"][-1]
    return {
        "model": model,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "final_loss": last["loss"],
        "seconds": last["time_s"],
        "step_s": found["step_s"],
        "busiest": statistics.fmean(busiest[-50:]) if busiest else None,
        "commit": done.environment.get("git"),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print means over seeds."""
    table = Table(title="final loss on the wanted text", box=SIMPLE, padding=0)
    for name in ("model", "arm", "seeds", "mean", "std", "seconds a step", "busiest expert"):
        table.add_column(name, justify="left" if name in ("model", "arm") else "right")
    for model in MODELS:
        for arm in ARMS:
            mine = [row for row in rows if (row["model"], row["arm"]) == (model, arm)]
            if not mine:
                continue
            losses = [row["final_loss"] for row in mine]
            spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
            seconds = f"{statistics.fmean(row['step_s'] for row in mine):.3f}"
            busiest = [row["busiest"] for row in mine if row["busiest"] is not None]
            load = f"{statistics.fmean(busiest):.2f}" if busiest else "-"
            table.add_row(model, arm, str(len(mine)), f"{statistics.fmean(losses):.4f}", spread, seconds, load)
    console.print(table)


def main() -> None:
    """Train what has no row yet, seed after seed, and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, default=Path("runs/mixture"), metavar="FOLDER", help="%(default)s")
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/mixture.jsonl"), metavar="FILE")
    made.add_argument("--quick", action="store_true", help="one seed, 20 updates, rows in --work: shows that it runs")
    args, console = made.parse_args(), Console()
    steps, seeds = (20, (1,)) if args.quick else (STEPS, SEEDS)
    results = Results(args.work / "quick.jsonl" if args.quick else args.results)
    corpus = ensure_corpus(args.work / "corpus", console)
    for seed in seeds:
        for model in MODELS:
            for arm in ARMS:
                key = f"{model}/{arm}/{seed}/{steps}"
                if key not in results.rows:
                    results.add(key, run(model, arm, seed, steps, corpus.resolve(), args.work))
                    console.print(f"{key}: {results.rows[key]['final_loss']:.4f}", highlight=False)
    show(list(results.rows.values()), console)


if __name__ == "__main__":
    main()
