"""Keeps what an evaluation found, task by task: a table as JSON, and beside it a file of items for each task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaopus.errors import DataError
from megaopus.evaluation.items import FORMAT
from megaopus.evaluation.scored import Score, Scored, headline, of_group
from megaopus.evaluation.tasks import Part
from megaopus.fs import write_whole

_FIXED = ("model", "weights", "step", "protocol")
"""Entries of a file that say what was evaluated; ``settings`` say how."""


def item_folder(file: Path) -> Path:
    """Say where the items of an evaluation lie: ``eval_items`` beside ``eval.json``."""
    return file.with_name(f"{file.stem}_items")


def rows_of(scored: Sequence[Scored], protocol: str, seed: int) -> list[dict[str, Any]]:
    """Rows of the table: of each group of parts its own first, then of each part; a row a metric."""
    rows: list[dict[str, Any]] = []
    for group in dict.fromkeys(each.part.group for each in scored):
        parts = [each for each in scored if each.part.group == group]
        alone = len(parts) == 1 and parts[0].part.name == group
        if not alone:
            told = {"num_fewshot": parts[0].num_fewshot, "prompts": _joined(parts), "part_of": None}
            rows += _rows(group, of_group(parts), told)
        for each in parts:
            own = {"num_fewshot": each.num_fewshot, "prompts": each.prompts, "part_of": None if alone else group}
            rows += _rows(each.part.name, each.scores, own)
    return [{**row, "seed": seed, "protocol": protocol} for row in rows]


def _joined(parts: Sequence[Scored]) -> str:
    return hashlib.sha256(" ".join(each.prompts for each in parts).encode()).hexdigest()[:16]


def _rows(task: str, scores: Sequence[Score], told: Mapping[str, Any]) -> list[dict[str, Any]]:
    best = headline(scores) if scores else ""
    return [{"task": task, **asdict(each), "headline": each.metric == best, **told} for each in scores]


def write_items(folder: Path, *scored: Scored) -> None:
    """Write the items of tasks, a file each, all of one or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in scored:
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in each.items)
        write_whole(folder / f"{each.part.name}.jsonl", lines)


class Results:
    """Holds a file of results that grows by a task at a time."""

    def __init__(self, file: Path, about: Mapping[str, Any], *, overwrite: bool = False):
        """Open ``file``, or begin it. ``about``: what the file says of the model and how it is asked.

        Raises DataError if it is there and is of another model, or of other settings, unless ``overwrite``.
        """
        self.file, self._about = file, dict(about)
        self._kept: dict[str, Any] = {}
        if file.exists() and not overwrite:
            found = _read(file)
            if wrong := [key for key in (*_FIXED, "settings") if _stated(found, key) != _stated(about, key)]:
                what = ", ".join(f"{key} {_stated(found, key)!r} (here {_stated(about, key)!r})" for key in wrong)
                raise DataError(f"{file} holds another evaluation: {what}; name another --out, or give --overwrite")
            self._kept = found
        self._scored: list[Scored] = []
        self._done: dict[str, str] = {}

    def kept(self, part: Part, key: str) -> Scored | None:
        """Take over what the file has of a task that was asked in the same way (``key``); None: it has nothing."""
        items = item_folder(self.file) / f"{part.name}.jsonl"
        rows = [row for row in self._kept.get("rows", ()) if row["task"] == part.name]
        if self._kept.get("done", {}).get(part.name) != key or not rows or not items.is_file():
            return None
        lines = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
        names = ("metric", "n", "value", "stderr", "higher_is_better")
        scores = [Score(**{name: row[name] for name in names}) for row in rows]
        told = rows[0]
        return Scored(part=part, num_fewshot=told["num_fewshot"], prompts=told["prompts"], scores=scores, items=lines)

    def add(self, scored: Scored, key: str) -> None:
        """Take in a task."""
        self._scored.append(scored)
        self._done[scored.part.name] = key

    def add_new(self, scored: Scored, key: str) -> None:
        """Take in a task that was asked now, and write its items and the table: a kill loses none that was asked."""
        self.add(scored, key)
        write_items(item_folder(self.file), scored)
        self.write()

    def write(self, *, perplexity: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Write the table, and return it. ``perplexity``: rows of texts.

        What an earlier table had of tasks that were not taken in yet stays in it.
        """
        rows = rows_of(self._scored, self._about["protocol"], self._about["settings"]["seed"])
        others = [row for row in self._kept.get("rows", ()) if not self._told_anew(row)]
        done = {name: key for name, key in self._kept.get("done", {}).items() if name not in self._done}
        table = {"format": FORMAT, **self._about, "rows": [*rows, *others], "done": {**done, **self._done}}
        named = {(row["corpus"], row["split"]) for row in perplexity}
        before = [row for row in self._kept.get("perplexity", ()) if (row["corpus"], row["split"]) not in named]
        table["perplexity"] = [*before, *perplexity]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        return table

    def _told_anew(self, row: Mapping[str, Any]) -> bool:
        return row["task"] in self._done or row["task"] in {each.part.group for each in self._scored}


def _stated(about: Mapping[str, Any], key: str) -> Any:
    """Return what a file is compared by; which tasks were asked for is no part of it."""
    value = about.get(key)
    return {name: each for name, each in value.items() if name != "suite"} if isinstance(value, dict) else value


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); name another --out") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{file}: not a table of an evaluation of form {FORMAT}; name another --out")
    return found
