"""Gives verbs whose work tasks may do their arguments, and says who does it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megaopus.errors import DataError

if TYPE_CHECKING:
    from megaopus.corpus_tools.tasks.executors import Executor


def add_executor(parser: argparse.ArgumentParser, what: str) -> None:
    """Add who does ``what``; the verb's own is --workers."""
    from megaopus.corpus_tools.tasks.executors import KINDS

    add = parser.add_argument
    add(
        "--executor",
        choices=KINDS,
        help=f"{what}: in --workers processes here, as a Slurm array, or on Ray (RAY_ADDRESS, or this machine); pip"
        " install 'megaopus[scale]'",
    )
    add("--tasks", type=int, metavar="N", help="tasks of --executor (default: one for each worker)")
    add(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="option of sbatch for each task, partition=cpu say; repeatable",
    )


def executor_of(args: argparse.Namespace, plugins: Sequence[str]) -> Executor | None:
    """Say who does the work; None: this process and its workers. Raises DataError for what is said of no executor."""
    from megaopus.corpus_tools.tasks.executors import Executor

    if args.executor is None:
        if args.tasks is not None or args.slurm:
            raise DataError("--tasks and --slurm are of an executor: add --executor local, slurm or ray")
        return None
    return Executor(args.executor, args.tasks, args.workers, tuple(args.slurm), tuple(plugins))
