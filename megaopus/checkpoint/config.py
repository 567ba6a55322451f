"""When checkpoints are written and how many are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints under ``run_dir/checkpoints``; one is always written at the end and on SIGTERM."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""
    keep: int = 2
    """Newest checkpoints kept."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if self.every < 0:
            yield "every", "must not be negative", "0 saves only at the end and on SIGTERM"
        if self.keep < 1:
            yield "keep", "must be at least 1", "2 is usual"
