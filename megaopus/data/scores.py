"""Score columns: one number for each document of a corpus, in folders beside it that leave the corpus as it is."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.data.corpus import ROWS, Corpus
from megaopus.data.index import BLOCK, LARGE
from megaopus.data.locks import alone
from megaopus.errors import DataError

COLUMN, VALUES = "column.json", "scores.npy"
HIGHEST, LOWEST = "highest", "lowest"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Column:
    """A score of each document of a corpus."""

    name: str
    values: np.ndarray
    """(D,) float32; NaN where there is none."""
    best: str
    """Which are the best: highest or lowest."""
    digest: str
    """Of the values: what a run that is filtered by them is known by."""


def column_folder(corpus: Path, name: str) -> Path:
    """Return where column ``name`` of the corpus at ``corpus`` lies. Raises DataError for what is no folder's name."""
    if not _NAME.fullmatch(name):
        raise DataError(f"column name {name!r}: use letters, digits, '_', '-' and '.' (not in the first place)")
    place = corpus.absolute()
    return place.with_name(f"{place.name}.scores") / name


def write_column(folder: Path, corpus: Corpus, values: np.ndarray, best: str, about: dict[str, Any]) -> None:
    """Write ``values`` (D,) into ``folder``, which is still growing (``data.folder.new_folder``).

    ``about``: how they came to be, in plain values; column.json keeps it.
    """
    assert values.shape == (len(corpus),)
    found = np.ascontiguousarray(values, dtype="<f4")
    np.save(folder / VALUES, found)
    content = {"corpus": corpus.fingerprint, "documents": len(found), "best": best, "sha256": _digest(found), **about}
    (folder / COLUMN).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_column(corpus: Corpus, name: str) -> Column:
    """The column that ``score --name`` wrote, or the field of that name that ``prepare --keep`` kept.

    Raises:
        DataError: no such column, one of another corpus, one that was damaged, or a kept field that holds text.
    """
    folder = column_folder(corpus.path, name)
    if (folder / COLUMN).is_file():
        return _scored(corpus, folder)
    if name in kept_columns(corpus):
        values = _kept(corpus, name) if len(corpus) < LARGE else _mapped(corpus, name)
        return Column(name, values, HIGHEST, _digest(values))
    known = column_names(corpus)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(
        f"{corpus.path}: no score column {name!r}; {hint}it has: {', '.join(known) or 'none'}; make one with"
        f" 'python -m megaopus score --corpus {corpus.path} --name {name}'"
    )


def column_names(corpus: Corpus) -> list[str]:
    """Every column that ``load_column`` finds."""
    beside = [path.parent.name for path in column_folder(corpus.path, "any").parent.glob(f"[!.]*/{COLUMN}")]
    return sorted({*beside, *kept_columns(corpus)})


def kept_columns(corpus: Corpus) -> list[str]:
    """Fields that ``prepare --keep`` kept: every row of the document table has them all."""
    if ROWS not in corpus.manifest["files"]:
        return []
    with corpus.table().open(encoding="utf-8") as rows:
        return list(json.loads(next(rows)).get("columns", {}))


def _scored(corpus: Corpus, folder: Path) -> Column:
    again = "delete its folder and score again"
    try:
        about = json.loads((folder / COLUMN).read_text(encoding="utf-8"))
        values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        owner, best, digest = about["corpus"], about["best"], about["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: cannot be read ({type(error).__name__}: {error}); {again}") from error
    if owner != corpus.fingerprint:
        raise DataError(
            f"{folder}: scores of another corpus (fingerprint {owner[:16]}, {corpus.path} has"
            f" {corpus.fingerprint[:16]}); {again}"
        )
    if values.shape != (len(corpus),) or values.dtype != np.dtype("<f4") or _digest(values) != digest:
        raise DataError(f"{folder / VALUES}: not the {len(corpus):,} scores that were written; {again}")
    return Column(folder.name, values, best, digest)


def _mapped(corpus: Corpus, name: str) -> np.ndarray:
    """Map a kept field from a file of its own, which the first process to ask makes; in memory where it cannot."""
    path = corpus.path / f"column-{hashlib.sha256(f'{corpus.fingerprint} {name}'.encode()).hexdigest()[:16]}.npy"
    try:
        with alone(corpus.path):
            if not path.is_file():
                growing = path.with_name(f".{path.name}.partial")
                with growing.open("wb") as stream:
                    np.save(stream, _kept(corpus, name))
                growing.rename(path)
    except OSError as error:
        warnings.warn(f"{path}: {error}; each process reads {ROWS} for it", stacklevel=2)
        return _kept(corpus, name)
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def _kept(corpus: Corpus, name: str) -> np.ndarray:
    values = np.full(len(corpus), np.nan, dtype="<f4")
    with corpus.table().open(encoding="utf-8") as rows:
        for number, line in enumerate(rows):
            value = json.loads(line)["columns"][name]
            if isinstance(value, str):
                raise DataError(
                    f"{corpus.path / ROWS} row {number + 1}: {name} is the text {value!r}, not a number; filter by a"
                    " column of numbers"
                )
            if value is not None:
                values[number] = value
    return values


def _digest(values: np.ndarray) -> str:
    found = hashlib.sha256()
    for first in range(0, len(values), BLOCK):
        found.update(values[first : first + BLOCK].tobytes())
    return found.hexdigest()
