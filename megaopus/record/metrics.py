"""Describes each number of a record in one place: its unit, its meaning, and who shows it.

A metric is a field of ``StepRecord``, ``SelectionRecord`` or ``ValidationRecord`` with ``metadata=metric(...)``. The
files of a run, the progress line, Weights & Biases, the report and the table of docs/report.md go through these
fields, so that a new metric is one field and the code that works it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypeVar

Show = Callable[[Sequence[Any], str], str]
"""(records since the last progress line, the metric's name) -> its part of the line; "" for none."""
R = TypeVar("R")
_KEY = "metric"


@dataclass(frozen=True, slots=True)
class Metric:
    """Says what a field of a record means and where it is shown."""

    name: str
    """Of the field, and of the column in the file."""
    unit: str
    doc: str
    """One sentence for the table of docs/report.md."""
    wandb: str | None
    """Its name there; None: not sent. The parts of a mapping are sent as ``name/key``, of a list its length."""
    console: Show | None
    """How the progress line shows it; None: not at all."""
    style: str
    """Of that part of the line, in rich's words."""
    plot: bool
    """The report draws it over update tokens, beside the figures that it has anyway."""
    reproducible: bool
    """False: it depends on the clock, the machine or the layout, so that a run made again has other values."""


_LISTED: dict[type, tuple[Metric, ...]] = {}  # every step asks


def metric(
    unit: str,
    doc: str,
    *,
    wandb: str | None = None,
    console: Show | None = None,
    style: str = "",
    plot: bool = False,
    reproducible: bool = True,
) -> Mapping[str, Metric]:
    """Make the ``metadata`` of a dataclass field that is a metric; the arguments are those of ``Metric``."""
    return {_KEY: Metric("", unit, doc, wandb, console, style, plot, reproducible)}


def metrics_of(record: type) -> tuple[Metric, ...]:
    """List the metrics of a record's class in the order of its fields; fields without ``metric`` are left out."""
    if record not in _LISTED:
        found = [each for each in fields(record) if _KEY in each.metadata]
        _LISTED[record] = tuple(replace(each.metadata[_KEY], name=each.name) for each in found)
    return _LISTED[record]


def values_of(records: Sequence[Any], name: str) -> list[Any]:
    """List a metric's values over records, without those that are None."""
    return [value for record in records if (value := getattr(record, name)) is not None]


def mean(write: Callable[[float], str]) -> Show:
    """Show the mean over the steps since the last progress line, in the words of ``write``."""

    def show(records: Sequence[Any], name: str) -> str:
        values = values_of(records, name)
        return write(sum(values) / len(values)) if values else ""

    return show


def last(write: Callable[[float], str]) -> Show:
    """Show the latest value, in the words of ``write``."""

    def show(records: Sequence[Any], name: str) -> str:
        values = values_of(records[-1:], name)
        return write(values[0]) if values else ""

    return show


def progress_parts(records: Sequence[Any]) -> list[tuple[str, str]]:
    """(text, style) of each metric that the progress line shows of ``records``, the steps since the last line."""
    shown = [(each.console(records, each.name), each.style) for each in metrics_of(type(records[-1])) if each.console]
    return [part for part in shown if part[0]]


def wandb_row(record: Any) -> dict[str, Any]:
    """Make what is sent to Weights & Biases of a record; metrics that are None are left out."""
    row: dict[str, Any] = {}
    for each in metrics_of(type(record)):
        value = getattr(record, each.name)
        if each.wandb is None or value is None:
            continue
        if isinstance(value, Mapping):
            row |= {f"{each.wandb}/{key}": item for key, item in value.items()}
        elif isinstance(value, list):
            row[each.wandb] = len(value)
        else:
            row[each.wandb] = int(value) if isinstance(value, bool) else value
    return row


def write_record(record: Any) -> dict[str, Any]:
    """Make the row of a record: every metric by its name. ``read_record`` makes an equal record of it."""
    return {each.name: _plain(getattr(record, each.name)) for each in metrics_of(type(record))}


def _plain(value: Any) -> Any:
    return [each.as_row() for each in value] if isinstance(value, list) else value


def read_record(kind: type[R], row: Mapping[str, Any]) -> R:
    """Make a record of a row of a run's files, with ``kind``'s own default for a metric that the row lacks.

    So rows of older versions are read; what a newer version wrote besides is left out. Raises ValueError or TypeError
    for a metric that is missing and has no default, and for a value of another type.
    """
    values = {}
    names = {each.name for each in metrics_of(kind)}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name in names and each.name in row:
            values[each.name] = _read(str(each.type), row[each.name])
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"field {each.name!r} is missing")
    return kind(**values)


def _read(kind: str, value: Any) -> Any:
    """``value`` as the type that an annotation names."""
    base, _, optional = kind.partition(" | ")
    return None if optional == "None" and value is None else _READERS[base](value)


def _number(value: Any) -> float:
    """Read a number, or the name of a non-finite one ("nan", "inf", "-inf")."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not an object of numbers")
    return {key: _number(item) for key, item in value.items()}


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": _number,
    "bool": bool,
    "str": str,
    "dict[str, float]": _numbers,
    "list[Event]": list,
}


def docs_table(kinds: Mapping[str, type]) -> str:
    """Make the table of docs/report.md: a row a metric of each of ``kinds``, records by the name of their row."""
    lines = ["| row | field | unit | meaning |", "|---|---|---|---|"]
    for kind, record in kinds.items():
        lines += [f"| {kind} | `{each.name}` | {each.unit or '-'} | {each.doc} |" for each in metrics_of(record)]
    return "\n".join(lines) + "\n"
