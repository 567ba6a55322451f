"""Writes a checkpoint's weights, beside the training if asked to.

megatron-core writes through forked workers and a manager process. A signal meant for the job reaches those too (Slurm
and shells signal whole process groups): the manager dies, and with it the very save that SIGTERM asked for. Forking a
process with threads and a CUDA context is fragile as well, and a killed job leaves its manager behind. So the training
process writes itself, in a thread if it is to go on meanwhile: a thread gets no signals and ends with its process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException


class PendingSave:
    """Writes weights to disk in two phases: ``write`` this rank's files, then ``commit`` once every rank has written.

    ``write`` returns the files and may run in a thread; ``commit``, collective, writes what is left and returns this
    rank's files of it.
    """

    def __init__(self, write: Callable[[], list[Path]], commit: Callable[[], list[Path]]):
        self._write, self._commit = write, commit
        self._on_file_written: Callable[[Path], Any] = lambda path: None
        self._thread: threading.Thread | None = None
        self._found: dict[Path, Any] = {}
        self._error: BaseException | None = None

    def start(self, on_file_written: Callable[[Path], Any], background: bool) -> None:
        """Write; ``on_file_written`` sees each file after it is written.

        ``background``: in a thread, and this returns at once.
        """
        self._on_file_written = on_file_written
        if not background:
            self._run()
            return
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = {path: self._on_file_written(path) for path in self._write()}
        except (Exception, CheckpointException) as error:  # torch's own is no Exception
            self._error = error

    def done(self) -> bool:
        """Return whether this rank has written its part."""
        return self._thread is None or not self._thread.is_alive()

    def error(self) -> BaseException | None:
        """Wait for this rank's part; what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
        return self._error

    def commit(self) -> dict[Path, Any]:
        """End the save; what ``on_file_written`` said of each of this rank's files. Collective, if no rank failed."""
        return self._found | {path: self._on_file_written(path) for path in self._commit()}
