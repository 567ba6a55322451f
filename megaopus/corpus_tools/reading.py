"""Reads all sources in order, the same way in every pass: without repeated ids, and with long documents in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megaopus.corpus_tools.readers.stored import FaultyError
from megaopus.corpus_tools.sources import Document, Source, SourceReader

REPEATED = "id used before"
"""Reason of documents that are left out."""
_BREAKS = ("\n\n", "\n", " ")
"""Marks by which a text is cut, the best first: between paragraphs, lines, words."""


@dataclass(slots=True)
class Reading:
    """Says what becomes of the documents that the sources give."""

    repeated: set[int] = field(default_factory=set)
    """Places in reading order of documents whose id an earlier one has; they are left out."""
    pieces: dict[str, int] = field(default_factory=dict)
    """Domain -> characters: its longer documents are cut into pieces of about so many."""
    copies: bytes = b""
    """A byte for each place: 1: its text is a copy of an earlier one, and left out. Empty: none is."""
    watched: frozenset[int] = frozenset()
    """Places of documents that are to be ``found``."""
    found: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Place -> id of the document that was read there, and where that is."""

    def documents(
        self,
        sources: Sequence[Source],
        on_bytes: Callable[[int], None],
        finished: Callable[[int, SourceReader, int], None],
    ) -> Iterator[tuple[int, Document]]:
        """(number of its source, document) of each, in order.

        ``finished(number, reader, documents)`` is called at the end of each source, with the documents that it gave
        before they were cut. Raises DataError as ``SourceReader`` does.
        """
        place = 0
        for number, source in enumerate(sources):
            reader = SourceReader(source, on_bytes)
            for document in self.taken(reader, place):
                yield number, document
            place += reader.documents
            finished(number, reader, reader.taken)

    def taken(self, reader: SourceReader, first: int) -> Iterator[Document]:
        """Documents of one reader, the first of which has the place ``first``. Raises DataError as the reader does."""
        for place, document in enumerate(reader, first):
            if place in self.watched:
                self.found[place] = document.id, place_of(reader.source, document.line)
            if place in self.repeated:
                where = place_of(reader.source, document.line)
                reader.leave_out(FaultyError(REPEATED, f"{where}: id {document.id!r} was used before"))
            elif self.copies and self.copies[place]:
                reader.copies += 1
            else:
                reader.taken += 1
                yield from self._cut(document)

    def of_places(self, first: int, end: int) -> Reading:
        """Say the same of the places from ``first`` to before ``end`` alone, counted from 0."""
        inside = {place - first for place in self.repeated if first <= place < end}
        watched = frozenset(place - first for place in self.watched if first <= place < end)
        return Reading(inside, self.pieces, self.copies[first:end], watched)

    def _cut(self, document: Document) -> list[Document]:
        texts = cut(document.text, self.pieces[document.domain]) if document.domain in self.pieces else []
        if len(texts) < 2:
            return [document]
        found, first = [], 0
        for number, text in enumerate(texts, 1):
            spans, last = document.loss_spans, first + len(text)
            if spans is not None:
                inside = ((max(a, first) - first, min(b, last) - first) for a, b in spans)
                spans = tuple((a, b) for a, b in inside if a < b)
            found.append(document._replace(id=f"{document.id}#{number}", text=text, loss_spans=spans))
            first = last
        return found


def cut(text: str, size: int) -> list[str]:
    """Pieces of about ``size`` characters, as even as breaks of the text allow; joined they are the text again.

    A piece ends after the last paragraph, else line, else word of the last quarter of its place; none is white space
    alone.
    """
    count = max(1, round(len(text) / size))
    pieces: list[str] = []
    start = 0
    for number in range(1, count + 1):
        end = len(text) if number == count else _end(text, start, len(text) * number // count, size // 4)
        if text[start:end].strip():
            pieces.append(text[start:end])
            start = end
    if start < len(text):
        pieces[-1] += text[start:]
    return pieces


def _end(text: str, start: int, limit: int, slack: int) -> int:
    """Choose where a piece from ``start`` ends, at ``limit`` or up to ``slack`` characters before."""
    for mark in _BREAKS:
        found = text.rfind(mark, max(start, limit - slack), limit)
        if found >= 0:
            return found + len(mark)
    return limit


def place_of(source: Source, line: int) -> str:
    """Name a document's place in messages."""
    return f"{source.path} {source.unit} {line}" if line else str(source.path)
