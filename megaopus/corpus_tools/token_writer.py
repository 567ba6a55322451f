"""Writes tokens into one file, or into several of whole documents where they are many."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megaopus.data.corpus import TOKENS

FILE_TOKENS = 1 << 33
"""Of a token file: 17 GB where a token takes two bytes."""


class TokenWriter:
    """Fills token files in a folder, ``most`` tokens each at most; a longer document has one of its own.

    Where a file ends depends on the documents alone. Use as a context.
    """

    def __init__(self, folder: Path, most: int):
        self._folder, self._most = folder, most
        self._file: BinaryIO | None = None
        self._held = 0
        self.names: list[str] = []
        """Of the files; when all is written a single one is ``tokens.bin``."""

    def __enter__(self) -> TokenWriter:
        self._begin()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end()
        if len(self.names) == 1:
            (self._folder / self.names[0]).rename(self._folder / TOKENS)
            self.names = [TOKENS]

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents, ``lengths`` (D,) tokens each."""
        ends, first, begin = np.cumsum(lengths, dtype=np.int64), 0, 0
        while first < len(lengths):
            room = self._most - self._held
            last = int(np.searchsorted(ends, begin + room, side="right"))
            if last == first:
                if self._held:
                    self._end()
                    self._begin()
                    continue
                last = first + 1
            end = int(ends[last - 1])
            assert self._file is not None
            tokens[begin:end].tofile(self._file)
            self._held += end - begin
            first, begin = last, end

    def _begin(self) -> None:
        self.names.append(f"tokens-{len(self.names):05d}.bin")
        self._file, self._held = (self._folder / self.names[-1]).open("wb"), 0

    def _end(self) -> None:
        assert self._file is not None
        self._file.close()
