"""Which rank holds the others up, and whether training waits for data."""

from __future__ import annotations

import statistics
from collections.abc import Callable

SLOW = 1.2
"""A rank's own work over the median of all, above which it is called slow."""
WAIT = 0.1
"""Share of a step spent waiting for data, above which that is said."""


class StragglerDetector:
    """Sums of seconds since the last report; ``gather`` hands every rank's value to every rank."""

    def __init__(self, every: int, gather: Callable[[tuple[float, float]], list[tuple[float, float]]]):
        self._every, self._gather = every, gather
        self._data_s = self._own_s = self._all_s = 0.0
        self._steps = 0

    def step(self, done: int, data_s: float, own_s: float, all_s: float) -> list[str]:
        """Take update number ``done`` (from 1) in: waiting for data, own work before other ranks are waited for, all.

        Every ``every`` updates, collectively: what is out of the ordinary, in words. No line: nothing.
        """
        self._data_s += data_s
        self._own_s += own_s
        self._all_s += all_s
        self._steps += 1
        if done % self._every:
            return []
        ranks, all_s, steps = self._gather((self._data_s, self._own_s)), self._all_s, self._steps
        self._data_s = self._own_s = self._all_s = 0.0
        self._steps = 0
        lines = []
        data, own = [rank[0] for rank in ranks], [rank[1] for rank in ranks]
        if max(data) > WAIT * all_s:
            lines.append(f"rank {data.index(max(data))} waits for data {max(data) / all_s:.0%} of the time")
        median = statistics.median(own)
        if len(ranks) > 1 and max(own) > SLOW * median > 0:
            work = f"{max(own) / steps:.3f} s of its own work an update, median {median / steps:.3f}"
            lines.append(f"rank {own.index(max(own))} is slow: {work}")
        return lines
