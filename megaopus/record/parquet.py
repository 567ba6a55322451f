"""Every candidate of every step as parquet files, a row each: written in parts, each whole before it has its name."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megaopus.errors import DataError
from megaopus.fs import sync
from megaopus.record.types import Choices

Table = pa.Table
FOLDER = "choices"
PART_ROWS = 1 << 17
"""Rows after which a part is written; some 10 MB of memory. Ten overlaps count as a row."""
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("domain", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("utility", pa.float64()),
        pa.field("standing", pa.float64()),
        pa.field("exposures", pa.int32()),
        pa.field("squared_norm", pa.float64()),
        pa.field("overlaps", pa.list_(pa.float64())),
        pa.field("picked", pa.bool_(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
    ]
)
_DICTIONARY = ["step", "domain", "exposures"]
_SPLIT = ["utility", "standing", "squared_norm", "probability"]
"""Floats compress better with their bytes apart, all first ones, all second ones..."""


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
        self._waiting: list[tuple[int, Choices]] = []
        self._rows = 0

    def add(self, step: int, choices: Choices) -> None:
        """Take in a step's candidates; the arrays must not be changed afterwards."""
        if step % self._every:
            choices = _picks(choices)
        if choices.overlaps is not None and choices.overlaps.nbytes > self._most:
            choices = replace(choices, chosen=None, overlaps=None)
        self._waiting.append((step, choices))
        self._rows += len(choices.ids) + (0 if choices.overlaps is None else choices.overlaps.size // 10)
        if self._rows >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a part; on disk, power failure or not, when it returns.

        Raises DataError if it cannot be written; the rows then go on waiting.
        """
        if not self._waiting:
            return
        path = self._folder / f"part-{self._waiting[0][0]:08d}.parquet"
        columns = {name: _column(name, self._waiting) for name in SCHEMA.names}
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
    """Rows of a part, all columns or some. Raises DataError if it cannot be read or lacks a column."""
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns))
        if missing := set(columns or SCHEMA.names) - set(table.column_names):
            raise DataError(f"{path}: no column {', '.join(sorted(missing))}; was it written by this version?")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or delete it to lose its steps") from error
    return table


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


def _picks(choices: Choices) -> Choices:
    """The picked rows of ``choices`` alone, without overlaps: most of those are with rows that go."""
    at = choices.picked

    def some(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[at]

    return Choices(
        ids=choices.ids[at],
        sequences=choices.sequences[at],
        domains=choices.domains[at],
        domain_names=choices.domain_names,
        picked=at[at],
        probabilities=choices.probabilities[at],
        utilities=some(choices.utilities),
        scored=some(choices.scored),
        standing=some(choices.standing),
        exposures=some(choices.exposures),
        squared_norms=some(choices.squared_norms),
    )


def _column(name: str, waiting: Sequence[tuple[int, Choices]]) -> pa.Array:
    """One column of a part."""
    each = [choices for _, choices in waiting]
    if name == "step":
        steps = np.array([step for step, _ in waiting], dtype=np.int32)
        return pa.array(np.repeat(steps, [len(choices.ids) for choices in each]))
    if name == "domain":
        codes = pa.array(np.concatenate([choices.domains for choices in each]).astype(np.int32))
        return pa.DictionaryArray.from_arrays(codes, pa.array(each[0].domain_names, pa.string()))
    if name == "overlaps":
        return pa.concat_arrays([_overlaps(choices) for choices in each])
    required = {"id": "ids", "sequence": "sequences", "picked": "picked", "probability": "probabilities"}
    if name in required:
        values = np.concatenate([getattr(choices, required[name]) for choices in each])
        return pa.array(values.astype(SCHEMA.field(name).type.to_pandas_dtype(), copy=False))
    known = [_known(choices, name) for choices in each]
    masks = np.concatenate([~there for _, there in known])
    return pa.array(np.concatenate([values for values, _ in known]), SCHEMA.field(name).type, mask=masks)


def _known(choices: Choices, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values (N,), which of them are there (N,) bool) of a column that may have none."""
    values = {
        "utility": choices.utilities,
        "standing": choices.standing,
        "exposures": choices.exposures,
        "squared_norm": choices.squared_norms,
    }[name]
    if values is None:
        dtype = SCHEMA.field(name).type.to_pandas_dtype()
        return np.zeros(len(choices.ids), dtype=dtype), np.zeros(len(choices.ids), dtype=bool)
    if name in ("utility", "squared_norm") and choices.scored is not None:
        return values, choices.scored
    return values, np.ones(len(values), dtype=bool)


def _overlaps(choices: Choices) -> pa.Array:
    """A list (N,) for each that was chosen, null for the others."""
    size, kind = len(choices.ids), SCHEMA.field("overlaps").type
    if choices.chosen is None or choices.overlaps is None:
        return pa.nulls(size, kind)
    lengths = np.zeros(size, dtype=np.int32)
    lengths[choices.chosen] = size
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = pa.array(choices.overlaps[np.argsort(choices.chosen)].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, kind, mask=pa.array(lengths == 0))


def _write(table: pa.Table, path: Path) -> None:
    """``table`` as ``path``, all of it or nothing; who reads the folder skips names that begin with a dot."""
    temporary = path.with_name(f".{path.stem}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=_DICTIONARY,
            column_encoding={
                "id": "DELTA_BINARY_PACKED",
                "sequence": "DELTA_BINARY_PACKED",
                **dict.fromkeys(_SPLIT, "BYTE_STREAM_SPLIT"),
            },
        )
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error}); make room, then start again") from error
