"""Compare selected with uniform batches on real text, in minutes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megaopus.cli._paths import local_path
from megaopus.cli.prepare import show_corpus
from megaopus.distributed.launcher import without_launcher
from megaopus.errors import EngineError
from megaopus.training.signals import INTERRUPT_EXIT_CODE, STOP_EXIT_CODE

if TYPE_CHECKING:
    from megaopus.report.compare import Comparison, Run

DESCRIPTION = (
    "Train a small GPT twice on text found in this Python installation, with and without selection, and compare."
)
EXAMPLES = "  python -m megaopus demo"
WANTED = "docs"
LR_WARM_STEPS = 40
STEPS = 800
ARMS = {"uniform": ("selection=uniform",), "opus": ("selection=opus", "selection.score_length=64")}
"""opus: the default recipe, scoring half of the demo's sequences."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the demo goes, its seed, and how long it trains."""
    parser.add_argument(
        "--out", type=local_path, default=Path("runs/demo"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of data order, weights and sampling (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="updates of each run (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Build the corpus, train both arms, print the table, write report.html and summary.json."""
    from megaopus.report.compare import compare, load_run, with_step_seconds
    from megaopus.report.page import write_report
    from megaopus.report.replay import texts_of

    if args.steps < 1:
        raise argparse.ArgumentError(None, "--steps must be at least 1")
    console = Console()
    started = time.monotonic()
    corpus = ensure_corpus(args.out / "corpus", console)
    runs, arms = {}, {}
    for name, overrides in ARMS.items():
        run_dir = args.out / f"{name}_seed{args.seed}"
        settings = ["experiment=demo", f"data.path={corpus}", f"data.target_domains=[{WANTED}]", f"seed={args.seed}"]
        settings += [f"train.steps={args.steps}", f"optim.warmup_steps={min(LR_WARM_STEPS, args.steps)}"]
        arms[name] = [*settings, *overrides]
        train(run_dir, args.steps, arms[name], console)
        runs[name] = load_run(run_dir, name)
    console.print()
    from megaopus.side_by_side import seconds_of_a_step  # which takes seconds, and the first run starts without it

    seconds = seconds_of_a_step(arms, args.steps)
    recorded = {name: sum(row.step_s for row in run.steps) / len(run.steps) for name, run in runs.items()}
    runs = {name: with_step_seconds(run, seconds[name]) for name, run in runs.items()}
    uniform, opus = runs["uniform"], runs["opus"]
    comparison = compare(uniform, opus)
    summary = summarise(uniform, opus, comparison, args) | {"step_s": seconds, "recorded_step_s": recorded}
    summary_path = args.out / "summary.json"
    partial = summary_path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.replace(summary_path)
    report = write_report(
        runs,
        args.out / "report.html",
        title="megaopus demo: uniform against opus",
        texts=texts_of,
        notes=[
            f"Both runs begin with the same weights and read the same stream of text; wanted domain: {WANTED}.",
            "Seconds are steps times the seconds of a step, which were measured after the runs, in turns: "
            f"{_each(seconds)}. While they ran a step took {_each(recorded)}, beside what else the machine did.",
        ],
    )
    print_table(console, uniform, opus, comparison)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\nreport: {report}\nsummary: {summary_path}", highlight=False, soft_wrap=True)
    console.print(f"done in {minutes:.1f} minutes | next: your own text, as docs/data.md says", highlight=False)
    return 0


def train(run_dir: Path, steps: int, settings: Sequence[str], console: Console) -> None:
    """Start a ``train`` process; a finished run is not run again, a killed one goes on."""
    from megaopus.checkpoint.checkpointer import complete_checkpoints

    done = complete_checkpoints(run_dir)
    if done and done[-1].name == f"step_{steps:08d}":
        return
    arguments = [*settings, f"run_dir={run_dir}"]
    line = f"\n$ python -m megaopus train {shlex.join(arguments)}"
    console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)
    status = call([sys.executable, "-m", "megaopus", "train", *arguments])
    if status == STOP_EXIT_CODE:
        console.print(f"{run_dir}: stopped and saved; the same command goes on", highlight=False, soft_wrap=True)
        raise SystemExit(status)
    if status == INTERRUPT_EXIT_CODE:
        raise KeyboardInterrupt
    if status:
        raise EngineError(f"{run_dir}: training ended with exit status {status}; its message is above")


def _each(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())


def call(command: Sequence[str]) -> int:
    """Run a process alone, as if no launcher had started this one, and return its exit status.

    It has time to save: Ctrl-C in this process is a request to stop to it, which a terminal has made to it as well.
    """
    with subprocess.Popen(command, env=without_launcher(os.environ)) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.terminate()


def ensure_corpus(path: Path, console: Console) -> Path:
    """Prepare the demo corpus at ``path`` if it is not there; returns ``path``."""
    if not (path / "manifest.json").is_file():
        from megaopus.corpus_tools.demo_corpus import build_demo_corpus

        path.parent.mkdir(parents=True, exist_ok=True)
        show_corpus(build_demo_corpus(path, console=console), console)
    return path


def summarise(uniform: Run, opus: Run, comparison: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    """Make the content of summary.json; ratios are null where opus never reaches uniform's final loss.

    Losses and ratios are on the target, but for ``final_mean_loss``, the mean over all domains.
    """
    from megaopus.report.target import target_of

    means = mean_losses(comparison)
    return {
        "target": target_of(opus).told,
        "uniform.final_loss": comparison.uniform_final_loss,
        "opus.final_loss": comparison.final_loss,
        "uniform.final_mean_loss": means[0],
        "opus.final_mean_loss": means[1],
        "tokens_ratio": comparison.tokens_ratio,
        "time_ratio": comparison.time_ratio,
        "overhead": comparison.overhead,
        "seeds": 1,
        "seed": args.seed,
        "uniform_fall": comparison.uniform_fall,
        "steps": args.steps,
        "picked_share": {run.name: picked_share(run) for run in (uniform, opus)},
        "comparison": asdict(comparison),
    }


def mean_losses(comparison: Comparison) -> tuple[float, float]:
    """Average the final losses of the domains, uniform's and opus's."""
    first, second = (fmean(each.values()) for each in (comparison.uniform_final_domains, comparison.final_domains))
    return first, second


def picked_share(run: Run) -> dict[str, float]:
    """Average the share of each domain among the picks over the steps."""
    rows = run.selections
    return {domain: sum(row.share[domain] for row in rows) / len(rows) for domain in rows[0].share}


def print_table(console: Console, uniform: Run, opus: Run, comparison: Comparison) -> None:
    """Print the result as a table."""
    steps = uniform.steps
    tokens = steps[-1].tokens
    seconds = sum(row.step_s for row in steps)
    table = Table(title=f"{len(steps)} updates from the same random weights", title_style="bold")
    for column, justify in (("", "left"), ("uniform", "right"), ("opus", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    losses = comparison.uniform_final_loss, comparison.final_loss
    table.add_row(f"final target loss ({WANTED})", *(f"{loss:.3f}" for loss in losses))
    table.add_row("mean over all domains", *(f"{loss:.3f}" for loss in mean_losses(comparison)))
    table.add_row("seconds of a step, measured in turns", *(f"{run.steps[0].step_s:.3f}" for run in (uniform, opus)))
    reach = comparison.tokens_ratio, comparison.time_ratio
    table.add_row("update tokens to uniform's final loss", f"{tokens:,}", _reached(reach[0], tokens, "{:,.0f}"))
    table.add_row("seconds to uniform's final loss", f"{seconds:.0f}", _reached(reach[1], seconds, "{:.0f}"))
    base = sum(row.select_s for row in steps) / (seconds - sum(row.select_s for row in steps))
    table.add_row("scoring overhead over training", f"{base:.1%}", f"{comparison.overhead:.1%}")
    pool = opus.selections[-1].pool_share
    shares = [picked_share(run) for run in (uniform, opus)]
    for domain in pool:
        table.add_row(f"picked from {domain}", *(f"{share[domain]:.1%}" for share in shares))
    console.print()
    console.print(table)
    if not comparison.measurable:
        console.print("the final losses differ by less than another seed would change: no difference measurable")
    if comparison.uniform_fall < 0.15:
        console.print(f"uniform's loss fell by only {comparison.uniform_fall:.2f}: the ratios mean little here")


def _reached(ratio: float | None, whole: float, form: str) -> str:
    if ratio is None:
        return "not reached"
    return f"{form.format(ratio * whole)} ({ratio:.0%})"
