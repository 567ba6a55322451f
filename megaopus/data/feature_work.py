"""Works text features out in units, which one process does or many tasks do: the same bytes either way.

N-grams are counted first, in a sample of the sequences where there are many; then each sequence is described by these
counts. Results of a unit are a file that appears whole, so work that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from megaopus.data.feature_numbers import (
    FITTED,
    SCALARS,
    SKETCH_DIM,
    Counts,
    Described,
    Tables,
    described,
    fitted,
    moments,
    scalars,
    sketched,
    spread,
    tables_of,
)
from megaopus.data.index import BLOCK
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

JUDGES = 4
"""Of so many documents of the proxy one is kept to judge scores by."""
_UNIT_TOKENS = 1 << 22
"""Of a unit, about: some seconds of work."""
_MOST_UNITS = 1 << 13
"""Of the pool; of more text, units are larger."""
_READ_TOKENS, _CACHED_TOKENS = 1 << 18, 1 << 15
"""That are read, and described, at a time: the latter stay in the processor's cache."""
_MOST_FITTED = 1 << 16
"""Sequences of the proxy that importance is fitted to, at most, where the pool is not counted whole."""
TARGET, POOL = "target", "pool"
_U64 = np.uint64
Again = Callable[[], tuple[Sequences, Sequences]]
"""Opens pool and proxy."""


class Side:
    """Knows of pool or proxy which sequences are counted, and which half each sequence is of."""

    def __init__(self, sequences: Sequences, counted: np.ndarray, kept: Path | None):
        """``counted``: their numbers. ``kept``: where the halves lie of more sequences than memory should hold."""
        self.sequences, self.counted, self._kept = sequences, counted, kept

    def halves_of(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) 0 or 1: the half that each sequence is of, by every other of the documents in which sequences begin."""
        if self._kept is None:
            return self._halves[numbers]
        if not len(self._halves):  # of one document
            return numbers * 2 // len(self.sequences)
        return self._halves[self.sequences.first_document_of(numbers)].astype(np.int64)

    @cached_property
    def _halves(self) -> np.ndarray:
        """By sequence; where they are kept in a file by document."""
        if self._kept is not None:
            return np.load(self._kept, mmap_mode="r")
        found = np.zeros(len(self.sequences), dtype=np.int64)
        found[parts(self.sequences, 2)[1]] = 1
        return found

    def divide(self) -> None:
        """Write the halves to be kept, block by block: in memory there is no more than one."""
        if self._kept is None or self._kept.is_file():
            return
        partial = self._kept.with_name(f"{self._kept.name}.{secrets.token_hex(4)}")
        halves = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(self.sequences.corpus),))
        for first in range(0, len(self.sequences), BLOCK):
            numbers = np.arange(first, min(first + BLOCK, len(self.sequences)))
            halves[self.sequences.first_document_of(numbers)] = 1
        found = 0
        for first in range(0, len(halves), BLOCK):
            ranks = found + np.cumsum(halves[first : first + BLOCK], dtype=np.int64)
            halves[first : first + BLOCK] = (ranks - 1) & 1
            found = int(ranks[-1])
        halves.flush()
        if found < 2:
            with partial.open("wb") as stream:
                np.save(stream, np.empty(0, dtype=np.uint8))
        partial.replace(self._kept)


def parts(sequences: Sequences, count: int) -> list[np.ndarray]:
    """The numbers of the sequences of each part: those that begin in every ``count``-th document."""
    numbers = np.arange(len(sequences))
    found, places = np.unique(sequences.first_document_of(numbers), return_inverse=True)
    part = places % count if len(found) >= count else numbers * count // len(numbers)
    return [np.flatnonzero(part == each) for each in range(count)]


class Sides:
    """Holds pool and proxy; sent to another process, it opens them again there."""

    def __init__(self, pool: Sequences, proxy: Sequences, sample: int, again: Again, folder: Path):
        """``sample``: most sequences of the pool that are counted; ``folder``: of what is kept in files where there are
        more.
        """
        self._keys, self._sample, self._again, self._folder = (pool.key, proxy.key), sample, again, folder
        self._opened: dict[str, Side] = self._sides(pool, proxy)

    def _sides(self, pool: Sequences, proxy: Sequences) -> dict[str, Side]:
        counted = {POOL: spread(len(pool), self._sample), TARGET: np.arange(len(proxy))}
        return {name: self._side(name, each, counted[name]) for name, each in ((POOL, pool), (TARGET, proxy))}

    def _side(self, name: str, sequences: Sequences, counted: np.ndarray) -> Side:
        large = len(sequences) > self._sample
        return Side(sequences, counted, self._folder / f"halves-{name}.npy" if large else None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def __getitem__(self, name: str) -> Side:
        """POOL or TARGET. Raises DataError if it is not what it was."""
        if not self._opened:
            pool, proxy = self._again()
            if (pool.key, proxy.key) != self._keys:
                raise DataError(f"{pool.corpus.path}: changed while its text features were worked out; start again")
            self._opened = self._sides(pool, proxy)
        return self._opened[name]


class Span(NamedTuple):
    """Names a unit's sequences: some that follow each other in the list of those that are counted, or described."""

    side: str
    first: int
    end: int


@dataclass(frozen=True)
class Order:
    """Says what is to be worked out, and where units leave it."""

    folder: Path
    sides: Sides
    numbers: bool
    """Whether sequences of the pool are described by numbers and signatures."""
    ngrams: bool
    """Whether they are described by their n-grams."""
    judges: bool
    """Whether all sequences of the proxy are described; else as many as importance is fitted to, if it is."""

    @property
    def sampled(self) -> bool:
        """Tell whether some of the pool's sequences are not counted."""
        return len(self.sides[POOL].counted) < len(self.sides[POOL].sequences)

    @property
    def sources(self) -> tuple[str, ...]:
        """Name what is counted."""
        return (TARGET, POOL) if self.numbers or self.judges else (POOL,)

    def fitted(self) -> np.ndarray:
        """Numbers of the proxy's sequences that importance is fitted to: of each half in turn."""
        side = self.sides[TARGET]
        chosen = spread(len(side.sequences), _MOST_FITTED) if self.sampled else side.counted
        halves = side.halves_of(chosen)
        return np.concatenate([chosen[halves == half] for half in (0, 1)])

    def proxies(self) -> np.ndarray:
        """Numbers of the proxy's sequences that are described, ascending."""
        if self.judges:
            return np.arange(len(self.sides[TARGET].sequences))
        return np.sort(self.fitted()) if self.numbers else np.empty(0, dtype=np.int64)

    def counting(self) -> CountNgrams:
        """Return the first stage."""
        spans = [span for side in self.sources for span in self._spans(side, len(self.sides[side].counted))]
        return CountNgrams(self, tuple(spans))

    def describing(self) -> Describe:
        """Return the second stage, after the tables are made."""
        pool = self._spans(POOL, len(self.sides[POOL].sequences))
        return Describe(self, (*self._spans(TARGET, len(self.proxies())), *pool))

    def _spans(self, side: str, count: int) -> Iterator[Span]:
        """Divide so many sequences: it depends on their number and length alone."""
        size = max(1, _UNIT_TOKENS // self.sides[side].sequences.seq_len, -(-count // _MOST_UNITS))
        return (Span(side, first, min(first + size, count)) for first in range(0, count, size))

    @property
    def tables(self) -> Path:
        """Name the file of the counts' logarithms."""
        return self.folder / "tables.npz"


@dataclass(frozen=True)
class _Units:
    """Holds the units of a stage, whose results are files of one folder."""

    order: Order
    spans: tuple[Span, ...]

    name: ClassVar[str]
    _results: ClassVar[str]
    """What the names of their files begin with."""

    def numbers(self) -> Sequence[int]:
        """All of them."""
        return range(len(self.spans))

    @property
    def folder(self) -> Path:
        """Of the results."""
        return self.order.folder

    def result(self, number: int) -> Path:
        """Name the file of a unit's results."""
        return self.folder / f"{self._results}-{number:06d}.npz"

    def done(self, number: int) -> bool:
        """Tell whether it is there."""
        return self.result(number).is_file()


class CountNgrams(_Units):
    """Counts n-grams."""

    name, _results = "counting n-grams", "counted"

    def work(self, number: int) -> Mapping[str, int]:
        """Count. Raises DataError if tokens cannot be read."""
        side, first, end = self.spans[number]
        held, counts = self.order.sides[side], Counts.none()
        present = self.order.ngrams and side == POOL
        for rows, tokens in _chunks(held.sequences, held.counted[first:end]):
            counts.add(tokens, held.halves_of(rows), present)
        _save(self.result(number), counts._asdict())
        return {"sequences": end - first}

    def finish(self) -> None:
        """Put the counts together to tables."""
        counts = {side: Counts.none() for side in (TARGET, POOL)}
        for number, (side, _, _) in enumerate(self.spans):
            with np.load(self.result(number)) as held:
                for name, total in counts[side]._asdict().items():
                    total += held[name]
        tables = tables_of(counts[TARGET], counts[POOL], len(self.order.sides[POOL].counted))
        _save(self.order.tables, tables._asdict())


class Describe(_Units):
    """Describes sequences by what was counted."""

    name, _results = "describing sequences", "described"

    def work(self, number: int) -> Mapping[str, int]:
        """Describe. Raises DataError if tokens cannot be read."""
        side, first, end = self.spans[number]
        held = self.order.sides[side]
        numbers = np.arange(first, end) if side == POOL else self.order.proxies()[first:end]
        found: dict[str, list[np.ndarray]] = {}
        for rows, tokens in _chunks(held.sequences, numbers):
            for name, part in self._described(side, tokens, held.halves_of(rows)):
                found.setdefault(name, []).append(part)
        _save(self.result(number), {name: np.concatenate(each) for name, each in found.items()})
        return {"sequences": end - first}

    def _described(self, side: str, tokens: np.ndarray, halves: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if side == TARGET:
            yield "scalars", scalars(tokens, halves, self._tables)
            return
        if self.order.numbers:
            yield from described(tokens, halves, self._tables)._asdict().items()
        if self.order.ngrams:
            yield "sketch", sketched(tokens, self._tables.idf).astype("<f2")

    @cached_property
    def _tables(self) -> Tables:
        with np.load(self.order.tables) as held:
            return Tables(*(held[name] for name in Tables._fields))

    def _results_of(self, side: str) -> Iterator[tuple[slice, Any]]:
        for number, span in enumerate(self.spans):
            if span.side == side:
                with np.load(self.result(number)) as held:
                    yield slice(span.first, span.end), held

    def proxies(self) -> np.ndarray:
        """Put together what describes ``Order.proxies``: (n, SCALARS) float32."""
        found = np.empty((len(self.order.proxies()), SCALARS), dtype=np.float32)
        for rows, held in self._results_of(TARGET):
            found[rows] = held["scalars"]
        return found

    def write(self, folder: Path, names: Sequence[str]) -> None:
        """Put together what describes the pool, in files of ``COLUMNS`` of these names."""
        out = {}
        for name in names:
            shape, dtype = COLUMNS[name]
            shape = (len(self.order.sides[POOL].sequences), *shape)
            out[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for rows, held in self._results_of(POOL):
            for name, array in out.items():
                array[rows] = held[name]
        for array in out.values():
            array.flush()


COLUMNS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "scalars": ((SCALARS,), "<f4"),
    "log_odds": ((), "<f4"),
    "exact": ((), "<i8"),
    "near": ((), "<i8"),
    "sketch": ((SKETCH_DIM,), "<f2"),
}
"""What describes each sequence of the pool -> shape and type of a row."""
NUMBERS = Described._fields

Hands = Callable[[CountNgrams | Describe, Callable[[int], None]], None]
"""Does all units of a stage that are not done yet, and calls with numbers of units that are."""
Line = Callable[[str, int], Callable[[int], None]]
"""(name, units) -> what is called with numbers of units that are done."""


def here(units: CountNgrams | Describe, advance: Callable[[int], None]) -> None:
    """Do them in this process, one after the other."""
    for number in units.numbers():
        if not units.done(number):
            units.work(number)
        advance(1)


def work_out(order: Order, hands: Hands, line: Line) -> Describe:
    """Do what is ordered. Returns the stage whose results are to be written."""
    order.folder.mkdir(parents=True, exist_ok=True)
    for name in order.sources:
        order.sides[name].divide()
    counting = order.counting()
    if not order.tables.is_file():
        hands(counting, line(counting.name, len(counting.spans)))
        counting.finish()
    describing = order.describing()
    hands(describing, line(describing.name, len(describing.spans)))
    return describing


def plan_of(pool: Sequences, proxy: Sequences, sample: int, *parts: bool) -> str:
    """Return what work that goes on from other work's units has in common with it; ``parts``: what is asked for."""
    return json.dumps([pool.key, proxy.key, sample, *parts, _UNIT_TOKENS, _MOST_UNITS])


def unit_folder(work: Path, plan: str) -> Path:
    """Name the folder of the units' files, another for each plan: jobs of an earlier one may still run somewhere."""
    return work.absolute() / f"units-{hashlib.sha256(plan.encode()).hexdigest()[:12]}"


def write_numbers(describing: Describe, folder: Path) -> None:
    """Write the numbers of the pool's sequences, and what importance is by these.

    The means and deviations that a sample gives are kept; those of a whole pool follow from its numbers.
    """
    order = describing.order
    names = [*NUMBERS, "sketch"] if order.ngrams else NUMBERS
    describing.write(folder, names)
    pool = np.load(folder / "scalars.npy", mmap_mode="r")
    some = pool[spread(len(pool), FITTED)]
    seen = moments(some if order.sampled else pool)
    wanted = describing.proxies()[np.searchsorted(order.proxies(), order.fitted())]
    np.save(folder / "importance.npy", fitted(some, wanted, seen))
    if order.sampled:
        np.save(folder / "moments.npy", seen)


def write_proxies(describing: Describe, folder: Path) -> None:
    """Write the numbers of the proxy's sequences, and which of them judge."""
    found = describing.proxies()
    judges = np.zeros((len(found), 1), dtype=np.float32)
    judges[parts(describing.order.sides[TARGET].sequences, JUDGES)[-1]] = 1
    np.save(folder / "proxy.npy", np.concatenate([found, judges], axis=1))


def _chunks(sequences: Sequences, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of the sequences ``numbers``: (their numbers (c,), tokens (c, seq_len + 1) uint64)."""
    read, cached = (max(1, tokens // sequences.seq_len) for tokens in (_READ_TOKENS, _CACHED_TOKENS))
    for start in range(0, len(numbers), read):
        rows = numbers[start : start + read]
        tokens = sequences.tokens(rows).numpy().astype(_U64)
        for first in range(0, len(rows), cached):
            yield rows[first : first + cached], tokens[first : first + cached]


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays; the file appears under ``path`` when it is whole."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
    partial.replace(path)
