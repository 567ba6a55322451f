"""Says what work that is divided into units looks like, and how a fault of the data reaches who asked for the work.

A unit's results are files that appear whole, so a unit that is there is never done again, whoever comes to it. Which
units there are is a matter of the data alone: task t of N does the units t, t + N, ... of their list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megaopus.corpus_tools.readers.stored import FaultyError
from megaopus.data.folder import StoppedError
from megaopus.errors import DataError, StoreDownError
from megaopus.fs import write_whole
from megaopus.plugins import require_plugins


class Units(Protocol):
    """Does work by numbered units. It is sent to other processes, and asked there for some of them."""

    @property
    def name(self) -> str:
        """Of this work, for folders and lines of progress."""

    def numbers(self) -> Sequence[int]:
        """Of the units, in the order in which they should be begun."""

    def done(self, number: int) -> bool:
        """Tell whether the unit's results are there."""

    def work(self, number: int) -> Mapping[str, int]:
        """Do a unit; its results are there when it is done. Returns counts for the statistics.

        Raises DataError for a fault of the data, which would be there at another try too.
        """


@dataclass(frozen=True, slots=True)
class Place:
    """Holds what a process needs in order to see what the one that asked for the work sees."""

    folder: Path
    """Of the stage, where faults are written."""
    directory: Path
    """That relative paths are meant from."""
    plugins: tuple[str, ...] = ()

    def enter(self) -> None:
        """Take it over. Raises ConfigError for a plugin that cannot be imported here."""
        if Path.cwd() != self.directory:
            os.chdir(self.directory)
        require_plugins(self.plugins)


def attempt(units: Units, number: int, place: Place) -> Mapping[str, int] | None:
    """Do a unit. None: the data has a fault, which is written down; no later unit of this task can matter then."""
    try:
        return units.work(number)
    except (StoppedError, StoreDownError):  # which another try may not meet
        raise
    except DataError as error:
        reason = error.reason if isinstance(error, FaultyError) else None
        write_whole(place.folder / f"fault-{number:09d}.json", json.dumps({"reason": reason, "message": str(error)}))
        return None


def raise_first_fault(folder: Path, order: Sequence[int]) -> None:
    """Raise the DataError of the unit that comes first in ``order`` among those that had one."""
    found = {int(path.stem.rpartition("-")[2]): path for path in folder.glob("fault-*.json")}
    for number in order:
        if number in found:
            fault = json.loads(found[number].read_text(encoding="utf-8"))
            raise FaultyError(fault["reason"], fault["message"]) if fault["reason"] else DataError(fault["message"])
