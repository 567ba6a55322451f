"""Divides sources into pieces that can be read apart: parts of large files, and small files together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megaopus.corpus_tools.sources import Source, Stretch, reader_of

PIECE_BYTES = 32 << 20
"""Of the files as stored, about: some seconds of work."""
_MOST_PIECES = 1 << 13
"""About: of more text, pieces are larger. Small files beyond this number are pieces together."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Names what of a source is read at once: some of its files, or a part of one, or all that a prefix names."""

    source: int
    """Its number."""
    stretches: tuple[Stretch, ...]
    """Empty: all of a source that is no file."""

    @property
    def uncounted(self) -> bool:
        """Tell whether its lines must be counted before those of the same file's later parts have numbers."""
        return any(each.part is not None and reader_of(each.path).count is not None for each in self.stretches)

    def after(self, lines: int) -> Piece:
        """Return the same piece, a part of a file, with so many of the file's lines before it."""
        (only,) = self.stretches
        assert only.part is not None
        return replace(self, stretches=(only._replace(part=only.part._replace(before=lines)),))


def pieces_of(sources: Sequence[Source]) -> list[Piece]:
    """Divide the sources, in reading order. It depends on them alone. Raises DataError as ``Source.files`` does."""
    size = max(PIECE_BYTES, sum(source.size() for source in sources) // _MOST_PIECES)
    return [piece for number, source in enumerate(sources) for piece in _pieces(number, source, size)]


def _pieces(number: int, source: Source, size: int) -> Iterator[Piece]:
    if source.by_prefix is not None:
        yield Piece(number, ())
        return
    waiting: list[Stretch] = []
    held = 0
    for name, path in source.files():
        divide, there = reader_of(path).divide, path.stat().st_size
        parts = divide(path, size) if divide is not None and there > size else []
        if waiting and (len(parts) > 1 or held + there > size):
            yield Piece(number, tuple(waiting))
            waiting, held = [], 0
        if len(parts) > 1:
            yield from (Piece(number, (Stretch(name, path, part),)) for part in parts)
        else:
            waiting.append(Stretch(name, path))
            held += there
    if waiting:
        yield Piece(number, tuple(waiting))
