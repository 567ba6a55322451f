"""Notices requests to stop between phases; a second Ctrl-C ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

STOP_EXIT_CODE = 143
"""Exit status after a signal stopped the run in good order (128 + SIGTERM): schedulers may requeue on it."""
INTERRUPT_EXIT_CODE = 130
"""Exit status after Ctrl-C ended work without a save (128 + SIGINT)."""
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopSignal:
    """Remembers ``REQUESTS`` instead of dying from them; use as a context. ``reason`` is None until one came.

    A second SIGINT ends the process with 130, wherever it is; of the others any number is one request, as torchrun
    sends its own SIGTERM after them. SIGHUP stays ignored where it was (``nohup``).

    ``take`` False: signals stay with the program that the run is a part of, and ``reason`` is its to set.
    """

    def __init__(self, take: bool = True) -> None:
        self._take = take
        self.reason: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._wakeup = self._wakeup_before = -1

    def ask(self, reason: str) -> None:
        """Ask to stop for a reason of this process's own; one that is there already stays."""
        self.reason = self.reason or reason

    def __enter__(self) -> StopSignal:
        # Python lets no other thread handle signals.
        if self._take and threading.current_thread() is threading.main_thread():
            for number in REQUESTS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
            # A handler waits for the main thread, which may be inside a collective that never ends; a thread does not.
            numbers, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=_end_at_second_interrupt, args=(numbers,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup)
            self._wakeup = -1
        for number, handler in self._previous.items():
            # None: the handler was not set from Python, so it cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None and number == signal.SIGINT:
            _say("Ctrl-C: the update in progress is finished, then saved; again: ends at once, without a save")
        self.reason = signal.Signals(number).name


def time_to_save() -> str:
    """Say, under torchrun, how long after a signal it kills ranks that still save; elsewhere nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    return f" (torchrun kills ranks that have not saved after {seconds} s: TORCH_ELASTIC_SHUTDOWN_TIMEOUT)"


def _end_at_second_interrupt(numbers: int) -> None:
    """Read the number of each signal as it comes, until the pipe is closed."""
    interrupts = 0
    while number := os.read(numbers, 1):
        interrupts += number[0] == signal.SIGINT
        if interrupts == 2:
            _say("Ctrl-C again: ended at once; the checkpoints that were whole are")
            os._exit(INTERRUPT_EXIT_CODE)
    os.close(numbers)


def _say(text: str) -> None:
    """Print, on rank 0, from where other output may be under way."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())
