"""Length and batches of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Steps, batches and validation of a run."""

    steps: int = 100
    """Steps in all; a resumed run goes on to this number."""
    global_batch_size: int = 8
    """Sequences per optimizer step over all ranks [K]."""
    micro_batch_size: int = 8
    """Sequences per forward pass on one rank."""
    eval_every: int = 0
    """Steps between validations; 0: only after the last step."""
    eval_sequences: int = 64
    """Sequences per domain and validation."""

    spike_factor: float = 20.0
    """An update whose gradient norm is above so many times the median of those before is skipped; 0: none is.

    After three in a row, with ``optim.clip_grad``, such gradients are trained on, and the median starts anew."""
    spike_window: int = 128
    """Applied updates over which that median is taken; the rule begins after a quarter of them."""
    max_skipped: int = 10
    """Skipped updates in a row (spikes, or a loss or gradient that is not finite) after which the run stops."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        for key in ("steps", "global_batch_size", "micro_batch_size", "eval_sequences"):
            if getattr(self, key) < 1:
                yield key, "must be at least 1", "see configs/run.yaml"
        if self.spike_factor != 0 and self.spike_factor <= 1:
            yield "spike_factor", "must be above 1", "20 leaves ordinary noise alone; 0 switches the rule off"
        for key in ("spike_window", "max_skipped"):
            if getattr(self, key) < 1:
                yield key, "must be at least 1", "128 and 10 are usual"
        if self.eval_every < 0:
            yield "eval_every", "must not be negative", "0 validates only after the last step"
