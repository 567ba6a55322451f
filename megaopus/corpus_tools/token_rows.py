"""Reads the tokens of data sets that somebody else tokenised: a column of lists in arrow or parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.corpus_tools.readers.stored import needed
from megaopus.errors import DataError

DOCUMENTS, APPEND, PACKED = "documents", "append", "packed"
"""What a row is: a document with the token that ends it, one perhaps without, or a stretch of many documents."""
COLUMN = "input_ids"
_MASK = "attention_mask"
"""Column of 0 where a row was filled up to a length."""
_ENDINGS = (".arrow", ".parquet")
_ROWS = 1024

Block = tuple[np.ndarray, np.ndarray]
"""Tokens of some whole documents, one after the other, and how many each has."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Says which files have the rows, and how they become documents."""

    files: tuple[Path, ...]
    column: str
    kind: str
    """Of rows."""
    eod: int

    def blocks(self) -> Iterator[Block]:
        """Yield the documents, some at a time; tokens are int64. Raises DataError for what is no list of tokens."""
        rows = (each for path in self.files for each in self._rows(path))
        if self.kind == PACKED:
            yield from self._cut(rows)
            return
        for tokens, lengths in rows:
            ends = np.cumsum(lengths)
            without = np.flatnonzero(tokens[ends - 1] != self.eod)
            if self.kind == APPEND and len(without):
                tokens, lengths = np.insert(tokens, ends[without], self.eod), lengths.copy()
                lengths[without] += 1
            yield tokens, lengths

    def _cut(self, rows: Iterator[Block]) -> Iterator[Block]:
        """Cut the stream that rows make together where documents end; the last gets its end, if it has none."""
        rest = np.empty(0, np.int64)
        for tokens, _ in rows:
            tokens = np.concatenate([rest, tokens])
            ends = np.flatnonzero(tokens == self.eod) + 1
            if len(ends):
                yield tokens[: ends[-1]], np.diff(ends, prepend=0)
            rest = tokens[ends[-1] :] if len(ends) else tokens
        if len(rest):
            yield np.append(rest, self.eod), np.array([len(rest) + 1])

    def _rows(self, path: Path) -> Iterator[Block]:
        """Yield the rows that have tokens, without what fills them up."""
        arrow = needed("pyarrow", str(path))
        compute = needed("pyarrow.compute", str(path))
        try:
            for batch in _batches(path, (self.column, _MASK)):
                names = batch.schema.names
                _refuse_type(path, self.column, batch)
                batch = batch.filter(compute.is_valid(batch.column(self.column)))
                lists = batch.column(self.column)
                tokens, lengths = _flat(path, self.column, lists), _lengths(lists)
                if _MASK in names and self.column != _MASK:
                    masks = batch.column(_MASK)
                    if masks.null_count or not np.array_equal(_lengths(masks), lengths):
                        raise DataError(f"{path}: {_MASK} is not as long as {self.column}; write it again")
                    kept = _flat(path, _MASK, masks) != 0
                    before = np.concatenate([[0], np.cumsum(kept)])
                    ends = np.cumsum(lengths)
                    tokens, lengths = tokens[kept], before[ends] - before[ends - lengths]
                if len(tokens):
                    yield tokens, lengths[lengths > 0]
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read ({error}); copy or write it again") from error


def rows_of(path: Path) -> tuple[Path, ...] | None:
    """Find the files of a data set: one file, what ``datasets`` saved, a folder of files. None: it is none of these.

    Raises DataError for a folder that has several data sets, or no such file.
    """
    if not path.is_dir():
        return (path,) if path.suffix in _ENDINGS and path.is_file() else None
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise DataError(f"{path}: has several data sets; name one of them, {path}/{names[0]} say ({', '.join(names)})")
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return tuple(path / each["filename"] for each in state["_data_files"])
    found = sorted(each for ending in _ENDINGS for each in path.rglob(f"*{ending}"))
    if not found:
        raise DataError(f"{path}: no {' or '.join(_ENDINGS)} file in it; name a data set, or a file of tokens")
    return tuple(found)


def _batches(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    """Read some rows at a time of those columns that there are."""
    arrow = needed("pyarrow", str(path))
    if path.suffix == ".parquet":
        file = needed("pyarrow.parquet", str(path)).ParquetFile(path)
        here = [name for name in columns if name in file.schema_arrow.names]
        yield from file.iter_batches(_ROWS, columns=here)
        return
    with arrow.memory_map(str(path)) as source:
        try:
            yield from arrow.ipc.open_stream(source)
        except arrow.ArrowInvalid:
            file = arrow.ipc.open_file(source)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))


def _refuse_type(path: Path, column: str, batch: Any) -> None:
    """Raise DataError unless a column is of lists of whole numbers."""
    types = needed("pyarrow", str(path)).types
    if column not in batch.schema.names:
        names = ", ".join(batch.schema.names) or "none of the two that are looked for"
        raise DataError(f"{path}: no column {column!r} (columns: {names}); name that of the token ids with --column")
    kind = batch.schema.field(column).type
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not lists or not types.is_integer(kind.value_type):
        raise DataError(f"{path}: column {column!r} is of {kind}, not of lists of token ids; name another: --column")


def _flat(path: Path, column: str, lists: Any) -> np.ndarray:
    """Give all values of a column of lists, one after the other. Raises DataError if one is null."""
    values = lists.flatten()
    if values.null_count:
        raise DataError(f"{path}: column {column!r} has null in its lists; write it again without")
    return values.to_numpy(zero_copy_only=False).astype(np.int64)


def _lengths(lists: Any) -> np.ndarray:
    compute = needed("pyarrow.compute", "")
    return compute.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
