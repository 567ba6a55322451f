"""Reports who hangs, and where, when the job makes no progress: one rank speaks for all."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

import torch.distributed as dist

from megaopus.distributed.mesh import Mesh
from megaopus.training.timers import Timers

KEY = "megaopus/progress/{rank}"
ASKED = "megaopus/stacks/{rank}"
"""What the rank that speaks writes: which others are to print their stacks."""
_AT_ONCE = 8
"""Lower ranks that a rank looks at together, to find the one that speaks."""
_NAMED = 32
"""Ranks that have a line each."""
_STACKS = 8
"""Ranks that print their stacks, at most: the first of each place."""
_LOOKS = 4
"""Intervals between two looks at whether a rank is silent."""

Word = dict[str, Any] | None
"""What a rank said last; None: it has said nothing yet."""


class HangWatchdog:
    """Speaks up, in a thread, once the phase of ``timers`` has not changed for ``seconds``.

    Each rank keeps its place in the job's key-value store. Where there is no progress, the first rank that is not
    silent itself prints where the others are, all of one place in a line, and the stacks of its threads; it has the
    first rank of every other place print its own. One that is stopped or gone says nothing any more, and is named.
    Where the store does not answer each rank prints its own. It ends nothing; the time-out of collectives does.
    """

    def __init__(
        self, mesh: Mesh, timers: Timers, seconds: float, stream: TextIO | None = None, store: dist.Store | None = None
    ):
        """``store``: None is the job's own."""
        self._timers = timers
        self._rank, self._ranks = mesh.rank, mesh.shape.world_size
        self._seconds = seconds
        self._interval = min(seconds / 10, 10.0)
        self._stream = stream if stream is not None else sys.stderr
        several = self._ranks > 1
        self._store: Any = store if store or not several else dist.distributed_c10d._get_default_store()
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
        for first in range(0, self._rank, _AT_ONCE):
            looks = self._two_looks(range(first, min(first + _AT_ONCE, self._rank)))
            if self._end.is_set():
                return
            if looks is None:
                self._print_own(idle)
                self._print(f"rank {self._rank}: the job's store does not answer, so the others are not known of")
                return
            speaking = [rank for rank, look in looks.items() if _speaks(look)]
            if speaking:
                self._wait_to_be_asked(speaking[0], looks[speaking[0]][1], idle)
                return
        self._print_own(idle)
        others = [rank for rank in range(self._ranks) if rank != self._rank]
        if others and (looks := self._two_looks(others)) is not None:
            self._tell_of(looks)

    def _print_own(self, idle: float) -> None:
        here = f"rank {self._rank} in {_place(self._timers.phase, self._timers.step)}"
        self._print(f"no progress for {idle:.0f} s: {here}; its stacks:")
        with suppress(Exception):  # a stream without a file cannot have them
            faulthandler.dump_traceback(self._stream, all_threads=True)

    def _two_looks(self, ranks: Iterable[int]) -> Mapping[int, tuple[Word, Word]] | None:
        """Rank -> what it said last, and what some beats later; None: the store does not answer, or this is over."""
        ranks = list(ranks)
        before = self._last_words(ranks)
        if before is None or self._end.wait(_LOOKS * self._interval):
            return None
        now = self._last_words(ranks)
        return None if now is None else {rank: (before[rank], now[rank]) for rank in ranks}

    def _last_words(self, ranks: Sequence[int]) -> dict[int, Word] | None:
        """Rank -> what it said last; None: the store does not answer, which can take for ever."""
        found: dict[int, Word] = {}

        def ask() -> None:
            with suppress(Exception):
                for rank in ranks:
                    key = KEY.format(rank=rank)
                    found[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else None

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * self._interval)
        return dict(found) if len(found) == len(ranks) else None

    def _tell_of(self, looks: Mapping[int, tuple[Word, Word]]) -> None:
        """Say where the others are, and ask the first rank of every place but this one's for its stacks."""
        places: dict[tuple[str, int], list[int]] = {}
        silent = []
        for rank, look in looks.items():
            if _speaks(look) and (now := look[1]) is not None:
                places.setdefault((now["phase"], now["step"]), []).append(rank)
            else:
                silent.append(rank)
        for place, ranks in places.items():
            self._print(f"rank {self._rank} says of {_ranges(ranks)}: {_place(*place)}")
        for rank in silent[:_NAMED]:
            now = looks[rank][1]
            said = "has said nothing yet"
            if now is not None:
                where = f"host {now['host']}, pid {now['pid']}, {_place(now['phase'], now['step'])}"
                said = f"{where}; SILENT: stopped, cut off or gone"
            self._print(f"rank {self._rank} says of rank {rank}: {said}")
        if more := silent[_NAMED:]:
            self._print(f"rank {self._rank} says of {_ranges(more)}: SILENT too")
        own = (self._timers.phase, self._timers.step)
        asked = [ranks[0] for place, ranks in places.items() if place != own][:_STACKS]
        with suppress(Exception):
            self._store.set(ASKED.format(rank=self._rank), json.dumps({"step": self._timers.step, "ranks": asked}))

    def _wait_to_be_asked(self, speaker: int, word: Word, idle: float) -> None:
        """Print this rank's stacks if ``speaker``, which said ``word`` last, asks for them."""
        assert word is not None
        key = ASKED.format(rank=speaker)
        for _ in range(4 * _LOOKS):
            if self._end.wait(self._interval):
                return
            with suppress(Exception):
                asked: dict[str, Any] = json.loads(self._store.get(key)) if self._store.check([key]) else {"step": None}
                if asked["step"] == word["step"]:  # of this hang, and of no earlier one
                    if self._rank in asked["ranks"]:
                        self._print_own(idle)
                    return

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _speaks(look: tuple[Word, Word]) -> bool:
    """Tell whether a rank has said something between two looks."""
    return look[1] is not None and look[0] != look[1]


def _place(phase: str, step: int) -> str:
    return f"phase '{phase}' of update {step}"


def _ranges(ranks: list[int]) -> str:
    """Name ranks in ascending order, runs of them by their ends."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    named = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank {named[0]}" if len(ranks) == 1 else f"ranks {', '.join(named)}"
