"""Gives work that is divided into units, and needs to know no executor, to tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.corpus_tools.tasks.stages import run_stage
from megaopus.corpus_tools.tasks.units import Units
from megaopus.corpus_tools.tasks.workers import Workers


class PlacedUnits(Units, Protocol):
    """Does work by units whose results are files of one folder."""

    @property
    def folder(self) -> Path:
        """Of the results."""


Hands = Callable[[PlacedUnits, Callable[[int], None]], None]
"""Does all units that are not done yet, and calls with numbers of units that are."""


@contextmanager
def task_hands(executor: Executor) -> Iterator[Hands]:
    """Yield what does units by tasks; their logs lie beside the units' results."""
    with Workers() as workers:

        def hands(units: PlacedUnits, advance: Callable[[int], None]) -> None:
            folder = units.folder / f"tasks-{units.name.replace(' ', '-')}"
            run_stage(units, folder, executor, workers, advance)

        yield hands
