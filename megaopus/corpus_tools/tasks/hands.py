"""Gives work that is divided into units, and needs to know no executor, to tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console

from megaopus.corpus_tools.progress import stages
from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.corpus_tools.tasks.stages import run_stage
from megaopus.corpus_tools.tasks.units import Units
from megaopus.corpus_tools.tasks.workers import Workers


class PlacedUnits(Units, Protocol):
    """Does work by units whose results are files of one folder."""

    @property
    def folder(self) -> Path:
        """Of the results."""


@contextmanager
def task_hands(executor: Executor, console: Console) -> Iterator[Callable[[PlacedUnits], None]]:
    """Yield what does a stage's units by tasks, with a line of progress; their logs lie beside the units' results."""
    with stages(console) as stage, Workers() as workers:

        def hands(units: PlacedUnits) -> None:
            folder = units.folder / f"tasks-{units.name.replace(' ', '-')}"
            run_stage(units, folder, executor, workers, stage(units.name, len(units.numbers()), "units/s", 1))

        yield hands
