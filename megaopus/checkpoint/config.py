"""Says when checkpoints are written and how many are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from megaopus.settings import HARMLESS, setting

_TIME = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _steps_or_time(value: int | str) -> str | None:
    if not (isinstance(value, int) or value.isdecimal() or _TIME.fullmatch(value)):
        return "neither a number of steps nor a time"
    if (isinstance(value, int) and value < 0) or value in ("0s", "0m", "0h"):
        return "must not be negative, nor a time of nothing"
    return None


@dataclass(slots=True, kw_only=True)
class InitConfig:
    """Says at which weights a new run begins; a resumed run goes on at its own."""

    RESUME: ClassVar[str] = HARMLESS

    path: str | None = setting(
        None,
        schemes=(),
        doc="Whose weights the run begins with, at step 0: a Hugging Face model folder, a run or checkpoint of ours, or"
        " a Megatron-LM checkpoint (torch_dist); null: they are drawn. To go on with a run is `resume`.",
    )


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints under `run_dir/checkpoints`; one is always written at the end, on a signal to stop and on Ctrl-C."""

    RESUME: ClassVar[str] = HARMLESS

    every: int | str = setting(
        "15m",
        check=_steps_or_time,
        doc="Steps between checkpoints (200), or time (90s, 15m, 2h); 0: only at the end and when the run is stopped.",
        hint="200 is every 200 steps, 15m every 15 minutes (s, m or h); 0 saves only at the end and on a stop",
    )
    keep: int = setting(2, min=1, doc="Newest checkpoints kept, besides those of `keep_every`.")
    keep_every: int = setting(
        0,
        min=0,
        doc="A checkpoint after every multiple of so many steps is written and never removed; 0: none.",
        hint="0 keeps the newest only",
    )
    background: bool = setting(
        False, doc="Write while training goes on, from a copy of weights and optimizer state in the host's memory."
    )

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints; 0 if they go by time or not at all."""
        return 0 if self.every_seconds else int(self.every)

    @property
    def every_seconds(self) -> float:
        """Seconds between checkpoints; 0 if they go by steps or not at all."""
        found = _TIME.fullmatch(str(self.every))
        return float(found[1]) * _SECONDS[found[2]] if found else 0.0
