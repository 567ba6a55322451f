"""Keeps the processes of this machine that do tasks, from one stage of the work to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from megaopus.corpus_tools.workers import worker_pool


class Workers:
    """Starts processes when they are first needed, which end with the block."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, calls: Sequence[Callable[[], None]], count: int) -> None:
        """Make the calls, ``count`` at a time: the same number every time. Raises what the first of them raises.

        Raises BrokenProcessPool if a process died; then there are new ones the next time.
        """
        self._pool = self._pool or worker_pool(count, _one_thread)
        try:
            futures = [self._pool.submit(call) for call in calls]
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool:
            self._end()
            raise
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _one_thread() -> None:
    """Let tokenizers use one thread, for every process has a core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
