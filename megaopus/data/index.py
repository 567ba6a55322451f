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
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or header[:9] != _MAGIC:
        raise DataError(f"{path}: not a Megatron index (wrong first bytes {header[:9]!r}); copy or prepare it again")
    version, dtype = int.from_bytes(header[9:17], "little"), _DTYPES.get(header[17])
    documents, ends = int.from_bytes(header[18:26], "little"), int.from_bytes(header[26:34], "little")
    if version != 1 or dtype is None:
        raise DataError(f"{path}: version {version}, dtype code {header[17]} are not read here; prepare it again")
    if ends != documents + 1 or path.stat().st_size != _HEADER_BYTES + 12 * documents + 8 * ends:
        size = path.stat().st_size
        raise DataError(f"{path}: {size:,} bytes do not fit {documents:,} documents; copy or prepare it again")
    if not documents:
        return Index(dtype, np.empty(0, "<i4"), np.empty(0, "<i8"))
    lengths = np.memmap(path, "<i4", "r", _HEADER_BYTES, (documents,))
    offsets = np.memmap(path, "<i8", "r", _HEADER_BYTES + 4 * documents, (documents,))
    return Index(dtype, lengths, offsets)


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


def count_tokens(index: Index) -> int:
    """Count the tokens of all documents."""
    return int(index.offsets[-1]) // index.dtype.itemsize + int(index.lengths[-1]) if len(index.lengths) else 0
