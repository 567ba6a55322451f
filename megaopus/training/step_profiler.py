"""Records what a span of steps spends its time on, with torch.profiler."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"


class StepProfiler:
    """Records the steps from the first to the last of ``span``, and writes them as a Chrome trace of this rank."""

    def __init__(self, span: Sequence[int], run_dir: Path, rank: int):
        """``span``: first and last step; empty: none is recorded."""
        self._first, self._last = span or (-1, -1)
        self.path = run_dir / FOLDER / f"rank_{rank}.json"
        self._recording: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Make step ``number`` inside; the trace is written with the last of the span."""
        if number == self._first:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._recording = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._recording.start()
        try:
            yield
        finally:
            if number == self._last:
                self.close()

    def close(self) -> None:
        """Write what was recorded, also of a span that was cut off."""
        if self._recording is not None:
            self._recording.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            self._recording.export_chrome_trace(str(partial))
            os.replace(partial, self.path)
            self._recording = None
