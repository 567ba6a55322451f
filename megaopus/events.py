"""Tells what went another way than asked, as facts that programs read and a sentence that people read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


class Event:
    """Says what kind of thing happened, in words, and with which facts.

    Nothing reads the words: consoles and reports count by ``kind``, replays read ``facts``. Kinds are dotted
    (``selection.fallback``); docs/report.md lists them.
    """

    __slots__ = ("facts", "kind", "text")

    def __init__(self, kind: str, text: str, **facts: Any):
        """``facts``: plain values, by names other than kind and text."""
        self.kind, self.text, self.facts = kind, text, facts

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Event({self.kind!r}, {self.text!r}, {self.facts!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self.as_row() == other.as_row()

    __hash__ = None  # type: ignore[assignment]

    def as_row(self) -> dict[str, Any]:
        """Give the plain values that ``read_event`` makes an equal event of."""
        return {"kind": self.kind, "text": self.text, **self.facts}


def read_event(row: Event | str | Mapping[str, Any]) -> Event:
    """Make the event of a row of a run's record; of a sentence, as in version 0.1, one that counts with its like.

    An event is returned as it is. Raises ValueError for a row without kind and text.
    """
    if isinstance(row, Event):
        return row
    if isinstance(row, str):
        return Event(kind_of_sentence(row), row)
    if not isinstance(row, Mapping) or not all(isinstance(row.get(key), str) for key in ("kind", "text")):
        raise ValueError(f"an event needs kind and text: {row!r}")
    return Event(**row)


def kind_of_sentence(text: str) -> str:
    """Blank the numbers of ``text``: sentences that differ in numbers only are of one kind."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?(\s*,\s*\d+)*", "#", text)
