"""When checkpoints are written and how many are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TIME = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints under ``run_dir/checkpoints``; one is always written at the end and on SIGTERM."""

    every: int | str = 0
    """Steps between checkpoints (200), or time (90s, 15m, 2h); 0: only at the end and on SIGTERM."""
    keep: int = 2
    """Newest checkpoints kept, besides those of ``keep_every``."""
    keep_every: int = 0
    """A checkpoint after every multiple of so many steps is written and never removed; 0: none."""
    background: bool = False
    """Write while training goes on, from a copy of weights and optimizer state in the host's memory."""

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints; 0 if they go by time or not at all."""
        return 0 if self.every_seconds else int(self.every)

    @property
    def every_seconds(self) -> float:
        """Seconds between checkpoints; 0 if they go by steps or not at all."""
        found = _TIME.fullmatch(str(self.every))
        return float(found[1]) * _SECONDS[found[2]] if found else 0.0

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        words = "200 is every 200 steps, 15m every 15 minutes (s, m or h); 0 saves only at the end and on SIGTERM"
        if not (isinstance(self.every, int) or self.every.isdecimal() or _TIME.fullmatch(self.every)):
            yield "every", "neither a number of steps nor a time", words
        elif (isinstance(self.every, int) and self.every < 0) or self.every in ("0s", "0m", "0h"):
            yield "every", "must not be negative, nor a time of nothing", words
        if self.keep < 1:
            yield "keep", "must be at least 1", "2 is usual"
        if self.keep_every < 0:
            yield "keep_every", "must not be negative", "0 keeps the newest only"
