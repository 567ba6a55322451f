"""Notices requests to stop between phases."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_EXIT_CODE = 143
"""Exit status after a signal stopped the run in good order (128 + SIGTERM): schedulers may requeue on it."""


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 instead of dying from them; use as a context. ``reason`` is None until one came.

    ``take`` False: signals stay with the program that the run is a part of, and ``reason`` is its to set.
    """

    def __init__(self, take: bool = True) -> None:
        self._take = take
        self.reason: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python lets no other thread handle signals.
        if self._take and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not set from Python, so it cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
