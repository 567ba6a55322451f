"""Reads a corpus's tokens, which lie in one file or in several, as if they were one after the other."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megaopus.errors import DataError


class Reader(Protocol):
    """Reads stretches of bytes of a file."""

    def read(self, offsets: np.ndarray, counts: np.ndarray) -> list[bytes]:
        """Read so many bytes at each of the offsets. Raises DataError."""


class TokenFiles:
    """Reads token files, of which each document lies in one; slices and arrays of positions read as of an array."""

    def __init__(
        self,
        places: Sequence[Path | str],
        sizes: Sequence[int],
        dtype: np.dtype,
        remote: Callable[[str, int], Reader] | None = None,
    ):
        """``places``: paths, or addresses that ``remote`` opens by their ``sizes`` (bytes of each)."""
        self.places, self.dtype, self._sizes, self._remote = list(places), dtype, list(sizes), remote
        counts = [size // dtype.itemsize for size in sizes]
        self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def maps(self) -> list[np.ndarray]:
        """Map the files that are of this machine."""
        return [np.memmap(place, self.dtype, "r") for place in self.places if isinstance(place, Path)]

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, at: Any) -> Any:
        """Give the tokens of a slice of positions without a step, of one position, or of an array of them."""
        if isinstance(at, slice):
            start, stop, _ = at.indices(len(self))
            if len(self.maps) < len(self.places):
                firsts = np.clip(self._firsts, start, max(start, stop))
                return self.read(firsts[:-1], np.diff(firsts))
            parts = [
                part[max(0, start - first) : stop - first]
                for part, first, end in zip(self.maps, self._firsts, self._firsts[1:], strict=False)
                if start < end and first < stop
            ]
            return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])
        positions = np.asarray(at)
        if len(self.maps) < len(self.places):
            found = self.read(positions.ravel(), np.ones(positions.size, np.int64)).reshape(positions.shape)
            return found if positions.ndim else found[()]
        which, found = self._which(positions), np.empty(positions.shape, self.dtype)
        for number in np.unique(which):
            here = which == number
            found[here] = self.maps[number][positions[here] - self._firsts[number]]
        return found if positions.ndim else found[()]

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read stretches, each inside one file, by read calls: (sum of ``lengths``,). See ``Corpus.read``."""
        which, size = self._which(starts), self.dtype.itemsize
        offsets = (starts - self._firsts[which]) * size
        if len(self.places) == 1:
            return np.frombuffer(b"".join(self._readers[0].read(offsets, lengths * size)), self.dtype)
        found: list[bytes] = [b""] * len(starts)
        for number in np.unique(which).tolist():
            here = np.flatnonzero(which == number)
            pieces = self._readers[number].read(offsets[here], lengths[here] * size)
            for place, piece in zip(here.tolist(), pieces, strict=True):
                found[place] = piece
        return np.frombuffer(b"".join(found), self.dtype)

    def place_of(self, position: int) -> Path | str:
        """Say which file a token lies in."""
        return self.places[int(self._which(np.array(position)))]

    def _which(self, positions: np.ndarray) -> np.ndarray:
        """Number of the file that each position lies in."""
        return np.searchsorted(self._firsts[1:-1], positions, side="right")

    @cached_property
    def _readers(self) -> list[Reader]:
        return [self._reader(place, size) for place, size in zip(self.places, self._sizes, strict=True)]

    def _reader(self, place: Path | str, size: int) -> Reader:
        if isinstance(place, Path):
            return ByteReader(place)
        assert self._remote is not None
        return self._remote(place, size)


class ByteReader:
    """Reads stretches of bytes of a file that stays open; any thread may call."""

    def __init__(self, path: Path):
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offsets: np.ndarray, counts: np.ndarray) -> list[bytes]:
        """Read so many bytes at each of the offsets, (n,) each.

        Not by a memory map, which would kill the process when the file cannot be read.

        Raises:
            DataError: the file cannot be read, or was cut off after it was opened.
        """
        remedy = "restore the file, the run then goes on"
        try:
            found = [os.pread(self._descriptor, *each) for each in zip(counts.tolist(), offsets.tolist(), strict=True)]
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({error}); {remedy}") from error
        if sum(map(len, found)) != int(counts.sum()):
            raise DataError(f"{self._path}: cut off since it was opened; {remedy}")
        return found
