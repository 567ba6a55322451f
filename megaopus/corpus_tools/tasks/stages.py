"""Has a stage of work done by tasks: waits for it, tells how far it is, and raises what was wrong with the data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.corpus_tools.tasks.units import Place, Units, raise_first_fault
from megaopus.corpus_tools.tasks.workers import Workers
from megaopus.data.folder import StoppedError

_LOOK_SECONDS = 0.5


def run_stage(units: Units, folder: Path, executor: Executor, workers: Workers, advance: Callable[[int], None]) -> None:
    """Do all units that are not done yet.

    Args:
        units: the work.
        folder: of the stage, in which task logs, statistics and faults lie; it may hold those of an earlier try.
        executor: who does it.
        workers: local processes, for an executor that needs some.
        advance: called with numbers of units that are done.

    Raises:
        DataError: the fault of the first unit that has one.
        StoppedError: tasks died; what is done is kept.
    """
    from megaopus.corpus_tools.tasks.engines import run_tasks  # here: it needs datatrove

    folder.mkdir(parents=True, exist_ok=True)
    for fault in folder.glob("fault-*.json"):
        fault.unlink()
    order = units.numbers()
    waiting = _Waiting(units, advance)
    waiting.look()
    if not waiting.numbers:
        return
    place = Place(folder, Path.cwd(), executor.plugins)
    with waiting.watched():
        run_tasks(units, place, executor, min(executor.count, len(order)), workers)
    waiting.look()
    raise_first_fault(folder, sorted(order))
    if waiting.numbers:
        raise StoppedError(
            f"{units.name}: {len(waiting.numbers):,} of {len(order):,} pieces were not finished; their tasks' logs are"
            f" in {folder}; the same command does the rest"
        )


class _Waiting:
    """Looks which units are done, every now and then."""

    def __init__(self, units: Units, advance: Callable[[int], None]):
        self._units, self._advance = units, advance
        self.numbers = list(units.numbers())

    def look(self) -> None:
        """Tell what was done since the last look."""
        left = [number for number in self.numbers if not self._units.done(number)]
        done, self.numbers = len(self.numbers) - len(left), left
        if done:
            self._advance(done)

    def watched(self) -> _Watch:
        """Look on while a block runs."""
        return _Watch(self.look)


class _Watch:
    """Calls a function every half second, and no more than a twentieth of the time, from a thread."""

    def __init__(self, look: Callable[[], None]):
        self._look, self._over = look, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        pause = _LOOK_SECONDS
        while not self._over.wait(pause):
            began = time.perf_counter()
            self._look()
            pause = max(_LOOK_SECONDS, 20 * (time.perf_counter() - began))
