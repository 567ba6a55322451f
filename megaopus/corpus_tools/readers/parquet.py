"""Reads parquet files, no more than a row group at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megaopus.corpus_tools.readers.registry import Reader, Row, register_reader
from megaopus.corpus_tools.readers.stored import DAMAGED, FaultyError, Part, Stored, needed, no_text_field
from megaopus.corpus_tools.remote import Place, Remote, opened
from megaopus.errors import DataError

_HELD_BYTES = 32 << 20
"""Of a file in an object store that are copied here at a time, about."""


def _rows(stored: Stored) -> Iterator[Row]:
    """Rows with those of the wanted columns that there are, or all."""
    path = stored.path
    arrow = needed("pyarrow", str(path))
    try:
        for part in _stretches(stored):
            with stored.passed(part) as file:
                yield from _of_part(stored, part, file)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of the file's format
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
        message = f"{path}: not a readable parquet file ({error}); copy or write it again"
        raise FaultyError(DAMAGED, message) from error


def _stretches(stored: Stored) -> Sequence[Part | None]:
    """Say what is read one after the other: what is asked for, or of a whole file in a store some of it at a time."""
    if stored.part is None and isinstance(stored.path, Remote) and (parts := _divide(stored.path, _HELD_BYTES)):
        return parts
    return [stored.part]


def _of_part(stored: Stored, part: Part | None, file: Path | IO[bytes]) -> Iterator[Row]:
    path, wanted = stored.path, stored.wanted
    opened_file = needed("pyarrow.parquet", str(path)).ParquetFile(file)
    names = opened_file.schema_arrow.names
    here = [name for name in wanted or () if name in names or name.partition(".")[0] in names]  # of a column's parts
    if wanted is not None and stored.text_field not in here:
        raise no_text_field(str(path), stored.text_field, names)
    columns = None if wanted is None else here
    groups = None if part is None else range(part.first, part.end)
    batches = opened_file.iter_batches(batch_size=1024, columns=columns, row_groups=groups)
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, values in enumerate(rows, (part.before if part else 0) + 1):
        yield Row(number, f"{path} row {number}", values)


def _divide(path: Place, size: int) -> list[Part]:
    """Row groups in a row, of about so many bytes; none of a file that cannot be read, which reading it says."""
    parquet = needed("pyarrow.parquet", str(path))
    arrow = needed("pyarrow", str(path))
    try:
        with opened(path) as raw:
            groups = parquet.read_metadata(io.BufferedReader(raw, 1 << 16))
        starts = [_start(groups.row_group(n)) for n in range(groups.num_row_groups)]
    except (arrow.ArrowException, OSError):
        return []
    parts, first, before, rows, begin = [], 0, 0, 0, 0
    for number in range(groups.num_row_groups):
        rows += groups.row_group(number).num_rows
        last = number + 1 == groups.num_row_groups
        end = path.stat().st_size if last else starts[number + 1]  # the rest of the file belongs to the last
        if last or end - begin >= size:
            parts.append(Part(first, number + 1, before, (begin, end)))
            first, before, begin = number + 1, rows, end
    return parts


def _start(group: Any) -> int:
    """Byte at which a row group begins."""
    columns = [group.column(n) for n in range(group.num_columns)]
    return min(each.dictionary_page_offset or each.data_page_offset for each in columns)


register_reader("parquet", Reader(endings=(".parquet",), rows=_rows, divide=_divide))
