"""Reads data sets of the Hugging Face hub, streamed; and folders that have the form of one.

``hf:NAME[:CONFIG[:SPLIT]]``; NAME is on the hub, or a folder of data files, or one that ``datasets`` saved. The split
is ``train`` if none is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megaopus.corpus_tools.readers.registry import Reader, Row, register_reader
from megaopus.corpus_tools.readers.stored import Stored, needed
from megaopus.errors import DataError

HUB = "hf:"


def _parts(address: str) -> tuple[str, str | None, str]:
    """Name, configuration and split."""
    name, config, split = [*address.removeprefix(HUB).split(":"), "", ""][:3]
    return name, config or None, split or "train"


def _name(address: str) -> str:
    """Name, configuration and split; of a folder, its own name in place of the path."""
    name, config, split = _parts(address)
    return ":".join([Path(name).name if Path(name).is_dir() else name, *([config] if config else []), split])


def _rows(stored: Stored) -> Iterator[Row]:
    """Every row, in order. Raises DataError: the package is missing, or the data set cannot be had."""
    datasets = needed("datasets", str(stored.path))
    name, config, split = _parts(str(stored.path))
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            found = saved if (Path(name) / "state.json").is_file() else saved[split]
        else:
            found = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, values in enumerate(found, 1):
            yield Row(number, f"{stored.path} row {number}", values)
    except DataError:
        raise
    except Exception as error:  # the library, and those beneath it, raise errors of many kinds
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        remedy = "check the name, configuration and split, and the connection or HF_HOME"
        raise DataError(f"{stored.path}: cannot be read ({said}); {remedy}") from error


register_reader("hub", Reader(prefix=HUB, rows=_rows, name=_name, domain=lambda address: Path(_parts(address)[0]).name))
