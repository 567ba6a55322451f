"""Says in numbers what a run asks of its corpora; plain data, so that settings can make one without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DataNeeds:
    """Holds what decides, beside the settings under ``data``, which sequences a run reads."""

    seed: int
    """Of the order of candidates, proxy and contrast batches."""
    steps: int
    """Updates in all."""
    buffer_size: int
    """Sequences of one buffer of candidates, over all ranks."""
    steps_per_buffer: int = 1
    """Consecutive updates that one buffer is for."""
    proxy_batch_size: int = 1
    """Sequences of a proxy batch, and of a contrast batch, over all ranks."""
    proxy: bool = False
    """Whether candidates are scored against proxy batches."""
    contrast: bool = False
    """Whether they are scored against batches of the pool too."""
    text_features: tuple[str, ...] | None = None
    """Blocks of the text features that a predictor sees candidates by, if there is one; None: none are read at all."""
    judges: bool = False
    """Whether sequences of the proxy are described as well, by which scores are judged."""
    eval_sequences: int = 1
    """Sequences of each domain to validate on, at most."""

    @property
    def reads_proxy(self) -> bool:
        """Say whether the split ``proxy`` is read: for batches of it, or for text features, which compare with it."""
        return self.proxy or self.text_features is not None
