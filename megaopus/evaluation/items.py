"""Reads what evaluations leave behind: scores of tasks (eval.json, eval.jsonl), and what each item added to them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.errors import DataError
from megaopus.record.sinks import read_rows

EVALUATION_FILE, HISTORY_FILE, ITEMS_FOLDER = "eval.json", "eval.jsonl", "eval_items"
CONTAMINATION_FILE = "contamination.json"
FORMAT = 1
BITS = "bits_per_byte"
"""Of the right answer: -log2 of its probability after the prompt, by the bytes of the continuation that it is."""
ACCURACIES = ("acc", "acc_norm", "exact_match")
"""Metrics that are the mean of their items in every task; of others that is looked at."""
_AGAIN = "evaluate again"
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Holds the value of one metric of one task, over ``n`` items."""

    task: str
    metric: str
    n: int
    value: float
    stderr: float | None
    """Of the sampling of items; None: not known."""
    higher_is_better: bool
    headline: bool
    """The metric that a table shows if it has room for one."""
    protocol: str
    prompts: str
    """Hash of the prompts: scores of other prompts are not to be compared."""
    num_fewshot: int | None = None
    part_of: str | None = None
    """The group that the task belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLoss:
    """Holds the loss on one domain of a corpus."""

    corpus: str
    split: str | None
    """None: all of it, which is no prepared corpus."""
    domain: str
    sequences: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float | None
    stderr: float | None
    """Of ``nats_per_token``."""


@dataclass(frozen=True, slots=True)
class Items:
    """Holds what each item of a task added to its metrics, in the order of the data."""

    names: tuple[str, ...]
    """A hash of each document; the second of two equal documents has "/1" behind it, and so on."""
    values: Mapping[str, np.ndarray]
    """Metric -> (n,) float64; nan for an item without a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Holds the scores of one model."""

    path: Path
    """The file that says so."""
    step: int | None
    """Updates that the model had; None: not known."""
    scores: Mapping[tuple[str, str], Score]
    """By (task, metric), in order."""
    items_folder: Path
    perplexity: Sequence[DomainLoss] = ()
    tokens: int | None = None
    """Update tokens so far; None: not known."""

    def parts(self, task: str) -> list[str]:
        """Name the tasks that are directly part of a group; none for a task of its own."""
        return list(dict.fromkeys(each.task for each in self.scores.values() if each.part_of == task))

    def items(self, task: str) -> Items | None:
        """Read a task's items; None where none were kept. Raises DataError as ``read_items``."""
        path = self.items_folder / f"{task}.jsonl"
        return read_items(path) if path.is_file() else None

    def values(self, task: str, metric: str) -> tuple[tuple[str, ...], np.ndarray] | None:
        """(names, values (n,)) of the items that a score is the mean of; None where it is no mean, or none were kept.

        Raises DataError where items and score are of two evaluations.
        """
        score, items = self.scores[task, metric], self.items(task)
        if items is None or metric not in items.values:
            return None
        there = np.isfinite(items.values[metric])
        values = items.values[metric][there]
        mean = float(values.mean()) if len(values) else math.nan
        fits = abs(mean - score.value) <= _TOLERANCE * max(1.0, abs(score.value))
        if len(values) != score.n or (metric in ACCURACIES and not fits):
            raise DataError(
                f"{self.items_folder / task}.jsonl: its {len(values)} items have a mean {metric} of {mean:.6g}, "
                f"{self.path} says {score.value:.6g} over {score.n}: they are of two evaluations; {_AGAIN}"
            )
        return (tuple(name for name, kept in zip(items.names, there, strict=True) if kept), values) if fits else None


def read_evaluation(path: Path) -> Evaluation:
    """Read an ``eval.json``. Raises DataError, with the row, for what is missing or of another form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        has = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: format {has!r}, this megaopus reads {FORMAT}; {_AGAIN}")
    scores = [_score(row, f"{path}, row {at}") for at, row in enumerate(content.get("rows") or [])]
    losses = [_loss(row, f"{path}, perplexity {at}") for at, row in enumerate(content.get("perplexity") or [])]
    return Evaluation(
        path=path,
        step=None if content.get("step") is None else _whole(content, "step", str(path)),
        scores=_by_name(scores, str(path)),
        items_folder=path.with_name(f"{path.stem}_items"),
        perplexity=losses,
    )


def read_history(run_folder: Path) -> list[Evaluation]:
    """Read the evaluations during training from a run's ``eval.jsonl``, by step; none where there is no such file.

    Raises DataError, with the line, for what is missing or of another form. A half-written last line is left out.
    """
    path = run_folder / HISTORY_FILE
    if not path.is_file():
        return []
    found: dict[int, list[Score]] = {}
    tokens: dict[int, int] = {}
    for number, _, row in read_rows(path):
        where = f"{path}, line {number}"
        step = _whole(row, "step", where)
        found.setdefault(step, []).append(_score(row, where))
        tokens[step] = _whole(row, "tokens", where)
    return [
        Evaluation(
            path=path,
            step=step,
            scores=_by_name(found[step], f"{path}, step {step}"),
            items_folder=run_folder / ITEMS_FOLDER / f"step_{step:08d}",
            tokens=tokens[step],
        )
        for step in sorted(found)
    ]


def read_items(path: Path) -> Items:
    """Read the items of a task. Raises DataError, with the line, for what is missing or no number."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    return _read_items(path, state.st_mtime_ns, state.st_size)


@lru_cache(1024)
def _read_items(path: Path, written_ns: int, size: int) -> Items:
    names: list[str] = []
    columns: dict[str, list[float]] = {}
    times: dict[str, int] = {}
    for number, _, row in read_rows(path):
        where = f"{path}, line {number}"
        name = _text(row, "item", where)
        again = times[name] = times.get(name, -1) + 1
        names.append(f"{name}/{again}" if again else name)
        for metric in row.keys() - {"item", "doc_id", "text"}:
            column = columns.setdefault(metric, [math.nan] * (len(names) - 1))
            column.append(math.nan if row[metric] is None else _number(row, metric, where))
        for column in columns.values():
            column.extend([math.nan] * (len(names) - len(column)))
    return Items(tuple(names), {metric: np.array(values) for metric, values in columns.items()})


def item_texts(items_folder: Path) -> dict[str, list[str]]:
    """Read prompt and right answer of every item, by task, from an ``eval_items`` folder.

    Raises DataError where there are none, and for an item without a text.
    """
    files = sorted(items_folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{items_folder}: no items of an evaluation; run 'python -m megaopus eval' first")
    return {
        file.stem: [_text(row, "text", f"{file}, line {number}") for number, _, row in read_rows(file)]
        for file in files
    }


def _by_name(scores: Sequence[Score], where: str) -> dict[tuple[str, str], Score]:
    found: dict[tuple[str, str], Score] = {}
    for score in scores:
        if found.setdefault((score.task, score.metric), score) is not score:
            raise DataError(f"{where}: {score.metric} of {score.task} is there twice; {_AGAIN}")
    return found


def _score(row: Any, where: str) -> Score:
    return Score(
        task=_text(row, "task", where),
        metric=_text(row, "metric", where),
        protocol=_text(row, "protocol", where),
        prompts=_text(row, "prompts", where),
        n=_whole(row, "n", where),
        value=_number(row, "value", where),
        stderr=_maybe(row, "stderr", where),
        higher_is_better=bool(row.get("higher_is_better", True)),
        headline=bool(row.get("headline", False)),
        num_fewshot=row.get("num_fewshot"),
        part_of=row.get("part_of"),
    )


def _loss(row: Any, where: str) -> DomainLoss:
    return DomainLoss(
        corpus=_text(row, "corpus", where),
        split=row.get("split"),
        domain=_text(row, "domain", where),
        sequences=_whole(row, "sequences", where),
        tokens=_whole(row, "tokens", where),
        nats_per_token=_number(row, "nats_per_token", where),
        bits_per_byte=_maybe(row, "bits_per_byte", where),
        stderr=_maybe(row, "stderr", where),
    )


def _text(row: Any, name: str, where: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{where}: no text under {name!r}; {_AGAIN}")
    return value


def _maybe(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = None if row.get(name) is None else _number(row, name, where)
    return None if value is None or math.isnan(value) else value


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    """Read a number, a truth value as 0 or 1, or the name of a non-finite one, as the record writes them."""
    value = row.get(name)
    try:
        if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
            raise ValueError(value)
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name} is {value!r}, not a number; {_AGAIN}") from error


def _whole(row: Mapping[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}: {name} is {value!r}, not a whole number; {_AGAIN}")
    return value


def read_contamination(run_folder: Path) -> dict[str, Any] | None:
    """Read a run's ``contamination.json``, as ``contamination.py`` writes it; None where there is none.

    Raises DataError for a file that cannot be read or is of another form.
    """
    path = run_folder / CONTAMINATION_FILE
    if not path.is_file():
        return None
    again = "find it again with 'python -m megaopus eval RUN --contamination'"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {again}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("tasks"), list):
        raise DataError(f"{path}: not of the form that this megaopus reads; {again}")
    return found
