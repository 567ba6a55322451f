"""Reads parquet files, no more than a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator

from megaopus.corpus_tools.readers.registry import Reader, Row, register_reader
from megaopus.corpus_tools.readers.stored import DAMAGED, FaultyError, Stored, needed, no_text_field
from megaopus.errors import DataError


def _rows(stored: Stored) -> Iterator[Row]:
    """Rows with those of the wanted columns that there are, or all."""
    path, wanted = stored.path, stored.wanted
    parquet = needed("pyarrow.parquet", str(path))
    arrow = needed("pyarrow", str(path))
    try:
        stored.pass_bytes()
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        here = [
            name for name in wanted or () if name in names or name.partition(".")[0] in names
        ]  # of a column's parts
        if wanted is not None and stored.text_field not in here:
            raise no_text_field(str(path), stored.text_field, names)
        columns = None if wanted is None else here
        batches = file.iter_batches(batch_size=1024, columns=columns)
        for number, values in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield Row(number, f"{path} row {number}", values)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of the file's format
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
        message = f"{path}: not a readable parquet file ({error}); copy or write it again"
        raise FaultyError(DAMAGED, message) from error


register_reader("parquet", Reader(endings=(".parquet",), rows=_rows))
