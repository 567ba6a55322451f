"""Says what a page tells of a run's choices: how utilities were spread, what stood out, how often text came again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from megaopus.record.parquet import FOLDER, parts, read_part, steps_of
from megaopus.report.compare import Run

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = 5
"""Most and least useful sequences that are kept."""
_FEWEST = 4
"""Utilities of a step below which they are not called spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The finite utilities of one step."""

    step: int
    quantiles: tuple[float, ...]
    """At ``QUANTILES``, of all that were scored."""
    picked: float | None
    """Median of the picks, if all were scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standout:
    """A sequence whose utility was far from those beside it."""

    sequence: int
    step: int
    domain: str
    utility: float
    deviations: float
    """Standard deviations from the mean of the step's utilities."""
    picked: bool


@dataclass(slots=True, kw_only=True)
class ChoiceSummary:
    """Of one run, from a step on."""

    spreads: list[Spread] = field(default_factory=list)
    best: list[Standout] = field(default_factory=list)
    worst: list[Standout] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(different sequences,) how often each was picked, over the whole run."""
    repeat_share: list[tuple[int, float]] = field(default_factory=list)
    """(step, share of its picks that the run had trained on before)."""


def summarise_choices(run: Run, start_step: int = 0) -> ChoiceSummary:
    """Read ``run``'s choices; empty where it has none. Raises DataError as ``choices.read_part``.

    A step of which only picks were kept is left out of utilities; counts begin with the run.
    """
    found = ChoiceSummary()
    candidates = {row.step: row.candidates for row in run.selections if row.step >= start_step}
    times = np.zeros(0, dtype=np.int64)  # by sequence
    columns = ["step", "sequence", "domain", "utility", "picked"]
    for path in parts(run.path / FOLDER):
        table = read_part(path, columns)
        sequences, picked = table["sequence"].to_numpy(), table["picked"].to_numpy()
        times = np.pad(times, (0, max(0, int(sequences.max(initial=-1)) + 1 - len(times))))
        utilities = np.where(table["utility"].is_valid().to_numpy(), table["utility"].to_numpy(), np.nan)
        deviations = np.full(len(table), np.nan)
        for step, rows in steps_of(table):
            chosen = sequences[rows][picked[rows]]
            if step in candidates:
                found.repeat_share.append((step, float((times[chosen] > 0).mean())))
                if candidates[step] == rows.stop - rows.start:
                    deviations[rows] = _spread(found.spreads, step, utilities[rows], picked[rows])
            times[chosen] += 1
        found.best = _standouts(found.best, table, utilities, deviations, largest=True)
        found.worst = _standouts(found.worst, table, utilities, deviations, largest=False)
    found.counts = times[times > 0]
    return found


def _spread(spreads: list[Spread], step: int, utilities: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Add a step's spread; returns the deviations of its utilities (N,), nan where there are none."""
    finite = np.isfinite(utilities)
    known = utilities[finite]
    if len(known) < _FEWEST or known.std() == 0:
        return np.full(len(utilities), np.nan)
    median = float(np.median(utilities[picked])) if finite[picked].all() else None
    quantiles = tuple(np.quantile(known, QUANTILES).tolist())
    spreads.append(Spread(step=step, quantiles=quantiles, picked=median))
    return np.where(finite, (utilities - known.mean()) / known.std(), np.nan)


def _standouts(
    before: Sequence[Standout], table: pa.Table, utilities: np.ndarray, deviations: np.ndarray, *, largest: bool
) -> list[Standout]:
    """The ``SHOWN`` largest (or smallest) deviations of ``before`` and a part, each sequence once."""
    sign = -1 if largest else 1
    order = np.argsort(sign * deviations, kind="stable")[: 4 * SHOWN]  # nan comes last
    new = [
        Standout(
            sequence=table["sequence"][at].as_py(),
            step=table["step"][at].as_py(),
            domain=table["domain"][at].as_py(),
            utility=float(utilities[at]),
            deviations=float(deviations[at]),
            picked=table["picked"][at].as_py(),
        )
        for at in order.tolist()
        if np.isfinite(deviations[at])
    ]
    once: dict[int, Standout] = {}
    for each in sorted([*before, *new], key=lambda each: sign * each.deviations):
        once.setdefault(each.sequence, each)
    return list(once.values())[:SHOWN]
