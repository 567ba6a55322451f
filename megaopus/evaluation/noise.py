"""Says what two evaluations differ by, and whether that can be told from noise.

Two things make scores differ where nothing is better. *Sampling of items*: other items of the task would have given
another score. It is estimated from the items that both models answered, paired: the standard error of the mean of
their differences, so that what makes an item hard for both cancels. *Training noise*: the same configuration with
another seed, or a few updates later, has another score; no number of items shows that. It is estimated

- where both arms have two seeds or more: from the spread between seeds, pooled over the arms, over the root of their
  number (Student's t-test);
- else, where every run was evaluated LAST times during training: from the spread of its last LAST scores, as in
  "Signal and Noise" (Heineman et al. 2025, arXiv 2508.13144). This assumes that a seed changes a score by as much as
  the updates between these checkpoints do, once it is made up for that checkpoints near each other are alike: with an
  average correlation c of their noise, a spread s^2 is an estimate of (1 - c) of the variance, of which the mean of m
  checkpoints has (1 + (m - 1) c) / m. CORRELATION is what is taken for c. Where a score still rises, the rise counts
  as spread: what can be told is less, never more, and a lead that a seed keeps, which no checkpoint shows, is made up
  for in part;
- else it is not known, and no winner is named, however many items there are.

A difference is told if it holds against both, their variances added: p <= LEVEL / (number of differences looked at) by
Student's t, or, with noise between checkpoints, which is taken on the large side, SURE standard errors of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

LAST = 5
"""Evaluations at the end of a run whose mean is compared, and whose spread is its training noise."""
LEVEL = 0.05
SURE = 3.0
"""Standard errors that are told however many differences are looked at, where noise is that between checkpoints."""
CORRELATION = 0.5
"""Average correlation that is taken for the noise of the last LAST checkpoints."""
SEEDS, CHECKPOINTS = "seeds", "checkpoints"
_RESAMPLES_AT_ONCE = 1 << 22


class Verdict(StrEnum):
    """Says whether a difference can be told from noise."""

    BETTER = "better"
    WORSE = "worse"
    NOISE = "not told from noise"
    UNKNOWN = "more than the sampling of items, training noise not known"


class Spread(NamedTuple):
    """Holds the mean and the sample standard deviation of so many scores."""

    n: int
    mean: float
    std: float


class Noise(NamedTuple):
    """Holds what a difference varies by through training."""

    source: str
    """SEEDS or CHECKPOINTS."""
    parts: tuple[tuple[float, int], ...]
    """(variance, its degrees of freedom); the variance of the difference is their sum."""

    @property
    def std(self) -> float:
        """Standard deviation of the difference."""
        return math.sqrt(sum(variance for variance, _ in self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Holds what the other arm has more of than the base."""

    task: str
    metric: str
    higher_is_better: bool
    headline: bool
    n: int
    """Items."""
    value: float
    items_stderr: float | None
    """Standard error from the sampling of items; None: not known."""
    interval: tuple[float, float] | None
    """95 % of bootstrap samples of the paired items; None: not paired, or not asked for."""
    paired: bool
    noise: Noise | None
    """None: not known."""

    @property
    def stderr(self) -> float | None:
        """Standard error from both, as far as they are known; None: not that of items."""
        if self.items_stderr is None:
            return None
        return math.hypot(self.items_stderr, self.noise.std if self.noise else 0.0)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of ``stderr``: those of the seeds, else Welch and Satterthwaite's.

        The latter promise too much where few seeds are alike by chance.
        """
        if self.noise is not None and self.noise.source == SEEDS:
            return min(freedom for _, freedom in self.noise.parts)
        parts = [(self.items_stderr**2, self.n - 1)] if self.items_stderr else []
        parts += self.noise.parts if self.noise else ()
        total = sum(variance for variance, _ in parts)
        return total**2 / sum(variance**2 / freedom for variance, freedom in parts) if total else 0.0

    def against_items(self) -> bool:
        """Tell whether it is more than other items would change (p <= LEVEL), whatever training changes."""
        error = self.items_stderr
        return bool(error) and student_t_p(self.value / (error or 1.0), self.n - 1) <= LEVEL

    def verdict(self, looked_at: int = 1) -> Verdict:
        """Tell whether it is more than noise, as one of ``looked_at`` differences of the two arms."""
        if not self.items_stderr or not math.isfinite(self.value) or not (error := self.stderr):
            return Verdict.NOISE  # items that differ all alike, or too few, say nothing of others
        sure = self.noise is not None and self.noise.source == CHECKPOINTS and abs(self.value) >= SURE * error
        if not sure and student_t_p(self.value / error, self.freedom) > LEVEL / looked_at:
            return Verdict.NOISE
        if self.noise is None:
            return Verdict.UNKNOWN
        return Verdict.BETTER if (self.value > 0) == self.higher_is_better else Verdict.WORSE


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Mean and sample standard deviation of scores of checkpoints or seeds; the latter is nan for one."""
    return Spread(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


def noise_between_seeds(arms: Sequence[Sequence[float]]) -> Noise:
    """Estimate what the difference of two arms' mean scores varies by; each has one score a seed, two or more."""
    seeds = [spread(arm) for arm in arms]
    freedom = sum(each.n - 1 for each in seeds)
    pooled = sum((each.n - 1) * each.std**2 for each in seeds) / freedom
    return Noise(SEEDS, ((pooled * sum(1 / each.n for each in seeds), freedom),))


def noise_between_checkpoints(arms: Sequence[Sequence[Sequence[float]]], compared: int) -> Noise:
    """Estimate what the difference of two arms varies by; each has runs, each run its last scores, two or more.

    ``compared``: scores at the end of each run whose mean is compared.
    """
    grows = (1 + (compared - 1) * CORRELATION) / (compared * (1 - CORRELATION))
    runs = [(spread(run), len(arm)) for arm in arms for run in arm]
    return Noise(CHECKPOINTS, tuple((grows * run.std**2 / among**2, run.n - 1) for run, among in runs))


def standard_error(differences: np.ndarray) -> float | None:
    """Standard error of the mean of (n,) independent items; None for fewer than two."""
    return float(np.std(differences, ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else None


def bootstrap_interval(
    parts: Sequence[tuple[float, np.ndarray]], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a weighted sum of means, the items of each part drawn anew (Efron and Tibshirani 1993).

    Args:
        parts: (weight, (n,) values of its items, or paired differences).
        seed: the same seed gives the same interval.
        resamples: bootstrap samples.
        level: share of them inside.
    """
    random, total = np.random.default_rng(seed), np.zeros(resamples)
    for weight, values in parts:
        rows = max(1, _RESAMPLES_AT_ONCE // len(values))
        for first in range(0, resamples, rows):
            drawn = random.integers(len(values), size=(min(rows, resamples - first), len(values)))
            total[first : first + rows] += weight * values[drawn].mean(axis=1)
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -- Student's t -------------------------------------------------------------------------------------------------------


def student_t_p(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t with ``df`` degrees of freedom."""
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only below this point
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # 1 / (1 + d1 / (1 + d2 / (1 + ...))), evaluated from the far end; 200 terms are ample for df below a thousand.
    tail = 1.0
    for term in range(200, 0, -1):
        m = term // 2
        if term % 2:
            factor = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            factor = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        tail = 1 + factor / tail
    return math.exp(log_front) / (a * tail)
