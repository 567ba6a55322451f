"""Reads and writes Megatron's index of a token file: how long each document is, and where it begins.

The file (megatron.core.datasets.indexed_dataset): magic, version (u64), dtype code (u8), sequences (u64), document ends
(u64), then the arrays lengths (i32), byte offsets (i64), document ends (i64).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megaopus.errors import DataError

BLOCK = 1 << 20
"""Documents that are looked at together: little memory beside what is mapped."""
LARGE = 1 << 20
"""Documents of a corpus from which on nothing is done for each of them whenever it is opened."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}


class Index(NamedTuple):
    """Maps the index of D documents: its pages are the file's, shared by all processes of a machine."""

    dtype: np.dtype
    """Of a token in the token file."""
    lengths: np.ndarray
    """(D,) int32, tokens of each document."""
    offsets: np.ndarray
    """(D,) int64, byte in the token file where each begins."""


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the index of documents of ``lengths`` (D,) tokens of ``dtype``, each a sequence of its own."""
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    with path.open("wb") as stream:
        stream.write(_MAGIC + (1).to_bytes(8, "little") + bytes([code]))
        stream.write(len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little"))
        for array in (lengths.astype("<i4"), offsets.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")):
            array.tofile(stream)


def map_index(path: Path) -> Index:
    """Map an index of documents that are each one sequence.

    Not by Megatron's reader, whose arrays point into a mapping that it unmaps when it is deleted.

    Raises:
        DataError: it is none, or is cut off.
    """
    header = _header(path)
    dtype, documents = header.dtype, header.sequences
    if header.ends != documents + 1 or path.stat().st_size != header.size:
        size = path.stat().st_size
        raise DataError(f"{path}: {size:,} bytes do not fit {documents:,} documents; copy or prepare it again")
    if not documents:
        return Index(dtype, np.empty(0, "<i4"), np.empty(0, "<i8"))
    lengths = np.memmap(path, "<i4", "r", _HEADER_BYTES, (documents,))
    offsets = np.memmap(path, "<i8", "r", _HEADER_BYTES + 4 * documents, (documents,))
    return Index(dtype, lengths, offsets)


class _Header(NamedTuple):
    """Says what an index has."""

    dtype: np.dtype
    sequences: int
    ends: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _HEADER_BYTES + 12 * self.sequences + 8 * self.ends


def _header(path: Path) -> _Header:
    """Read the beginning of an index. Raises DataError if it is none."""
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or header[:9] != _MAGIC:
        raise DataError(f"{path}: not a Megatron index (wrong first bytes {header[:9]!r}); copy or prepare it again")
    version, dtype = int.from_bytes(header[9:17], "little"), _DTYPES.get(header[17])
    if version != 1 or dtype is None:
        raise DataError(f"{path}: version {version}, dtype code {header[17]} are not read here; prepare it again")
    return _Header(dtype, int.from_bytes(header[18:26], "little"), int.from_bytes(header[26:34], "little"))


def check_index(path: Path, index: Index) -> None:
    """Raise DataError unless each document begins where the one before it ends. ``path``: where the index lies."""
    begin = 0
    for first in range(0, len(index.lengths), BLOCK):
        lengths = index.lengths[first : first + BLOCK].astype(np.int64)
        starts = begin + (np.cumsum(lengths) - lengths) * index.dtype.itemsize
        wrong = np.flatnonzero((index.offsets[first : first + BLOCK] != starts) | (lengths < 0))
        if len(wrong):
            number = first + int(wrong[0])
            raise DataError(
                f"{path}: document {number:,} does not begin where the one before it ends; copy or prepare it again"
            )
        begin = int(starts[-1] + lengths[-1] * index.dtype.itemsize)


def documents_of(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Read the index of a token file of somebody else's: (the tokens' type, (D,) int64 tokens of each document).

    A document may be of several of Megatron's sequences, as sentences are.

    Raises:
        DataError: it is none, or what it lists does not lie one after the other from the file's beginning.
    """
    header = _header(path)
    if header.size != path.stat().st_size:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes, {header.size:,} by its own counts; copy it again")
    arrays = np.memmap(path, np.uint8, "r", _HEADER_BYTES)
    lengths, offsets, ends = (
        arrays[first:last].view(kind)
        for first, last, kind in (
            (0, 4 * header.sequences, "<i4"),
            (4 * header.sequences, 12 * header.sequences, "<i8"),
            (12 * header.sequences, 12 * header.sequences + 8 * header.ends, "<i8"),
        )
    )
    check_index(path, Index(header.dtype, lengths, offsets))
    places = np.asarray(ends)
    if not len(places) or places[0] or places[-1] != header.sequences or (np.diff(places) < 0).any():
        raise DataError(f"{path}: its documents do not cover its {header.sequences:,} sequences; copy it again")
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    found = np.diff(before[places])
    return header.dtype, found[found > 0]


def count_tokens(index: Index) -> int:
    """Count the tokens of all documents."""
    return int(index.offsets[-1]) // index.dtype.itemsize + int(index.lengths[-1]) if len(index.lengths) else 0
