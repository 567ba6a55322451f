"""Finds the rank that holds the others up, and the one that waits for data."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from megaopus.events import Event
from megaopus.training.timers import STEP, Timers

OWN_WORK = "own work"
"""What ``Timers`` books a rank's passes under (``StepResult.own_s``)."""
SLOW = 1.2
"""A rank's own work over the median of all, above which it is called slow."""
WAIT = 0.1
"""Share of a step spent waiting for data, above which that is said."""


class StragglerDetector:
    """Compares the ranks every ``every`` updates by what their timers have booked since the last time.

    ``gather`` hands every rank's value to every rank.
    """

    def __init__(self, every: int, gather: Callable[[tuple[float, float]], list[tuple[float, float]]]):
        self._every, self._gather = every, gather
        self._before = (0.0, 0.0, 0.0)
        self._steps = 0

    def check(self, timers: Timers) -> list[Event]:
        """Say after an update, if it is time, what is out of the ordinary; collective then."""
        self._steps += 1
        if (timers.step + 1) % self._every:
            return []
        sums = timers.seconds("data"), timers.seconds(OWN_WORK), timers.seconds(*STEP)
        data_s, own_s, all_s = (now - before for now, before in zip(sums, self._before, strict=True))
        steps, self._before, self._steps = self._steps, sums, 0
        ranks, events = self._gather((data_s, own_s)), []
        data, own = [rank[0] for rank in ranks], [rank[1] for rank in ranks]
        if max(data) > WAIT * all_s:
            rank, share = data.index(max(data)), max(data) / all_s
            events.append(
                Event("data.wait", f"rank {rank} waits for data {share:.0%} of the time", rank=rank, share=share)
            )
        median = statistics.median(own)
        if len(ranks) > 1 and max(own) > SLOW * median > 0:
            rank, mine, usual = own.index(max(own)), max(own) / steps, median / steps
            text = f"rank {rank} is slow: {mine:.3f} s of its own work an update, median {usual:.3f}"
            events.append(Event("rank.slow", text, rank=rank, own_s=mine, median_s=usual))
        return events
