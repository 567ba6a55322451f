"""Skips updates with a loss or gradient that is not finite, or a gradient far larger than the ones before."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaopus.engine.base import StepResult
from megaopus.errors import EngineError
from megaopus.events import Event

SPIKES = 3
"""In a row: batches differ, so three that spike alike at the same weights are the weights' doing, not the batches'."""


class SpikeGuard:
    """Skips updates whose gradient spikes, and counts those that are skipped.

    A gradient norm above ``factor`` times the median of the last ``window`` applied ones is a spike; before a quarter
    of ``window`` are known nothing is, nor with ``factor`` 0. The same on every rank, as norms are. ``clipped``:
    gradients are clipped, so a large one can be trained on; after SPIKES spikes in a row they are, which alone leads
    out of where the weights are, and the window starts anew.
    """

    def __init__(self, factor: float, window: int, *, clipped: bool, max_skipped: int = sys.maxsize):
        """``max_skipped``: updates skipped in a row after which the run should stop."""
        self._factor, self._clipped, self._max_skipped = factor, clipped, max_skipped
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

    def record(self, outcome: StepResult, step: int, ids: Sequence[int]) -> list[Event]:
        """Take an update in; returns an event if it was skipped, which says why.

        ``ids``: of the batch of ``step``. The kind is ``update.skipped.`` and loss_not_finite, gradient_not_finite,
        spike or spikes_in_a_row; the fact ``reason`` says it in words, with the numbers.
        """
        if outcome.applied:
            self._norms.append(outcome.grad_norm)
            self.skipped = self._spikes = 0
            return []
        self.skipped += 1
        kind, reason = self._reason(outcome)
        text = f"step {step}: {reason}, update skipped; ids {list(ids)}"
        return [Event(f"update.skipped.{kind}", text, reason=reason, step=step, ids=list(ids))]

    def _reason(self, outcome: StepResult) -> tuple[str, str]:
        if not math.isfinite(outcome.loss):
            return "loss_not_finite", "loss not finite"
        if not math.isfinite(outcome.grad_norm):
            return "gradient_not_finite", "gradient not finite"
        limit = self.limit()
        self._spikes += 1
        kind = "spike"
        reason = f"gradient norm {outcome.grad_norm:.3g} above {limit:.3g} ({self._factor:g} times the median)"
        if self._clipped and self._spikes == SPIKES:
            self._norms.clear()
            kind = "spikes_in_a_row"
            reason += f", {SPIKES} in a row: from here on they are trained on, clipped, and the median starts anew"
        return kind, reason

    @property
    def exhausted(self) -> bool:
        """Return whether so many updates were skipped in a row that the run should stop."""
        return self.skipped >= self._max_skipped

    def give_up(self, updates: int, checkpoint: Path | None) -> EngineError:
        """Make the error to stop with after ``updates`` updates; ``checkpoint``: the last good one."""
        return EngineError(
            f"{self.skipped} updates in a row were skipped, the last of them {updates}; "
            f"last good checkpoint: {checkpoint or 'none'}. metrics.jsonl has losses and gradient norms, choices/ the "
            "ids of their batches. A lower learning rate, more warm-up or other data may help (resume_allow), or a "
            "larger train.spike_factor if the gradients are as they should be"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values on which the coming decisions depend."""
        return {"norms": list(self._norms), "skipped": self.skipped, "spikes": self._spikes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self._norms.clear()
        self._norms.extend(state["norms"])
        self.skipped, self._spikes = state["skipped"], state["spikes"]
