"""Runs read back from their folders, and how much sooner one arm gets where another ended.

Two arms continue one checkpoint ("uniform" and, say, "opus"). Over the stretch after it, uniform's validation loss
falls to a final value; the ratios say after which fraction of uniform's update tokens, or seconds, the arm is there.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megaopus.config.aliases import renamed
from megaopus.errors import DataError
from megaopus.evaluation.noise import student_t_p
from megaopus.events import Event, read_event
from megaopus.record.metrics import read_record
from megaopus.record.sinks import EVENTS_FILE, read_rows
from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord

SEED_NOISE = 0.05
"""Nats: differences of final losses that are smaller say nothing with one seed. Twice the median standard deviation,
over seeds, of such a difference paired by seed (.024 over the 36 arms of ``benchmarks/quality.py --no-training``)."""

MOST_SUGGESTED = 8
"""Run folders that an error names."""

Record = TypeVar("Record", StepRecord, SelectionRecord, ValidationRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Holds what a run folder says; all but steps and validations are empty where their file is absent."""

    name: str
    path: Path
    steps: list[StepRecord]
    validations: list[ValidationRecord]
    selections: list[SelectionRecord]
    config: dict[str, Any]
    environment: dict[str, Any]
    events: list[tuple[int, Event]] = field(default_factory=list)
    """(step, event) of those that are not the selection's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One arm against uniform after ``start_step`` updates; losses are means over the last ``window`` validations."""

    start_step: int
    window: int
    tokens_ratio: float | None
    """Share of uniform's update tokens after which the arm's loss equals uniform's final one; None: never."""
    time_ratio: float | None
    """The same in seconds of data, selection and training; None: never."""
    self_ratio: float | None
    """tokens_ratio of uniform against itself: 1 unless noise crosses the final loss early; None: it did not fall."""
    overhead: float
    """The arm's seconds of selection over its other seconds of training."""
    uniform_fall: float
    """By how much uniform's loss falls over the stretch; on a plateau the ratios mean nothing."""
    uniform_final_loss: float
    final_loss: float
    uniform_final_domains: dict[str, float]
    final_domains: dict[str, float]
    start_gap: float
    """Difference of the arms' losses at ``start_step``; 0 where they continue one checkpoint."""
    reached_tokens: float | None
    """Update tokens on the arm's own count (from step 0) where it reaches uniform's final loss."""
    reached_time_s: float | None

    @property
    def measurable(self) -> bool:
        """Tell whether the final losses differ by more than another seed would change; else one seed shows nothing."""
        return not abs(self.final_loss - self.uniform_final_loss) < SEED_NOISE


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """Comparisons over seeds: means and sample standard deviations (None for one seed)."""

    seeds: int
    reached: int
    """Seeds in which the arm reached uniform's final loss."""
    tokens_ratio: float | None
    """None unless every seed reached it: a mean over the lucky ones would flatter."""
    tokens_ratio_std: float | None
    time_ratio: float | None
    time_ratio_std: float | None
    overhead: float
    uniform_fall: float
    uniform_final_loss: float
    uniform_final_loss_std: float | None
    final_loss: float
    final_loss_std: float | None
    p_value: float | None
    """Two-sided paired t-test between the arms' final losses, paired by seed; None for one seed."""


def load_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run folder; ``name`` defaults to the folder's. A half-written last line of a live run is left out.

    Raises DataError, with file and line, for a missing folder or metrics.jsonl and for anything that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such run folder; name the run_dir of a 'python -m megaopus train'")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(
            f"{metrics}: missing, so {path} is not a run folder or its run never began a step{_within(path)}"
        )
    steps: list[StepRecord] = []
    validations: list[ValidationRecord] = []
    for number, _, row in read_rows(metrics):
        kind = row.pop("kind", None)
        if kind == "step":
            steps.append(_record(StepRecord, row, metrics, number))
        elif kind == "validation":
            validations.append(_record(ValidationRecord, row, metrics, number))
        else:
            raise DataError(f"{metrics}, line {number}: kind {kind!r} is neither 'step' nor 'validation'")
    _check_order(steps, metrics, "step")
    _check_order(validations, metrics, "validation")
    return Run(
        name=name or path.resolve().name,
        path=path,
        steps=steps,
        validations=validations,
        selections=_load_selections(path / "selection.jsonl"),
        events=_load_events(path / EVENTS_FILE),
        config=renamed(_load_mapping(path / "config.yaml", yaml.safe_load)),
        environment=_load_mapping(path / "environment.json", json.loads),
    )


def _within(path: Path) -> str:
    """Suggest the run folders that lie in ``path``, or in a folder of it."""
    runs = sorted(each.parent for depth in ("*", "*/*") for each in path.glob(f"{depth}/metrics.jsonl"))
    if not runs:
        return ""
    more = f" and {len(runs) - MOST_SUGGESTED} more" if len(runs) > MOST_SUGGESTED else ""
    return f"; there are runs in it, name those: {' '.join(map(str, runs[:MOST_SUGGESTED]))}{more}"


def share_changed(rows: Sequence[SelectionRecord]) -> float | None:
    """Average the share of picks that utilities changed over the steps that say it; None: none does."""
    said = [row.changed_by_utilities for row in rows if row.changed_by_utilities is not None]
    return sum(said) / len(said) if said else None


def with_step_seconds(run: Run, seconds: float) -> Run:
    """Give ``run`` as it would be had each of its steps taken ``seconds``, the same part of them for selection."""
    recorded = sum(record.step_s for record in run.steps) / len(run.steps)
    steps = [
        replace(
            record,
            time_s=(record.step + 1) * seconds,
            step_s=seconds,
            select_s=record.select_s * seconds / recorded,
        )
        for record in run.steps
    ]
    return replace(
        run, steps=steps, validations=[replace(record, time_s=record.step * seconds) for record in run.validations]
    )


def _record(kind: type[Record], row: dict[str, Any], path: Path, line: int) -> Record:
    try:
        return read_record(kind, row)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, line {line}: {error}") from error


def _check_order(records: Sequence[Record], path: Path, kind: str) -> None:
    for before, after in itertools.pairwise(records):
        if after.step <= before.step:
            raise DataError(
                f"{path}: {kind} {after.step} follows {kind} {before.step}; was it written by two runs at once?"
            )


def _load_selections(path: Path) -> list[SelectionRecord]:
    if not path.is_file():
        return []
    return [_record(SelectionRecord, row, path, number) for number, _, row in read_rows(path)]


def _load_events(path: Path) -> list[tuple[int, Event]]:
    if not path.is_file():
        return []
    found = []
    for number, _, row in read_rows(path):
        try:
            found.append((int(row["step"]), read_event(row["event"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: no step and event in it ({error})") from error
    return found


def _load_mapping(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to ``window`` - 1 before it; same length as ``values``.

    Trailing, not centred: the last value is then a mean over a full window like its neighbours, no point looks ahead
    of where a run would have to stop, and the lag counts against the arm that falls faster.
    """
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


@dataclass(frozen=True, slots=True)
class Curve:
    """Smoothed validation loss over the stretch; tokens and seconds count from its start."""

    tokens: list[float]
    time_s: list[float]
    losses: list[float]
    raw: list[float]  # the losses before smoothing
    domains: dict[str, float]  # final, smoothed
    held_out: dict[str, float]  # the same of each part of a held-out target
    start_tokens: float
    start_time_s: float
    window: int

    @property
    def mean_loss(self) -> float:
        """Average the domains, which count alike; not a number where there are none."""
        return _mean(list(self.domains.values())) if self.domains else math.nan

    def reach(self, target: float) -> tuple[float, float] | None:
        """(tokens, seconds) at which the loss first is ``target`` or less, linear between points; None: never."""
        for index, loss in enumerate(self.losses):
            if loss <= target:
                before = self.losses[index - 1] if index else math.nan
                if not math.isfinite(before):
                    return self.tokens[index], self.time_s[index]
                part = (before - target) / (before - loss)
                return (
                    self.tokens[index - 1] + part * (self.tokens[index] - self.tokens[index - 1]),
                    self.time_s[index - 1] + part * (self.time_s[index] - self.time_s[index - 1]),
                )
        return None


def stretch_start(run: Run, start_step: int) -> tuple[float, float]:
    """(tokens, seconds) of ``run`` after ``start_step`` updates. Raises DataError if its records do not cover it."""
    if not run.steps or run.steps[-1].step < start_step:
        raise DataError(
            f"{run.path}: no update after start step {start_step} was recorded; train longer or start earlier"
        )
    first = run.steps[0]
    if first.step > start_step:
        raise DataError(f"{run.path}: its first recorded update is {first.step}, after the start step {start_step}")
    for record in run.steps:
        if record.step == start_step - 1:
            return record.tokens, record.time_s
    # The run began here from another folder's checkpoint, or from nothing. Every step has the same batch.
    return first.tokens * (start_step / (start_step + 1)), first.time_s - first.step_s


def validation_at(run: Run, step: int) -> ValidationRecord | None:
    """The validation of ``run`` after ``step`` updates, if there was one."""
    return next((record for record in run.validations if record.step == step), None)


def stretch_curve(run: Run, start_step: int, window: int, start: ValidationRecord | None = None) -> Curve:
    """The curve ``compare`` uses; ``start``: the validation at ``start_step``, if any. Raises DataError as it does."""
    tokens, time_s = stretch_start(run, start_step)
    records = [record for record in run.validations if record.step > start_step]
    if not records:
        raise DataError(f"{run.path}: no validation after step {start_step}; set train.eval_every")
    points = ([start] if start else []) + records
    losses = [record.loss for record in points]
    if records[-1].tokens <= tokens or records[-1].time_s <= time_s:
        raise DataError(f"{run.path}: its counts of tokens and seconds do not grow after step {start_step}")
    origin = [0.0] if start else []
    return Curve(
        tokens=origin + [record.tokens - tokens for record in records],
        time_s=origin + [record.time_s - time_s for record in records],
        losses=trailing_mean(losses, window),
        raw=losses,
        domains=_finals([record.domains for record in points[-window:]]),
        held_out=_finals([record.held_out for record in points[-window:]]),
        start_tokens=tokens,
        start_time_s=time_s,
        window=window,
    )


def _finals(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average what the last row has over the rows that have it."""
    return {name: _mean([row[name] for row in rows if name in row]) for name in rows[-1]}


def compare(uniform: Run, arm: Run, start_step: int = 0, window: int = 3) -> Comparison:
    """Return how much sooner ``arm`` reaches the loss at which ``uniform`` ends, after ``start_step`` common updates.

    Both losses are trailing means over ``window`` validation points of the stretch and linear between them. Both
    curves begin with the validation at ``start_step``, taken from the other arm where one has none (they share the
    checkpoint); if neither has, at their first later point. Ratios are None, never infinite, when the loss is not
    reached or uniform did not fall. Raises DataError if a run does not cover the stretch.
    """
    starts = [validation_at(run, start_step) for run in (uniform, arm)]
    base = stretch_curve(uniform, start_step, window, starts[0] or starts[1])
    other = stretch_curve(arm, start_step, window, starts[1] or starts[0])
    target = base.losses[-1]
    fall = base.losses[0] - target
    reached = other.reach(target) if fall > 0 else None
    itself = base.reach(target) if fall > 0 else None
    after = [record for record in arm.steps if record.step >= start_step]
    select_s = sum(record.select_s for record in after)
    train_s = sum(record.step_s for record in after) - select_s
    if train_s <= 0:
        raise DataError(f"{arm.path}: its steps after {start_step} took no time beside selection; step_s is wrong")
    return Comparison(
        start_step=start_step,
        window=window,
        tokens_ratio=reached[0] / base.tokens[-1] if reached else None,
        time_ratio=reached[1] / base.time_s[-1] if reached else None,
        self_ratio=itself[0] / base.tokens[-1] if itself else None,
        overhead=select_s / train_s,
        uniform_fall=fall,
        uniform_final_loss=target,
        final_loss=other.losses[-1],
        uniform_final_domains=base.domains,
        final_domains=other.domains,
        start_gap=abs(starts[0].loss - starts[1].loss) if starts[0] and starts[1] else 0.0,
        reached_tokens=other.start_tokens + reached[0] if reached else None,
        reached_time_s=other.start_time_s + reached[1] if reached else None,
    )


def aggregate(comparisons: Sequence[Comparison]) -> Aggregate:
    """Means over seeds; one comparison per seed."""
    if not comparisons:
        raise ValueError("nothing to aggregate")
    tokens = [c.tokens_ratio for c in comparisons if c.tokens_ratio is not None]
    times = [c.time_ratio for c in comparisons if c.time_ratio is not None]
    uniform = [c.uniform_final_loss for c in comparisons]
    arm = [c.final_loss for c in comparisons]
    everywhere = len(tokens) == len(comparisons)
    return Aggregate(
        seeds=len(comparisons),
        reached=len(tokens),
        tokens_ratio=_mean(tokens) if everywhere else None,
        tokens_ratio_std=_std(tokens) if everywhere else None,
        time_ratio=_mean(times) if everywhere else None,
        time_ratio_std=_std(times) if everywhere else None,
        overhead=_mean([c.overhead for c in comparisons]),
        uniform_fall=_mean([c.uniform_fall for c in comparisons]),
        uniform_final_loss=_mean(uniform),
        uniform_final_loss_std=_std(uniform),
        final_loss=_mean(arm),
        final_loss_std=_std(arm),
        p_value=paired_t_test(uniform, arm) if len(comparisons) > 1 else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t-test on (n,) and (n,), n >= 2; 1 if no pair differs.

    p = I_x(df / 2, 1 / 2) with x = df / (df + t^2), df = n - 1 (Abramowitz and Stegun 26.7.1 and 26.5.27).
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    std = _std(differences)
    if std is None:
        raise ValueError("a paired t-test needs two pairs or more")
    mean = _mean(differences)
    if std == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean / (std / math.sqrt(len(differences)))
    return student_t_p(t, len(differences) - 1)
