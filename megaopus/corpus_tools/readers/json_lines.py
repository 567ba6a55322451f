"""Reads JSON lines: an object on each line, empty ones left out."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megaopus.corpus_tools.readers.registry import Reader, Row, register_reader
from megaopus.corpus_tools.readers.stored import Stored, decoded
from megaopus.errors import DataError


def _rows(stored: Stored) -> Iterator[Row]:
    for line, content in enumerate(stored.lines(), 1):
        if content.strip():
            place = f"{stored.path} line {line}"
            yield Row(line, place, _json_row(decoded(content, place, first=line == 1), place))


def _json_row(content: str, place: str) -> dict:
    """The JSON object of one line."""
    try:
        row = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise DataError(f"{place}: not valid JSON ({what}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f'{place}: a JSON {type(row).__name__}, not an object; write {{"text": ...}} on each line')
    return row


register_reader("json_lines", Reader(endings=(".jsonl", ".ndjson", ".json"), rows=_rows, unit="line", packed=True))
