"""Which updates are not made: a loss or gradient that is not finite, a gradient far larger than the ones before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Protocol

SPIKES = 3
"""In a row: batches differ, so three that spike alike at the same weights are the weights' doing, not the batches'."""


class Outcome(Protocol):
    """One update (``megaopus.engine.base.StepResult``)."""

    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...

    @property
    def applied(self) -> bool: ...


class SpikeGuard:
    """A gradient norm above ``factor`` times the median of the last ``window`` applied ones is a spike.

    Below a quarter of ``window`` norms nothing is; ``factor`` 0: never. The same on every rank, as norms are.
    ``clipped``: gradients are clipped, so a large one can be trained on; after SPIKES spikes in a row they are, which
    alone leads out of where the weights are, and the window starts anew.
    """

    def __init__(self, factor: float, window: int, *, clipped: bool):
        self._factor, self._clipped = factor, clipped
        self._norms: deque[float] = deque(maxlen=window)
        self.skipped = 0
        """Updates skipped in a row, until now."""
        self._spikes = 0
        """Those of them that were spikes."""

    def limit(self) -> float:
        """The largest gradient norm that the coming update may have."""
        if not self._factor or 4 * len(self._norms) < (self._norms.maxlen or 0):
            return math.inf
        return self._factor * statistics.median(self._norms)

    def record(self, outcome: Outcome) -> str | None:
        """Take an update in; why it was skipped, None if it was applied."""
        limit = self.limit()
        if outcome.applied:
            self._norms.append(outcome.grad_norm)
            self.skipped = self._spikes = 0
            return None
        self.skipped += 1
        if not math.isfinite(outcome.loss):
            return "loss not finite"
        if not math.isfinite(outcome.grad_norm):
            return "gradient not finite"
        self._spikes += 1
        reason = f"gradient norm {outcome.grad_norm:.3g} above {limit:.3g} ({self._factor:g} times the median)"
        if self._clipped and self._spikes == SPIKES:
            self._norms.clear()
            reason += f", {SPIKES} in a row: from here on they are trained on, clipped, and the median starts anew"
        return reason

    def state_dict(self) -> dict[str, Any]:
        """Plain values on which the coming decisions depend."""
        return {"norms": list(self._norms), "skipped": self.skipped, "spikes": self._spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self._norms.clear()
        self._norms.extend(state["norms"])
        self.skipped, self._spikes = state["skipped"], state["spikes"]
