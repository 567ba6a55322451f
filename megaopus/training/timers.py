"""Times what a rank does: one clock for the record, for the search for stragglers and for the report of a hang."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STEP = ("data", "select", "check", "train")
"""What a step consists of; ``data`` is every wait for tokens, wherever in the step."""


class Timers:
    """Books every second under the name of what the rank is doing: ``with timers("train"): ...``.

    In a context within another one seconds count for the inner name alone. For the loop's thread; others may read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.step = 0
        """Update, counted from 0, that the rank works on; the loop sets it."""
        self.phase = "start"
        """What the rank is doing."""
        self.since = clock()
        """When that began, by the clock."""
        self.changes = 0
        """How often the phase has changed: as long as it grows there is progress."""
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Book what is done inside under ``phase``."""
        before = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: str) -> None:
        now = self.clock()
        self._seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now
        self.changes += 1

    def book(self, name: str, seconds: float) -> None:
        """Book seconds that something else has measured."""
        self._seconds[name] += seconds

    def seconds(self, *names: str) -> float:
        """Sum up what has been booked under ``names`` so far; a phase that still goes on is booked when it ends."""
        return sum((self._seconds.get(name, 0.0) for name in names), 0.0)
