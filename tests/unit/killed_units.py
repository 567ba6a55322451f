"""Work whose process is killed, in a module of its own: the processes that do it import little."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Numbers:
    """Work that kills its process once, and writes down who did each unit."""

    folder: Path
    name: str = "numbers"

    def numbers(self) -> Sequence[int]:
        return range(6)

    def done(self, number: int) -> bool:
        return (self.folder / f"done-{number}").is_file()

    def work(self, number: int) -> Mapping[str, int]:
        killed = self.folder / "killed"
        if number == 4 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with (self.folder / "tries").open("a") as stream:
            stream.write(f"{number}\n")
        (self.folder / f"done-{number}").touch()
        return {"units": 1}
