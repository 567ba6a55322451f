"""Times a rank's own work in a step: what it does before it waits for other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class WorkTimer:
    """Adds up the seconds between ``start`` and ``stop``, less those in which the rank waited for data.

    On CUDA they are the device's, between events in its stream; what the host waited meanwhile is taken off them.
    """

    def __init__(
        self,
        on_cpu: bool,
        clock: Callable[[], float] = time.perf_counter,
        waited: Callable[[], float] = lambda: 0.0,
    ):
        """``waited``: seconds for which this rank has waited for data so far."""
        self._on_cpu, self._clock, self._waited = on_cpu, clock, waited
        self._spans: list[tuple[Any, Any, float]] = []
        self._begun: tuple[Any, float] | None = None

    def reset(self) -> None:
        """Forget what was timed before."""
        self._spans.clear()
        self._begun = None

    def start(self) -> None:
        """Begin a span of own work."""
        self._begun = self._now(), self._waited()

    def stop(self) -> None:
        """End it; does nothing where none was begun."""
        if self._begun is not None:
            moment, waited = self._begun
            self._spans.append((moment, self._now(), self._waited() - waited))
            self._begun = None

    def seconds(self) -> float:
        """Sum up the spans since ``reset``; waits for the device to come to the end of them."""
        return sum(max(0.0, self._between(begin, end) - waited) for begin, end, waited in self._spans)

    def _now(self) -> Any:
        """A moment of the device's work: the clock on the CPU, an event in the stream on CUDA."""
        if self._on_cpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self._on_cpu:
            return end - begin
        if not end.query():  # which a wait for something later has spared
            end.synchronize()
        return begin.elapsed_time(end) / 1000
