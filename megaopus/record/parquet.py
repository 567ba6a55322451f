"""Keeps every candidate of every step in parquet files, a row each: in parts, each whole before it has its name."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megaopus.errors import DataError
from megaopus.fs import disk_full, sync
from megaopus.selection.candidate_table import COLUMNS, RENAMED, STEP, CandidateTable, Column, Lists, Masked

Table = pa.Table
FOLDER = "choices"
PART_ROWS = 1 << 17
"""Rows after which a part is written; some 10 MB of memory. Ten overlaps count as a row."""
_TYPES = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "text": pa.dictionary(pa.int32(), pa.string()),
    "list": pa.list_(pa.float64()),
}
SCHEMA = pa.schema([pa.field(each.name, _TYPES[each.dtype], nullable=each.nullable) for each in COLUMNS])
_ENCODING = {"close": "DELTA_BINARY_PACKED", "bytes": "BYTE_STREAM_SPLIT"}


class ChoiceSink:
    """Rows of ``choices/``, gathered in memory: a killed run loses those since the last part.

    A part is ``part-SSSSSSSS.parquet``, S the first step in it.
    """

    def __init__(self, folder: Path, every: int = 1, overlaps_mb: float = 1.0):
        """``every``: steps from one all of whose candidates are kept to the next; picks are always kept.

        ``overlaps_mb``: megabytes of overlaps in a step above which they are left out.
        """
        self._folder = folder
        self._every = every
        self._most = overlaps_mb * 1e6
        self._waiting: list[tuple[int, CandidateTable]] = []
        self._rows = 0

    def add(self, step: int, choices: CandidateTable) -> None:
        """Take in a step's candidates; the arrays must not be changed afterwards."""
        if step % self._every:
            choices = choices.picks()
        overlaps = choices.get("overlaps")
        if overlaps is not None and overlaps.values.nbytes > self._most:
            choices, overlaps = choices.without("overlaps"), None
        self._waiting.append((step, choices))
        self._rows += len(choices) + (0 if overlaps is None else len(overlaps.rows) * len(choices) // 10)
        if self._rows >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a part; on disk, power failure or not, when it returns.

        Raises DataError if it cannot be written; the rows then go on waiting.
        """
        if not self._waiting:
            return
        path = self._folder / f"part-{self._waiting[0][0]:08d}.parquet"
        columns = {column.name: _column(column, self._waiting) for column in COLUMNS}
        _write(pa.table(columns, schema=SCHEMA), path)
        self._waiting, self._rows = [], 0

    def truncate_after(self, step: int) -> list[str]:
        """Keep the rows of the first ``step`` updates and return what was dropped, in words.

        A part with rows on both sides is written anew in one go. Raises DataError for a part that cannot be read.
        """
        assert not self._waiting, "truncate before the first row"
        kept = dropped = 0
        for path in parts(self._folder):
            table = read_part(path) if first_step(path) < step else None
            rows = pq.read_metadata(path).num_rows
            staying = None if table is None else table.filter(pc.less(table["step"], step))
            stay = 0 if staying is None else len(staying)
            if staying is None:
                path.unlink()
            elif stay < rows:
                _write(staying, path)
            kept, dropped = kept + stay, dropped + rows - stay
        for left in self._folder.glob(".part-*.tmp"):
            left.unlink()
        if not dropped:
            return []
        return [f"{FOLDER}: {dropped} rows after step {step} of an earlier run dropped, {kept} kept"]


def parts(folder: Path) -> list[Path]:
    """The parts of a log in order of their steps; none if there is no log."""
    return sorted(folder.glob("part-*.parquet"), key=first_step)


def first_step(path: Path) -> int:
    """The first step of a part. Raises DataError if its name does not say."""
    digits = path.stem.removeprefix("part-")
    if not digits.isdecimal():
        raise DataError(f"{path}: not a part of a run's choices (part-STEP.parquet); move it elsewhere")
    return int(digits)


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a part, all of ``COLUMNS`` or some, whatever version wrote it.

    Columns have the names that they have now; others are left out, and a nullable one that is not there is null. Raises
    DataError if the part cannot be read or lacks a column that is never null.
    """
    wanted = list(SCHEMA.names if columns is None else columns)
    try:
        there = {RENAMED.get(name, name): name for name in pq.read_schema(path).names}
        missing = [name for name in wanted if name not in there]
        if lacking := [name for name in missing if not SCHEMA.field(name).nullable]:
            raise DataError(f"{path}: no column {', '.join(lacking)}; is it a part of a run's choices?")
        table = pq.read_table(path, columns=[there[name] for name in wanted if name in there])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or delete it to lose its steps") from error
    table = table.rename_columns([RENAMED.get(name, name) for name in table.column_names])
    for name in missing:
        table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
    return table.select(wanted)


def candidates_of(rows: pa.Table, domain_names: Sequence[str]) -> CandidateTable:
    """The rows of one step as they were recorded; ``domain_names``: their domains, in the order of their numbers.

    Raises DataError for overlaps that are not of its candidates. A name of no domain has the number -1.
    """
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        values = rows[column.name]
        if column.name == STEP or (column.nullable and values.null_count == len(values)):
            continue
        if column.dtype == "list":
            columns[column.name] = _read_lists(rows, column.name)
        elif column.dtype == "text":
            columns[column.name] = _codes(values.to_pylist(), domain_names)
        elif values.null_count:
            columns[column.name] = Masked(values.to_numpy(), values.is_valid().to_numpy())
        else:
            columns[column.name] = values.to_numpy()
    return CandidateTable(columns, domain_names)


def read_step(folder: Path, step: int) -> pa.Table:
    """The rows of one step in their order; none if the log has none of it. Raises DataError as ``read_part``."""
    found = [path for path in parts(folder) if first_step(path) <= step]
    if not found:
        return SCHEMA.empty_table()
    table = read_part(found[-1])
    return table.filter(pc.equal(table["step"], step))


def pick_counts(run_dir: Path) -> np.ndarray:
    """(different sequences,) how often each one that a run trained on was picked. Raises DataError as ``read_part``."""
    found = []
    for path in parts(run_dir / FOLDER):
        table = read_part(path, ["sequence", "picked"])
        found.append(table.filter(table["picked"])["sequence"].to_numpy())
    return np.unique(np.concatenate(found), return_counts=True)[1] if found else np.zeros(0, dtype=np.int64)


def steps_of(table: pa.Table) -> Iterator[tuple[int, slice]]:
    """``(step, its rows)`` of a part."""
    steps = table["step"].to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    for start, end in itertools.pairwise(starts):
        if end > start:
            yield int(steps[start]), slice(start, end)


def _column(column: Column, waiting: Sequence[tuple[int, CandidateTable]]) -> pa.Array:
    """One column of a part."""
    tables, kind = [table for _, table in waiting], SCHEMA.field(column.name).type
    if column.name == STEP:
        steps = np.array([step for step, _ in waiting], dtype=np.int32)
        return pa.array(np.repeat(steps, [len(table) for table in tables]))
    if column.dtype == "list":
        return pa.concat_arrays([_write_lists(table, column.name) for table in tables])
    if column.dtype == "text":
        codes = pa.array(np.concatenate([np.asarray(table[column.name]) for table in tables]).astype(np.int32))
        return pa.DictionaryArray.from_arrays(codes, pa.array(tables[0].domain_names, pa.string()))
    parts = [_values(column, table) for table in tables]
    values = np.concatenate([each for each, _ in parts]).astype(kind.to_pandas_dtype(), copy=False)
    mask = ~np.concatenate([known for _, known in parts]) if column.nullable else None
    return pa.array(values, kind, mask=mask)


def _values(column: Column, table: CandidateTable) -> tuple[np.ndarray, np.ndarray]:
    """(values (N,), which of them are there (N,) bool) of a column."""
    values, every = table.get(column.name), np.ones(len(table), dtype=bool)
    if values is None:
        return np.zeros(len(table), dtype=SCHEMA.field(column.name).type.to_pandas_dtype()), ~every
    if isinstance(values, Masked):
        return np.asarray(values.values), np.asarray(values.known)
    return np.asarray(values), every


def _write_lists(table: CandidateTable, name: str) -> pa.Array:
    """A list (N,) for each row that has one, null for the others."""
    size, kind = len(table), SCHEMA.field(name).type
    lists = table.get(name)
    if lists is None:
        return pa.nulls(size, kind)
    rows = np.asarray(lists.rows)
    lengths = np.zeros(size, dtype=np.int32)
    lengths[rows] = size
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.array(np.asarray(lists.values)[np.argsort(rows)].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, kind, mask=pa.array(lengths == 0))


def _read_lists(rows: pa.Table, name: str) -> Lists:
    there = np.flatnonzero(rows[name].is_valid().to_numpy())
    lists = rows[name].combine_chunks().drop_null()
    if set(lists.value_lengths().to_pylist()) != {len(rows)}:
        step = rows[STEP][0].as_py()
        raise DataError(f"{FOLDER}/, step {step}: {name} of another number of candidates; restore that part")
    return Lists(there, lists.flatten().to_numpy().reshape(len(there), len(rows)))


def _codes(names: Sequence[str], domain_names: Sequence[str]) -> np.ndarray:
    """(N,) int64 number of each name; -1 for one of no domain."""
    numbers = {name: number for number, name in enumerate(domain_names)}
    return np.array([numbers.get(name, -1) for name in names], dtype=np.int64)


def _write(table: pa.Table, path: Path) -> None:
    """``table`` as ``path``, all of it or nothing; who reads the folder skips names that begin with a dot."""
    temporary = path.with_name(f".{path.stem}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=[column.name for column in COLUMNS if column.packing == "repeats"],
            column_encoding={each.name: _ENCODING[each.packing] for each in COLUMNS if each.packing in _ENCODING},
        )
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        room = disk_full(error, path, table.nbytes)
        raise DataError(f"{path}: cannot be written ({error}){room}; mend that, then start again") from error
