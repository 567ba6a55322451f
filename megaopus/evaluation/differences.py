"""Compares the evaluations of two arms, paired by item: what they differ by, and what is known of its noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megaopus.errors import DataError
from megaopus.evaluation.items import BITS, EVALUATION_FILE, Evaluation, Score, read_evaluation, read_history
from megaopus.evaluation.noise import (
    LAST,
    Difference,
    Noise,
    bootstrap_interval,
    noise_between_checkpoints,
    noise_between_seeds,
    standard_error,
)


class NotComparable(DataError):
    """Two evaluations are of other prompts, or of nothing in common."""


@dataclass(frozen=True, slots=True)
class RunScores:
    """Holds every evaluation of one run."""

    name: str
    final: Evaluation | None
    """What the verb ``eval`` left."""
    history: Sequence[Evaluation]
    """During training, by step."""

    @property
    def latest(self) -> Evaluation | None:
        """The evaluation that stands for the run."""
        return self.final or (self.history[-1] if self.history else None)


def read_scores(run_folder: Path, name: str | None = None) -> RunScores | None:
    """Read all evaluations of a run; None where there is none. Raises DataError for a file that cannot be read."""
    path = run_folder / EVALUATION_FILE
    final = read_evaluation(path) if path.is_file() else None
    found = RunScores(name or run_folder.name, final, read_history(run_folder))
    return found if found.latest is not None else None


def compare_scores(
    base: Sequence[RunScores], other: Sequence[RunScores], *, last: int = LAST, resamples: int = 1000
) -> tuple[list[Difference], list[str]]:
    """Compare two arms, a run a seed: what every run has of both, averages over tasks first, then headline scores.

    Averages are over tasks of their own and groups, of headline scores that are better higher, and of bits per byte,
    each where there are two or more.

    Returns:
        the differences, other less base, and why others cannot be compared, in words.

    Raises:
        DataError: a file cannot be read, or items and scores do not belong together.
    """
    subjects = _subjects([*base, *other], last)
    first = subjects[0][0]
    keys = [key for key, score in first.scores.items() if score.part_of is None]
    keys = [key for key in keys if all(key in each.scores for run in subjects for each in run)]
    if not keys:
        raise NotComparable("the evaluations have no task and metric in common; evaluate both on the same tasks")
    found, refused = [], []
    for key in keys:
        try:
            found.append(_difference(base, other, subjects, {key: 1.0}, last, resamples))
        except NotComparable as error:
            refused.append(str(error))
    compared = [first.scores[each.task, each.metric] for each in found]
    averages = []
    for group in (
        [each for each in compared if each.headline and each.higher_is_better],
        [each for each in compared if each.metric == BITS],
    ):
        if len(group) > 1:
            weights = {(each.task, each.metric): 1 / len(group) for each in group}
            averages.append(_difference(base, other, subjects, weights, last, resamples))
    found.sort(key=lambda each: not each.headline)
    return averages + found, list(dict.fromkeys(refused))


def _subjects(runs: Sequence[RunScores], last: int) -> list[list[Evaluation]]:
    """Return what of each run is compared: its ``eval.json`` where all have one, else its last evaluations."""
    if all(run.final is not None and run.final.scores for run in runs):
        return [[run.final] for run in runs if run.final is not None]
    for run in runs:
        if not run.history:
            raise NotComparable(
                f"{run.name} has no evaluation during training and others no {EVALUATION_FILE}; run 'python -m "
                "megaopus eval' on each"
            )
    return [list(run.history[-last:]) for run in runs]


def _difference(
    base: Sequence[RunScores],
    other: Sequence[RunScores],
    subjects: Sequence[Sequence[Evaluation]],
    weights: Mapping[tuple[str, str], float],
    last: int,
    resamples: int,
) -> Difference:
    """Compare a weighted sum of scores."""
    arms = subjects[: len(base)], subjects[len(base) :]
    flat = [[each for run in arm for each in run] for arm in arms]
    scores = [flat[0][0].scores[key] for key in weights]
    means = [np.mean([_value(each, weights) for each in arm]) for arm in flat]
    parts = [part for key, weight in weights.items() for part in _parts(flat, key, weight)]
    variances = [part.variance for part in parts]
    known = [(part.weight, part.differences) for part in parts if part.differences is not None]
    paired = len(known) == len(parts)
    single = len(weights) == 1
    return Difference(
        task=scores[0].task if single else f"average of {len(weights)} tasks",
        metric=scores[0].metric if len({each.metric for each in scores}) == 1 else "headline scores",
        higher_is_better=scores[0].higher_is_better,
        headline=scores[0].headline or not single,
        n=sum(each.n for each in scores),
        value=float(means[1] - means[0]),
        items_stderr=None if None in variances else math.sqrt(math.fsum(each or 0.0 for each in variances)),
        interval=bootstrap_interval(known, resamples=resamples) if paired and resamples else None,
        paired=paired,
        noise=_noise(base, other, arms, weights, last),
    )


def _value(evaluation: Evaluation, weights: Mapping[tuple[str, str], float]) -> float:
    return math.fsum(weight * evaluation.scores[key].value for key, weight in weights.items())


def _noise(
    base: Sequence[RunScores],
    other: Sequence[RunScores],
    arms: tuple[Sequence[Sequence[Evaluation]], Sequence[Sequence[Evaluation]]],
    weights: Mapping[tuple[str, str], float],
    last: int,
) -> Noise | None:
    """Estimate the training noise of a difference (see ``noise.py``); None: not known."""
    if len(base) > 1 and len(other) > 1:
        return noise_between_seeds(
            [[float(np.mean([_value(each, weights) for each in run])) for run in arm] for arm in arms]
        )
    lasts = [[last_scores(run.history, weights, last) for run in arm] for arm in (base, other)]
    if any(len(scores) < last for arm in lasts for scores in arm):
        return None
    return noise_between_checkpoints(lasts, len(arms[0][0]))


def last_scores(
    history: Sequence[Evaluation], weights: Mapping[tuple[str, str], float], last: int = LAST
) -> list[float]:
    """Return a weighted sum of scores in the last evaluations of a run that have all of them, ``last`` at most."""
    return [_value(each, weights) for each in history if weights.keys() <= each.scores.keys()][-last:]


# -- items ------------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    weight: float
    differences: np.ndarray | None
    """(n,) paired ones; None: not paired."""
    variance: float | None
    """That of the weighted difference; None: not known."""


def _parts(arms: Sequence[Sequence[Evaluation]], key: tuple[str, str], weight: float) -> list[_Part]:
    """Return the parts, each of items of its own, that make up a difference of a score."""
    every = [each for arm in arms for each in arm]
    _same_prompts(every, key)
    leaves = _leaves(every, *key)
    if leaves is None:
        return [_Part(weight, None, _unpaired(arms, key, weight))]
    found = []
    for task, share in leaves.items():
        leaf, part = (task, key[1]), weight * share
        _same_prompts(every, leaf)
        differences = _paired(arms, leaf)
        if differences is None:
            found.append(_Part(part, None, _unpaired(arms, leaf, part)))
        else:
            found.append(_part(part, differences))
    known = [(each.weight, each.differences) for each in found if each.differences is not None]
    if len(known) == len(found) and any(len(values) == 1 for _, values in known):
        shares = [weight / len(values) for weight, values in known]
        if math.isclose(max(shares), min(shares)):  # every item counts the same, so that they are one sample
            return [_part(weight, np.concatenate([values for _, values in known]))]
    return found


def _part(weight: float, differences: np.ndarray) -> _Part:
    error = standard_error(differences)
    return _Part(weight, differences, None if error is None else (weight * error) ** 2)


def _same_prompts(every: Sequence[Evaluation], key: tuple[str, str]) -> None:
    first = every[0].scores[key]
    for each in every[1:]:
        if (score := each.scores[key]).protocol != first.protocol:
            raise NotComparable(
                f"{first.task}: {every[0].path} is by protocol {first.protocol}, {each.path} by {score.protocol}; "
                "evaluate both by one"
            )
        if score.prompts != first.prompts:
            raise NotComparable(
                f"{first.task}: {every[0].path} and {each.path} have other prompts (of other items, --limit, "
                "--num-fewshot, seed or chat template); evaluate both alike"
            )


def _leaves(every: Sequence[Evaluation], task: str, metric: str) -> dict[str, float] | None:
    """Return the tasks with items that a score is a weighted mean of; None where it is no mean of its parts.

    A group is the mean over its items or the mean over its parts: which of them is found from the values.
    """
    parts = every[0].parts(task)
    if not parts:
        return {task: 1.0}
    if any(each.parts(task) != parts or (part, metric) not in each.scores for each in every for part in parts):
        return None
    inside = [each for part in parts if (each := _leaves(every, part, metric)) is not None]
    if len(inside) < len(parts):
        return None
    items = {leaf: every[0].scores[leaf, metric].n for each in inside for leaf in each}
    over_items = {leaf: n / sum(items.values()) for leaf, n in items.items()}
    over_parts = {leaf: share / len(parts) for each in inside for leaf, share in each.items()}
    for weights in (over_items, over_parts):
        of_metric = {(leaf, metric): share for leaf, share in weights.items()}
        if all(
            math.isclose(_value(each, of_metric), each.scores[task, metric].value, rel_tol=1e-6, abs_tol=1e-6)
            for each in every
        ):
            return weights
    return None


def _paired(arms: Sequence[Sequence[Evaluation]], key: tuple[str, str]) -> np.ndarray | None:
    """(n,) differences of the arms' mean values of each item; None where items are not known."""
    names: tuple[str, ...] | None = None
    means = []
    for arm in arms:
        total: np.ndarray | float = 0.0
        for each in arm:
            if (found := each.values(*key)) is None:
                return None
            names = names or found[0]
            if names == found[0]:
                total = total + found[1]
                continue
            if sorted(names) != sorted(found[0]):
                raise DataError(
                    f"{each.items_folder / key[0]}.jsonl: other items than {arms[0][0].items_folder / key[0]}.jsonl, "
                    "though the prompts are said to be the same; evaluate both again"
                )
            place = {name: at for at, name in enumerate(found[0])}
            total = total + found[1][[place[name] for name in names]]
        means.append(total / len(arm))
    return np.asarray(means[1] - means[0])


def _unpaired(arms: Sequence[Sequence[Evaluation]], key: tuple[str, str], weight: float) -> float | None:
    """Variance of a weighted difference by the scores' own standard errors; evaluations of an arm share their items."""
    scores: list[list[Score]] = [[each.scores[key] for each in arm] for arm in arms]
    errors = [[score.stderr for score in arm] for arm in scores]
    if any(error is None for arm in errors for error in arm):
        return None
    return weight**2 * sum(float(np.mean([error or 0.0 for error in arm])) ** 2 for arm in errors)
