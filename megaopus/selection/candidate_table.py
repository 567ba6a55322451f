"""Lists what is recorded of every candidate, and holds it for one step: a row a candidate, a column a number.

One more number is one more ``Column`` here, and whoever works it out puts it among the ``columns`` of what it returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Column:
    """One number (or name) of every candidate, as it is kept on disk."""

    name: str
    dtype: str
    """bool, int32, int64, float32, float64, text (codes into names), or list (of float64, as long as the table)."""
    doc: str
    """What it means, as docs/report.md has it."""
    nullable: bool = False
    """Whether it may be missing, in whole or of some candidates."""
    packing: str = ""
    """How it compresses well. repeats: few different values; close: integers near their neighbours; bytes: floats with
    their bytes apart, all first ones, all second ones."""


COLUMNS = (
    Column("step", "int32", "from 0, as in the other files", packing="repeats"),
    Column("id", "int64", "its name in the stream: epoch * sequences of the pool + `sequence`", packing="close"),
    Column("sequence", "int64", "its number in the pool", packing="close"),
    Column("domain", "text", "its domain", packing="repeats"),
    Column("utility", "float64", "as estimated; null: not scored; nan, infinite: no number", True, "bytes"),
    Column("prescreen_score", "float64", "what a prescreen screens or picks by; null: none yet", True, "bytes"),
    Column("loss", "float64", "mean token loss of what was scored of it; null: not kept", True, "bytes"),
    Column("odds", "float64", "log-odds that it is picked by; null: it is not picked by odds", True, "bytes"),
    Column("exposures", "int32", "times in the window if it is picked now; null: not counted", True, "repeats"),
    Column("squared_norm", "float64", "of its update, as sketched; null: none was worked out", True, "bytes"),
    Column("overlaps", "list", "inner products of its update with those of every row; null for most", True),
    Column("picked", "bool", "trained on in this update"),
    Column("probability", "float32", "of the first draw; 0: may not be picked", packing="bytes"),
)
"""Every column, in order."""
RENAMED = {"standing": "prescreen_score"}
"""Name of a column in files of earlier versions -> its name now; read for ever."""
STEP = "step"
"""The column that is the same in all rows of a step, and no part of a ``CandidateTable``."""

Array = Any
"""(N,) numpy array or tensor on the CPU."""


class Masked(NamedTuple):
    """Values of some candidates."""

    values: Array
    """(N,), anything where not known."""
    known: Array
    """(N,) bool."""


class Lists(NamedTuple):
    """A list for each of some candidates."""

    rows: Array
    """(P,) int64, different positions of those that have one."""
    values: Array
    """(P, N) float64, their lists."""


class CandidateTable:
    """The candidates of one step in the order of the buffer: equal-length arrays by the names of ``COLUMNS``.

    ``columns``: name -> (N,) array, a ``Masked`` one where some are null, or ``Lists``. Nullable ones may be missing:
    all null. ``domain_names``: what the numbers in column domain mean. Raises ValueError for a column that is not in
    ``COLUMNS``, for a missing one, and for arrays of different lengths.
    """

    def __init__(self, columns: Mapping[str, Any], domain_names: Sequence[str]):
        known = {column.name: column for column in COLUMNS if column.name != STEP}
        if unknown := sorted(set(columns) - set(known)):
            raise ValueError(f"no such column: {', '.join(unknown)}; a new one is an entry of COLUMNS")
        needed = {name for name, column in known.items() if not column.nullable}
        if missing := sorted(needed - set(columns)):
            raise ValueError(f"a table of candidates needs the columns {', '.join(missing)}")
        self._columns = dict(columns)
        self.domain_names = list(domain_names)
        sizes = {name: _size(values) for name, values in columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"columns differ in length: {sizes}")

    def __len__(self) -> int:
        return len(self._columns["id"])

    def __getitem__(self, name: str) -> Any:
        """The column as it was given. Raises KeyError where it is null for all."""
        return self._columns[name]

    def get(self, name: str) -> Any:
        """The column as it was given, None where it is null for all."""
        return self._columns.get(name)

    def __iter__(self) -> Iterator[str]:
        """Names of the columns that are not null for all."""
        return iter(self._columns)

    def values(self, name: str) -> Array | None:
        """(N,) values of a column, anything where it is null, (P, N) of lists; None where it is null for all."""
        column = self._columns.get(name)
        return column.values if isinstance(column, Masked | Lists) else column

    def without(self, *names: str) -> CandidateTable:
        """The same with nullable columns null for all."""
        return CandidateTable(
            {name: values for name, values in self._columns.items() if name not in names}, self.domain_names
        )

    def picks(self) -> CandidateTable:
        """The picked rows alone, without lists: most of those are about rows that go."""
        at = self._columns["picked"]
        kept = {
            name: Masked(values.values[at], values.known[at]) if isinstance(values, Masked) else values[at]
            for name, values in self._columns.items()
            if not isinstance(values, Lists)
        }
        return CandidateTable(kept, self.domain_names)


def _size(column: Any) -> int:
    """Rows of the table that a column belongs to."""
    if isinstance(column, Lists):
        return int(column.values.shape[1])
    return len(column.values if isinstance(column, Masked) else column)
