"""Data sets of the Hugging Face hub as sources, streamed; and folders that have the form of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopus.corpus_tools.sources import HUB, Source, needed
from megaopus.errors import DataError


@dataclass(frozen=True, slots=True)
class HubSource(Source):
    """``hf:NAME[:CONFIG[:SPLIT]]``; NAME is on the hub, or a folder of data files, or one that ``datasets`` saved.

    The split is ``train`` if none is named. Its digest is of the documents, not of files.
    """

    @property
    def _parts(self) -> tuple[str, str | None, str]:
        name, config, split = [*str(self.path).removeprefix(HUB).split(":"), "", ""][:3]
        return name, config or None, split or "train"

    @property
    def name(self) -> str:
        """Name, configuration and split; of a folder, its own name in place of the path."""
        name, config, split = self._parts
        return ":".join([Path(name).name if Path(name).is_dir() else name, *([config] if config else []), split])

    @property
    def unit(self) -> str:
        """What its documents are numbered by in messages."""
        return "row"

    @property
    def single_domain(self) -> str:
        """Domain of documents whose rows name none."""
        return self.domain or Path(self._parts[0]).name

    def files(self) -> list[tuple[str, Path]]:
        """None that are ours to read."""
        return []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row, in order.

        Raises:
            DataError: the package is missing, or the data set cannot be had.
        """
        datasets = needed("datasets", str(self.path))
        name, config, split = self._parts
        try:
            if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(name)
                found = saved if (Path(name) / "state.json").is_file() else saved[split]
            else:
                found = datasets.load_dataset(name, config, split=split, streaming=True)
            yield from found
        except DataError:
            raise
        except Exception as error:  # the library, and those beneath it, raise errors of many kinds
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            remedy = "check the name, configuration and split, and the connection or HF_HOME"
            raise DataError(f"{self.path}: cannot be read ({said}); {remedy}") from error
