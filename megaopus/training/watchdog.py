"""Reports from every rank who hangs, and where, when the job makes no progress."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
from contextlib import suppress
from typing import Any, TextIO

import torch.distributed as dist

from megaopus.distributed.mesh import Mesh
from megaopus.training.timers import Timers

KEY = "megaopus/progress/{rank}"


class HangWatchdog:
    """Speaks up, in a thread, once the phase of ``timers`` has not changed for ``seconds``.

    Each rank keeps its phase in the job's key-value store. A rank that sees no
    progress prints its own phase and the stack of each of its threads, and what the others said last: one that is
    stopped or gone says nothing any more, and is named by the rest. It ends nothing; the time-out of collectives does.
    """

    def __init__(self, mesh: Mesh, timers: Timers, seconds: float, stream: TextIO | None = None):
        self._timers = timers
        self._rank, self._ranks = mesh.rank, mesh.shape.world_size
        self._seconds = seconds
        self._interval = min(seconds / 10, 10.0)
        self._stream = stream if stream is not None else sys.stderr
        self._store: Any = dist.distributed_c10d._get_default_store() if self._ranks > 1 else None
        self._told = -1
        """Changes of phase at which it spoke last."""
        self._end = threading.Event()
        # Two threads: where the rank that keeps the store is stopped, telling it anything waits.
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._run, self._tell)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads."""
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            changes, idle = self._timers.changes, self._timers.clock() - self._timers.since
            if idle >= self._seconds and changes != self._told:
                self._told = changes
                self._report(idle)

    def _tell(self) -> None:
        beat = 0
        while self._store is not None:
            place = {"host": socket.gethostname(), "pid": os.getpid()}
            place |= {"phase": self._timers.phase, "step": self._timers.step}
            with suppress(Exception):  # the rank that keeps the store may be the one that is gone
                self._store.set(KEY.format(rank=self._rank), json.dumps(place | {"beat": beat}))
            beat += 1
            if self._end.wait(self._interval):
                return

    def _report(self, idle: float) -> None:
        here = f"rank {self._rank} in phase '{self._timers.phase}' of update {self._timers.step}"
        print(f"no progress for {idle:.0f} s: {here}; its stacks:", file=self._stream, flush=True)
        with suppress(Exception):  # a stream without a file cannot have them
            faulthandler.dump_traceback(self._stream, all_threads=True)
        others = [rank for rank in range(self._ranks) if rank != self._rank]
        before = {rank: self._last_word(rank) for rank in others}
        if self._end.wait(3 * self._interval):
            return
        for rank in others:
            words = _words(before[rank], self._last_word(rank))
            print(f"rank {self._rank} says of rank {rank}: {words}", file=self._stream, flush=True)

    def _last_word(self, rank: int) -> dict[str, Any] | str:
        key = KEY.format(rank=rank)
        try:
            return json.loads(self._store.get(key)) if self._store.check([key]) else "has said nothing yet"
        except Exception as error:
            return f"the job's store does not answer ({type(error).__name__})"


def _words(before: dict[str, Any] | str, now: dict[str, Any] | str) -> str:
    if isinstance(now, str):
        return now
    place = f"host {now['host']}, pid {now['pid']}, phase '{now['phase']}' of update {now['step']}"
    return f"{place}; SILENT: stopped, cut off or gone" if before == now else place
