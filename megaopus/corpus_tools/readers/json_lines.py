"""Reads JSON lines: an object on each line, empty ones left out."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from megaopus.corpus_tools.readers.registry import PACKED, Reader, Row, register_reader
from megaopus.corpus_tools.readers.stored import FaultyError, Part, Stored, decoded
from megaopus.corpus_tools.remote import Place, opened


class LongNumber:
    """Stands for a whole number of more digits than Python converts; no field that is used may be one."""

    def __init__(self, digits: str):
        self._count = len(digits)

    def __repr__(self) -> str:
        return f"a number of {self._count:,} digits"


def _rows(stored: Stored) -> Iterator[Row]:
    for line, content in enumerate(stored.lines(), stored.before + 1):
        if content.removeprefix(codecs.BOM_UTF8).strip():  # files with such a mark may have been joined
            place = f"{stored.path} line {line}"
            try:
                values = _json_row(decoded(content, place), place)
            except FaultyError as error:
                stored.leave_out(error)
                continue
            yield Row(line, place, values)


def _json_row(content: str, place: str) -> dict:
    """The JSON object of one line."""
    try:
        row = _parsed(content)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        message = f"{place}: not valid JSON ({what}); each line must be one JSON object"
        raise FaultyError("not valid JSON", message) from error
    if not isinstance(row, dict):
        message = f'{place}: a JSON {type(row).__name__}, not an object; write {{"text": ...}} on each line'
        raise FaultyError("not an object", message)
    return row


def _parsed(content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a whole number with too many digits
        return json.loads(content, parse_int=_integer)


def _integer(digits: str) -> int | LongNumber:
    try:
        return int(digits)
    except ValueError:
        return LongNumber(digits)


def _divide(path: Place, size: int) -> list[Part]:
    """Parts as even as bytes can be; none of a packed file, which is read from its start."""
    if path.suffix.lower() in PACKED:
        return []
    total = path.stat().st_size
    count = -(-total // size)
    return [Part(total * n // count, total * (n + 1) // count) for n in range(count)]


def _count(path: Place, part: Part) -> int:
    """Count the lines that begin in a part: each but the file's first begins behind the end of another."""
    place, end = max(0, part.first - 1), part.end - 1
    found = int(part.first == 0)
    with opened(path, end) as stream:
        stream.seek(place)
        while place < end and (block := stream.read(min(1 << 20, end - place))):
            place += len(block)
            found += block.count(b"\n")
    return found


register_reader(
    "json_lines",
    Reader(endings=(".jsonl", ".ndjson", ".json"), rows=_rows, unit="line", packed=True, divide=_divide, count=_count),
)
