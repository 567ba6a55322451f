"""Reads the items of evaluation tasks from files of a folder, so that nothing is asked of a network."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopus.errors import DataError
from megaopus.evaluation.task_list import OTHER_NAMES

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SPLIT_WORDS: Mapping[str, tuple[str, ...]] = {
    "test": ("test",),
    "validation": ("validation", "valid", "val", "dev"),
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val"),
}
"""Split -> how the names of files write it."""
PARTS = ("subject", "subset", "config", "dataset_name", "round", "task", "category")
"""Columns by which the file of a group of tasks (mmlu, bbh) says which of them an item is of."""
PROMPT, CHOICES, RIGHT = "query", "choices", ("gold", "label")
"""Columns of items whose prompt is whole already: it, the answers, the number of the right one."""


@dataclass(frozen=True, slots=True)
class Items:
    """Holds the items of one task."""

    file: Path
    rows: list[dict[str, Any]]

    @property
    def right(self) -> str | None:
        """The column with the right answer's number, if the items have a whole prompt; None: they have not."""
        first = self.rows[0]
        if isinstance(first.get(PROMPT), str) and isinstance(first.get(CHOICES), list):
            return next((name for name in RIGHT if isinstance(first.get(name), int)), None)
        return None


class LocalData:
    """Finds the files FOLDER/TASK[_SPLIT].jsonl, .jsonl.gz or .parquet."""

    def __init__(self, folder: Path):
        """Raises DataError if there is no such folder."""
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; --data names one with files TASK_SPLIT.jsonl")
        self._folder = folder
        self._read: dict[Path, list[dict[str, Any]]] = {}

    def items(self, task: str, group: str, part: str | None, split: str, *, evaluated: bool) -> Items | None:
        """Read the items of a split of ``task``, which may be a part of ``group``.

        A file of the task's own comes first; in one of the group's, items are the task's whose column (one of
        ``PARTS``) has ``part``, the part's name in its data set, or the end of the task's name. ``evaluated``: the
        split whose items are scored; it may lie in TASK.jsonl. None: the group's file has no item of this part. Raises
        DataError if there is no file, or it cannot be read.
        """
        if (file := self._file(task, split, evaluated)) is not None:
            return Items(file, self._rows(file))
        if group == task or (file := self._file(group, split, evaluated)) is None:
            words = " or ".join(f"{name}_{self._words(split)[0]}.jsonl" for name in dict.fromkeys((task, group)))
            what = "" if evaluated else f" (few-shot examples are of its split {split})"
            raise DataError(f"{self._folder}: no file {words} ([.gz], or .parquet) for task {task}{what}")
        known = {part, task, task.removeprefix(f"{group}_")} - {None}
        rows = [row for row in self._rows(file) if known & {row.get(name) for name in PARTS if _is_word(row.get(name))}]
        if rows or any(_is_word(row.get(name)) for row in self._rows(file) for name in PARTS):
            return Items(file, rows) if rows else None
        raise DataError(f"{file}: no column ({', '.join(PARTS)}) says which part of {group} an item is of")

    def has(self, task: str, group: str, split: str) -> bool:
        """Tell whether there is a file of this split."""
        return any(self._file(name, split, False) is not None for name in (task, group))

    def _words(self, split: str) -> tuple[str, ...]:
        """Say how a split is written: one of several of its kind (test_r1) by its own name, or as its kind."""
        kind = next((kind for kind in SPLIT_WORDS if split == kind or split.startswith(f"{kind}_")), split)
        return tuple(dict.fromkeys((split, *SPLIT_WORDS.get(kind, ()))))

    def _file(self, task: str, split: str, evaluated: bool) -> Path | None:
        """The file of a split; a name may go on after the split's (piqa_val_subset). Raises DataError for several."""
        names = [task, *(other for other, known in OTHER_NAMES.items() if known == task)]
        stems = [f"{name}_{word}" for name in names for word in self._words(split)]
        for stem in [*stems, *(names if evaluated else ())]:
            for suffix in SUFFIXES:
                if (self._folder / f"{stem}{suffix}").is_file():
                    return self._folder / f"{stem}{suffix}"
        found = sorted({path for stem in stems for end in SUFFIXES for path in self._folder.glob(f"{stem}_*{end}")})
        if len(found) > 1:
            listed = ", ".join(path.name for path in found)
            raise DataError(f"{self._folder}: several files may be the {split} split of {task}: {listed}; leave one")
        return found[0] if found else None

    def _rows(self, file: Path) -> list[dict[str, Any]]:
        if file not in self._read:
            self._read[file] = _same_columns(file, _parquet(file) if file.suffix == ".parquet" else _json_lines(file))
        return self._read[file]


def _same_columns(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the columns of the first. Raises DataError where one is missing: a prompt would say None."""
    if not rows:
        raise DataError(f"{file}: no item in it")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in rows[0] if name not in row]:
            raise DataError(f"{file}, item {number}: no {missing[0]!r}, which the first has")
    return [{name: row[name] for name in rows[0]} for row in rows]


def _is_word(value: object) -> bool:
    return isinstance(value, str)


def _parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: not a whole Parquet file ({error})") from error


def _json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{file}, line {number}: not an object")
                    rows.append(row)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{file}, line {len(rows) + 1}: cannot be read ({error})") from error
    return rows
