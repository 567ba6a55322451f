"""Reads tables of text: comma-separated values, or by tabs, names of the columns on the first line."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from megaopus.corpus_tools.readers.registry import Reader, Row, register_reader
from megaopus.corpus_tools.readers.stored import FaultyError, Stored, decoded

_LONGEST_CELL = (1 << 31) - 1
"""Characters; the module's own limit of 131,072 is for less than documents."""
_REASON = "not valid CSV"


class _Lines:
    """Decodes a file's lines for the parser and remembers what was wrong with one of a row."""

    def __init__(self, stored: Stored):
        self._stored = stored
        self._fault: FaultyError | None = None

    def __iter__(self) -> Iterator[str]:
        for number, content in enumerate(self._stored.lines(), 1):
            try:
                yield decoded(content, f"{self._stored.path} line {number}")
            except FaultyError as error:
                self._fault = error
                yield content.decode("utf-8", "replace")  # the parser must see where rows end

    def drain_fault(self) -> FaultyError | None:
        """Return what was wrong since the last call."""
        fault, self._fault = self._fault, None
        return fault


def _rows(stored: Stored) -> Iterator[Row]:
    """Rows by the header's names; an empty cell is None, every other one text. A row is numbered by its first line."""
    csv.field_size_limit(_LONGEST_CELL)
    lines = _Lines(stored)
    tabs = any(suffix.lower() == ".tsv" for suffix in stored.path.suffixes)
    parser = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    names: list[str] | None = None
    while True:
        number = parser.line_num + 1
        place = f"{stored.path} line {number}"
        try:
            cells = next(parser, None)
            if cells is None:
                return
            if fault := lines.drain_fault():
                raise fault
            if names and cells and len(cells) != len(names):
                wrong = f"{len(cells)} cells, but {len(names)} columns in the first line"
                raise FaultyError(_REASON, f"{place}: {wrong}; put cells with commas or line ends in quotes")
        except (csv.Error, FaultyError) as error:
            fault = error if isinstance(error, FaultyError) else _unparsed(place, parser.line_num, error)
            if names is None:
                raise fault from error
            stored.leave_out(fault)
            continue
        if not cells:
            continue  # an empty line
        if names is None:
            names = _header(cells, place)
        else:
            yield Row(number, place, {name: cell or None for name, cell in zip(names, cells, strict=True)})


def _unparsed(place: str, last: int, error: csv.Error) -> FaultyError:
    message = f"{place}: not valid CSV ({error}, read up to line {last}); close the quotes, and double those in a cell"
    return FaultyError(_REASON, message)


def _header(cells: list[str], place: str) -> list[str]:
    """The names of the columns. Raises FaultyError unless each has one of its own."""
    if "" in cells or len(set(cells)) < len(cells):
        raise FaultyError(_REASON, f"{place}: the names of columns are {cells}; give each column one of its own")
    return cells


register_reader(
    "delimited",
    Reader(endings=(".csv", ".tsv"), rows=_rows, unit="line", packed=True, untyped=True, gives_way=True),
)
