"""Tokens are read once a step, ahead of need where that is known; what goes wrong in the thread the loop raises."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.read_ahead import CHUNK, TokenReader
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

LENGTH = 16


class Logged(Sequences):
    """Sequences that log who reads what: (name of the thread, numbers)."""

    def __init__(self, corpus: Corpus, split: str = "pool") -> None:
        super().__init__(corpus, split, LENGTH)
        self.log: list[tuple[str, list[int]]] = []
        self.before: Callable[[], None] = lambda: None
        self.entered = 0

    def read(self, ids: object, length: int | None = None) -> np.ndarray:
        self.entered += 1
        self.before()
        self.log.append((threading.current_thread().name, list(ids)))  # type: ignore[call-overload]
        return super().read(ids, length)  # type: ignore[arg-type]

    def numbers(self, thread: str = "") -> list[int]:
        return [number for name, numbers in self.log for number in numbers if name == thread or not thread]


@pytest.fixture
def pool(tiny_corpus: Path) -> Logged:
    return Logged(Corpus.open(tiny_corpus))


@pytest.fixture
def readers() -> Iterator[Callable[..., TokenReader]]:
    """Makes readers, and ends them."""
    made: list[TokenReader] = []

    def make(*args: object, **settings: object) -> TokenReader:
        made.append(TokenReader(*args, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def settled(reader: TokenReader) -> bool:
    """Return whether the thread has nothing to do."""
    with reader._turn:
        return not reader._plans and not reader._pending


def numbers(*found: int) -> np.ndarray:
    return np.array(found)


def test_each_sequence_is_read_once_a_step(pool: Logged, readers: Callable) -> None:
    reader = readers()
    expected = Sequences(pool.corpus, "pool", LENGTH)
    assert torch.equal(reader.tokens(pool, numbers(5, 5)), expected.tokens([5, 5]))  # before any step: nothing is kept
    assert torch.equal(reader.tokens(pool, numbers(5)), expected.tokens([5]))
    pool.log.clear()
    reader.begin(0)
    for ids, length in (((3, 1, 3), 4), ((1, 2), None), ((3,), 16), ((2, 1), 1)):
        found = reader.tokens(pool, np.array(ids), length)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected.tokens(ids, length))
    assert sorted(pool.numbers()) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"length must lie in \[1, 16\], not 17"):
        reader.tokens(pool, numbers(1), 17)
    reader.begin(1)
    reader.tokens(pool, numbers(2))
    assert sorted(pool.numbers()) == [1, 2, 2, 3]


def test_what_is_read_ahead_is_not_waited_for(pool: Logged, readers: Callable) -> None:
    waits = []

    @contextmanager
    def waiting() -> Iterator[None]:
        waits.append(1)
        yield

    reader = readers(waiting)
    other = Logged(pool.corpus, "proxy")
    reader.begin(0)
    reader.tokens(pool, numbers(7, 8))
    reader.ahead(1, lambda: [(pool, numbers(8, 9, 10)), (other, numbers(8))])
    wait_for(lambda: settled(reader))
    reader.begin(1)
    waits.clear()
    found = reader.tokens(pool, numbers(10, 8, 9))
    assert torch.equal(found, Sequences(pool.corpus, "pool", LENGTH).tokens([10, 8, 9]))
    reader.tokens(other, numbers(8))
    assert not waits
    assert pool.numbers("read-ahead") == [9, 10]  # 8 was there
    reader.tokens(pool, numbers(7))
    assert waits == [1]


def test_the_loop_goes_first(pool: Logged, readers: Callable) -> None:
    reader, gate = readers(), threading.Semaphore(0)
    reader.begin(0)
    pool.before = lambda: gate.acquire(timeout=20) and None if threading.current_thread().name == "read-ahead" else None
    many, wanted = np.arange(5 * CHUNK), numbers(5 * CHUNK - 1, 5 * CHUNK + 7)
    reader.ahead(0, lambda: [(pool, many)])
    wait_for(lambda: pool.entered == 1)
    threading.Timer(0.1, gate.release).start()  # the chunk that the thread is at
    reader.tokens(pool, wanted)
    assert len(pool.numbers("read-ahead")) <= CHUNK
    gate.release(5)
    wait_for(lambda: len(set(pool.numbers())) == 5 * CHUNK + 1)
    assert len(pool.numbers()) == 5 * CHUNK + 1


def test_a_plan_that_comes_too_late_is_dropped(
    pool: Logged, readers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may rest on what the step changes; what an earlier plan said goes on."""
    monkeypatch.setattr(TokenReader, "_run", lambda self: None)  # the test does the thread's work
    reader = readers()
    reader.begin(0)
    reader.ahead(1, lambda: [(pool, numbers(1))])
    reader._work()
    reader.ahead(1, lambda: pytest.fail("looked at in step 1"))
    reader.ahead(2, lambda: [(pool, numbers(2))])
    reader.begin(1)
    while reader._plans or reader._pending:
        reader._work()
    assert pool.numbers() == [1, 2]


def cut_off(tiny_corpus: Path, folder: Path) -> tuple[Sequences, Path]:
    """The pool of a corpus whose token file loses its end after it was opened."""
    copy = Path(shutil.copytree(tiny_corpus, folder / "corpus"))
    sequences = Sequences(Corpus.open(copy), "pool", LENGTH)
    os.truncate(copy / "tokens.bin", 100)
    return sequences, copy / "tokens.bin"


def test_a_file_that_is_cut_off_is_named_with_the_step(tiny_corpus: Path, tmp_path: Path, readers: Callable) -> None:
    sequences, path = cut_off(tiny_corpus, tmp_path)
    last = numbers(len(sequences) - 1)
    with pytest.raises(DataError, match=f"^{path}: cut off since it was opened"):
        sequences.tokens(last)
    reader = readers()
    reader.begin(4)
    with pytest.raises(DataError, match=f"^step 4: {path}: cut off"):
        reader.tokens(sequences, last)
    reader.ahead(5, lambda: [(sequences, last)])
    assert reader._thread is not None
    reader._thread.join(20)
    with pytest.raises(DataError, match=f"^step 5: {path}: cut off"):
        reader.begin(5)
    with pytest.raises(DataError, match=r"^step 5: "):  # not just once
        reader.tokens(sequences, numbers(0))


def test_a_file_that_cannot_be_read_is_named(pool: Logged, readers: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    reader = readers()
    reader.begin(2)
    with pytest.raises(DataError, match=r"step 2: .*tokens\.bin: cannot be read .*Input/output error"):
        reader.tokens(pool, numbers(0))


def test_a_plan_that_fails_is_raised_in_the_loop(readers: Callable) -> None:
    reader = readers()
    reader.begin(0)
    reader.ahead(1, lambda: [1 / 0])
    reader._thread.join(20)
    with pytest.raises(ZeroDivisionError) as caught:
        reader.begin(1)
    assert caught.value.__notes__ == ["while reading the tokens of step 1"]


def test_memory_is_bounded(pool: Logged, readers: Callable) -> None:
    row = (LENGTH + 1) * pool.corpus.tokens.itemsize
    reader = readers(most_bytes=3 * row)
    reader.begin(0)
    reader.tokens(pool, numbers(0, 1))
    reader.ahead(1, lambda: [(pool, numbers(4)), (pool, numbers(5)), (pool, numbers(6))])
    wait_for(lambda: settled(reader))
    assert pool.numbers("read-ahead") == [4]
    found = [reader.tokens(pool, numbers(2, 3)) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert pool.numbers("MainThread") == [0, 1, 2, 3, 2, 3]  # no room for these
    reader.begin(1)
    reader.tokens(pool, numbers(4, 5, 6))
    assert pool.numbers("MainThread")[-2:] == [5, 6]


def test_closing_ends_the_thread(pool: Logged, readers: Callable) -> None:
    reader = readers()
    reader.close()  # there is none
    reader = readers()
    reader.ahead(0, list)
    thread = reader._thread
    reader.close()
    assert not thread.is_alive()
    reader.ahead(0, lambda: [(pool, numbers(1))])
    assert pool.numbers() == []
    reader.tokens(pool, numbers(1))
    assert pool.numbers() == [1]


def test_closing_does_not_wait_for_a_disk_that_hangs(
    pool: Logged, readers: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenReader, "patience_s", 0.05)
    reader, gate = readers(), threading.Event()
    pool.before = lambda: gate.wait(20) and None
    reader.ahead(0, lambda: [(pool, numbers(1))])
    wait_for(lambda: pool.entered == 1)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 10
    gate.set()
    reader._thread.join(20)
    assert not reader._thread.is_alive()


def test_batches_are_pinned_for_a_gpu(pool: Logged, readers: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self)
    for pin in (False, True):
        reader = readers(pin=pin)
        reader.begin(0)
        reader.tokens(pool, numbers(1, 2), 4)
    assert pinned == [(2, 5)]


def test_candidates_of_a_stream_are_read_by_its_reader(pool: Logged, readers: Callable) -> None:
    reader = readers()
    stream, plain = CandidateStream(pool, 6, 1, reader=reader), CandidateStream(pool, 6, 1)
    expected = plain.at(2).batch()
    pool.log.clear()
    reader.begin(2)
    for rows in (torch.tensor([4, 0]), torch.arange(6)):
        assert torch.equal(stream.at(2).take(rows).batch(), expected[rows])
    assert sorted(pool.numbers()) == sorted(plain.at(2).sequence_ids)
    assert stream.at(2).reads[0] is pool
    np.testing.assert_array_equal(stream.at(2).reads[1], plain.at(2).sequence_ids)
