"""Reads tokens once a step, in a thread ahead of the loop where it is known what the loop will ask for."""

from __future__ import annotations

import threading
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megaopus.data.sequences import Sequences
from megaopus.errors import DataError, StoreDownError

MOST_BYTES = 256 << 20
"""Tokens kept for a step and the next one, in the type that they have on disk."""
CHUNK = 16
"""Sequences that the thread reads before it looks whether the loop waits."""

Reads = tuple[Sequences, np.ndarray]
"""(where the tokens come from, numbers of the sequences there (n,) int64)."""
Plan = Callable[[], Iterable[Reads]]


class TokenReader:
    """Keeps the sequences that a step has read, and reads those of the next one while the model trains.

    A sequence is read from disk at most once a step, whole, also where it is scored and trained on. What the loop asks
    for and is not there yet it reads itself, before the thread goes on with anything else; so a plan is a hint, and
    whatever it says the same tokens come out. What the thread meets (a file that is cut off) the loop raises.

    Public methods are for the loop's thread alone.
    """

    patience_s = 1.0
    """Seconds for which ``close`` waits for a read that goes on."""

    def __init__(
        self,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        pin: bool = False,
        most_bytes: int = MOST_BYTES,
    ):
        """Start no thread yet.

        Args:
            waiting: a context around each wait for tokens, for a clock.
            pin: hand batches out in page-locked memory, from which a GPU copies them while the loop goes on.
            most_bytes: beyond this nothing is read ahead, and what the loop reads is not kept.
        """
        self._waiting, self._pin, self._most_bytes = waiting, pin, most_bytes
        self._step: int | None = None
        self._kept: dict[int, dict[Sequences, dict[int, np.ndarray]]] = {}
        self._bytes: dict[int, int] = {}
        self._plans: dict[int, deque[Plan]] = {}
        self._pending: dict[int, deque[Reads]] = {}
        self._turn = threading.Lock()
        """Who holds it reads, plans or forgets, the thread or the loop: for as long as a read takes."""
        self._queue = threading.Condition()
        """Who holds it, for moments only, changes ``_plans`` and ``_pending``. Taken after ``_turn``."""
        self._loop_waits = self._closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Go on to ``step``: what was read ahead for it is kept, what earlier steps read is forgotten.

        A plan for it that the thread has not looked at yet is dropped, as it may rest on what the step changes. Raises
        what the thread met.
        """
        with self._loops_turn(), self._queue:
            self._step = step
            for by_step in (self._kept, self._bytes, self._pending, self._plans):
                for old in [each for each in by_step if each < step or (each == step and by_step is self._plans)]:
                    del by_step[old]

    def ahead(self, step: int, plan: Plan) -> None:
        """Read what ``plan`` says, in the thread, for this step or the next; the thread calls it too. Never waits."""
        if self._closed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
            self._thread.start()
        with self._queue:
            self._plans.setdefault(step, deque()).append(plan)
            self._queue.notify()

    def tokens(self, sequences: Sequences, numbers: np.ndarray, length: int | None = None) -> Tensor:
        """Give what ``Sequences.read`` gives, as (n, length + 1) int64.

        Raises DataError, which names the step and the file, where it cannot be read.
        """
        width, wanted = sequences.width(length), numbers.tolist()
        rows: Mapping[int, np.ndarray] = self._rows(self._step, sequences)
        missing = [number for number in wanted if number not in rows]
        if missing or self._error is not None:
            with self._waiting(), self._loops_turn(), _named(self._step):
                found = self._read(self._step, sequences, missing)
            rows = ChainMap(found, self._rows(self._step, sequences))
        batch = np.empty((len(wanted), width), dtype=np.int64)
        for row, number in zip(batch, wanted, strict=True):
            row[:] = rows[number][:width]
        tokens = torch.from_numpy(batch)
        return tokens.pin_memory() if self._pin else tokens

    def close(self) -> None:
        """End the thread; one that hangs in a read is left behind, and ends with the process."""
        self._closed = True
        if self._thread is None:
            return
        with self._queue:
            self._queue.notify()
        self._thread.join(timeout=self.patience_s)

    # -- whoever's turn it is ----------------------------------------------------------------------------------------

    @contextmanager
    def _loops_turn(self) -> Iterator[None]:
        self._loop_waits = True
        with self._turn:
            self._loop_waits = False
            if self._error is not None:
                raise self._error
            yield
        with self._queue:
            self._queue.notify()

    def _rows(self, step: int | None, sequences: Sequences) -> dict[int, np.ndarray]:
        return self._kept.get(-1 if step is None else step, {}).get(sequences, {})

    def _read(self, step: int | None, sequences: Sequences, numbers: Iterable[int]) -> dict[int, np.ndarray]:
        """Those of ``numbers`` that are not there yet, and keep them if there is room."""
        rows = self._rows(step, sequences)
        missing = [number for number in dict.fromkeys(numbers) if number not in rows]
        if not missing:
            return {}
        found = dict(zip(missing, sequences.read(missing), strict=True))
        self._keep(step, sequences, found)
        return found

    def _keep(self, step: int | None, sequences: Sequences, found: dict[int, np.ndarray]) -> None:
        size = sum(row.nbytes for row in found.values())
        if step is not None and self._room(size):
            self._bytes[step] = self._bytes.get(step, 0) + size
            self._kept.setdefault(step, {}).setdefault(sequences, {}).update(found)

    def _room(self, size: int) -> bool:
        return sum(self._bytes.values()) + size <= self._most_bytes

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._queue:
                while not self._closed and (self._loop_waits or not (self._plans or self._pending)):
                    self._queue.wait()
            if self._closed:
                return
            with self._turn:
                try:
                    self._work()
                except StoreDownError:  # what is not there the loop reads itself, and meets what there is to meet
                    with self._queue:
                        self._plans.clear()
                        self._pending.clear()
                except BaseException as error:
                    self._error = error
                    return

    def _work(self) -> None:
        """Look at one plan, or read one chunk of what the plans said: of the earliest step that has any."""
        with self._queue:
            step = min((*self._plans, *self._pending), default=None)
            plan = None if step is None else _pop(self._plans, step)
            chunk = None if step is None or plan else _pop(self._pending, step)
        with _named(step):
            if step is not None and plan is not None:
                found = [(sequences, part) for sequences, numbers in plan() for part in _chunks(numbers)]
                with self._queue:
                    if found:
                        self._pending.setdefault(step, deque()).extend(found)
            if step is not None and chunk is not None:
                self._read_chunk(step, *chunk)

    def _read_chunk(self, step: int, sequences: Sequences, chunk: np.ndarray) -> None:
        numbers, now = chunk.tolist(), self._rows(self._step, sequences)
        again = {number: now[number] for number in numbers if number in now} if step != self._step else {}
        self._keep(step, sequences, again)
        missing = [number for number in numbers if number not in again]
        if self._room(len(missing) * sequences.width() * sequences.dtype.itemsize):
            self._read(step, sequences, missing)
        else:
            with self._queue:
                self._pending.pop(step, None)


T = TypeVar("T")


def _pop(queues: dict[int, deque[T]], step: int) -> T | None:
    """Take the first of a step's queue, which goes when it is empty."""
    queue = queues.get(step)
    if queue is None:
        return None
    first = queue.popleft()
    if not queue:
        del queues[step]
    return first


def _chunks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    return (numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK))


@contextmanager
def _named(step: int | None) -> Iterator[None]:
    """Say in which step an error came up."""
    try:
        yield
    except DataError as error:
        raise error if step is None else type(error)(f"step {step}: {error}") from error
    except Exception as error:
        error.add_note(f"while reading the tokens of step {step}")
        raise
