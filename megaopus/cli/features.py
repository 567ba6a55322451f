"""Work the text features of a corpus out ahead of the runs that need them."""

from __future__ import annotations

import argparse
import shlex
from contextlib import nullcontext

from rich.console import Console

from megaopus.cli._settings import add_settings, composed
from megaopus.cli._tasks import add_executor, executor_of
from megaopus.errors import DataError

DESCRIPTION = (
    "Make the text features that a run of these settings reads: n-grams of pool and proxy counted, every sequence of\n"
    "the pool described. The run finds them; without them its first process makes them before step 0."
)
EXAMPLES = (
    "  python -m megaopus features selection=opus data.path=corpus\n"
    "  python -m megaopus features selection=opus data.path=corpus --executor slurm --tasks 200 --slurm partition=cpu"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the run, and who does the work."""
    add_settings(parser)
    add_executor(parser, "count and describe by tasks over sequences")
    workers = "tasks of --executor that run at a time (default: one a core, or as many as the cluster has room for)"
    parser.add_argument("--workers", type=int, metavar="N", help=workers)


def run(args: argparse.Namespace) -> int:
    """Make them, showing progress, and where they lie."""
    config = composed(args, None)
    executor = executor_of(args, config.plugins)
    if executor is None and args.workers is not None:
        raise DataError("--workers are of an executor: add --executor local, slurm or ray")
    if not config.selection.needs_text_features:
        raise DataError(f"selection.method={config.selection.method} reads no text features; name the run's selection=")
    from megaopus.corpus_tools.tasks.hands import task_hands
    from megaopus.data.run_data import RunData
    from megaopus.data.text_features import is_of_a_sample

    console = Console()
    data = RunData.open(config.data, config.data_needs())
    if executor is not None:
        executor.check(data.text_features_folder)
    with nullcontext() if executor is None else task_hands(executor) as hands:
        folder = data.ensure_text_features(console, hands)
    counted = config.data.text_features_sample if is_of_a_sample(folder) else len(data.pool)
    size = sum(path.stat().st_size for path in folder.parent.glob(f"{folder.name}*/*.npy"))
    lines = (
        f"pool: {len(data.pool):,} sequences, n-grams of {counted:,} of them counted; proxy: {len(data.proxy):,}, all",
        f"{folder}: {size / len(data.pool):,.0f} bytes for each sequence of the pool",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def closing(args: argparse.Namespace) -> str:
    """Say what reads them."""
    settings = " ".join(map(shlex.quote, args.overrides))
    return f"text features are there | next: python -m megaopus train {settings}"
