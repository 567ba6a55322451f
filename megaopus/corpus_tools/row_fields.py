"""Takes text, labels and columns from a row, by name or by a path of names, and names every fault by its place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from megaopus.corpus_tools.chat import ChatTemplate, Spans
from megaopus.corpus_tools.readers.json_lines import LongNumber
from megaopus.corpus_tools.readers.stored import FaultyError, no_text_field

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_MISSING = object()


def text_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """The document; null is an empty one. Raises FaultyError."""
    text = _found(row, key)
    if text is None:
        return ""
    if text is _MISSING:
        raise no_text_field(place, key, row)
    if not isinstance(text, str):
        raise _wrong(place, f"'{key}' is {_kind(text)}, not a string; write the document as one string")
    return _encodable(text, key, place)


def label_of(row: Mapping[str, Any], key: str, place: str) -> str | None:
    """An optional ``id`` or ``domain``: a string, or a whole number taken as one. Raises FaultyError."""
    value = _found(row, key)
    if value is None or value is _MISSING:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _wrong(place, f"'{key}' is {value!r}; write a non-empty string, or leave the field out")
    return _encodable(str(value), key, place)


def column_of(row: Mapping[str, Any], key: str, place: str, untyped: bool) -> Any:
    """A value to keep: a number, text, true, false or None; None too where the row has no such field.

    ``untyped``: a text that is written like a number is that number. Raises FaultyError.
    """
    value = _found(row, key)
    if value is None or value is _MISSING or isinstance(value, bool):
        return None if value is _MISSING else value
    if untyped and isinstance(value, str) and len(value) < 400 and _NUMBER.fullmatch(value):
        value = json.loads(value)
    if isinstance(value, str):
        return _encodable(value, key, place)
    if not isinstance(value, int | float):
        raise _wrong(place, f"'{key}' is {_kind(value)}; keep numbers, text, true and false only")
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        message = f"'{key}' is a whole number above 1e308; keep it as text, or leave it out"
        raise _wrong(place, message) from None


def spans_of(row: Mapping[str, Any], key: str, place: str, text: str) -> Spans | None:
    """Read which characters of ``text`` count in the loss, [[first, last), ...] in order; None: all do.

    Raises FaultyError.
    """
    value = _found(row, key)
    if value is None or value is _MISSING:
        return None
    end = 0
    pairs: list[Any] = value if isinstance(value, list) else [None]
    for pair in pairs:
        numbers = isinstance(pair, list) and len(pair) == 2 and all(type(each) is int for each in pair)
        if not numbers or not end <= pair[0] <= pair[1] <= len(text):
            raise _wrong(place, f"'{key}' is not [[first, last], ...], character ranges of the text in order")
        end = pair[1]
    return tuple((first, last) for first, last in pairs)


def conversation_of(row: Mapping[str, Any], key: str, place: str, template: ChatTemplate) -> tuple[str, Spans]:
    """Write a conversation, [{"role": ..., "content": ...}, ...], as (text, what of it counts in the loss).

    None, or one without a message, is an empty text. Raises FaultyError.
    """
    value = _found(row, key)
    if value is None:
        return "", ()
    if value is _MISSING:
        raise no_text_field(place, key, row)
    if not isinstance(value, list) or not all(isinstance(each, Mapping) and "role" in each for each in value):
        raise _wrong(place, f"'{key}' is not a list of messages, each with a role and its content")
    try:
        text, spans = template.write(value) if value else ("", ())
    except ValueError as error:
        raise FaultyError("a conversation that the template cannot write", f"{place}: {error}") from error
    return _encodable(text, key, place), spans


def _found(row: Mapping[str, Any], key: str) -> Any:
    """Find what a field holds, by its own name or by a path of names; null where the path leads through one."""
    if key in row:
        return row[key]
    value: Any = row
    for name in key.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _encodable(text: str, key: str, place: str) -> str:
    """The text, which must not hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"'{key}' has half a surrogate pair at character {error.start}"
        raise FaultyError("half a surrogate pair", f"{place}: {where}; replace it by U+FFFD or drop it") from error
    return text


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, LongNumber) else f"a {type(value).__name__}"


def _wrong(place: str, message: str) -> FaultyError:
    return FaultyError("a field of the wrong type", f"{place}: {message}")
