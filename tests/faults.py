"""Faults on purpose: ``python -m tests.faults SIGNAL STEP RANK train ...`` is ``python -m megaopus train ...`` in which
rank RANK sends itself SIGNAL just before update STEP (counted from 0)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaopus.checkpoint.manifest import COMPLETE, MANIFEST, digest_of, entry, manifest_text, read_manifest
from megaopus.training.trainer import Trainer


class Interrupted(BaseException):
    """Ends a run in this process as abruptly as a process can end one without dying."""


def interrupt() -> None:
    raise Interrupted


@contextmanager
def at_step(step: int, fault: Callable[[], None]) -> Iterator[None]:
    """Trainers call ``fault`` just before update ``step`` inside."""
    original = Trainer.update

    def faulty(self: Trainer, monitor: Any) -> None:
        if self.engine.step == step:
            fault()
        original(self, monitor)

    Trainer.update = faulty  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.update = original  # type: ignore[method-assign]


def reseal(checkpoint: Path) -> None:
    """Give a checkpoint whose files were changed digests that fit them, as somebody with bad intent would."""
    files = read_manifest(checkpoint)
    text = manifest_text({name: entry(checkpoint / name) for name in files})
    (checkpoint / MANIFEST).write_text(text)
    (checkpoint / COMPLETE).write_text(digest_of(text) + "\n")


def main(arguments: list[str]) -> int:
    """Run the command with its fault; see the top of the file."""
    from megaopus.__main__ import main as megaopus

    name, step, rank, *command = arguments

    def fault() -> None:
        if os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.Signals[name])

    with at_step(int(step), fault):
        return megaopus(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
