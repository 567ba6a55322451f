"""Runs that differ by their seed alone are one arm; arms are compared over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from megaopus.report.compare import Aggregate, Comparison, Run, aggregate

_OWN = ("seed", "run_dir", "resume")
"""Settings by which runs of one arm differ."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs of one configuration, by seed."""

    name: str
    runs: dict[Any, str]
    """Seed -> the run's name."""

    @property
    def first(self) -> str:
        """The run that stands for the arm where one is shown."""
        return next(iter(self.runs.values()))


def find_arms(runs: Mapping[str, Run]) -> list[Arm]:
    """The arms of ``runs`` (by name) in order of their first runs.

    A run without settings is an arm of its own, and so is a second run of one seed.
    """
    groups: dict[str, dict[Any, str]] = {}
    for name, run in runs.items():
        settings = {key: value for key, value in run.config.items() if key not in _OWN}
        key = repr(sorted(settings.items())) if run.config else name
        seed = run.config.get("seed")
        if seed in groups.get(key, {}):
            key = name
        groups.setdefault(key, {})[seed] = name
    shared = [_shared(list(group.values())) for group in groups.values()]
    names = [
        each if shared.count(each) == 1 else next(iter(g.values()))
        for each, g in zip(shared, groups.values(), strict=True)
    ]
    return [Arm(name, group) for name, group in zip(names, groups.values(), strict=True)]


def _shared(names: Sequence[str]) -> str:
    """Return what the names of an arm's runs have in common, without the word that counts them."""
    if len(names) == 1:
        return names[0]
    start = _common_start(names)
    end = _common_start([name[::-1] for name in names])[::-1]
    for text in (start, end):
        trimmed = text.strip("_-./ 0123456789").removesuffix("seed").strip("_-./ ")
        if trimmed:
            return trimmed
    return names[0]


def _common_start(names: Sequence[str]) -> str:
    return "".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, zip(*names, strict=False)))


def partner(arms: Sequence[Arm], baseline: str, name: str) -> str:
    """The run of ``baseline``'s arm that the run ``name`` is compared with: that of its seed, else ``baseline``."""
    own = next(arm for arm in arms if baseline in arm.runs.values())
    seed = next(seed for arm in arms for seed, run in arm.runs.items() if run == name)
    return own.runs.get(seed, baseline)


def over_seeds(arms: Sequence[Arm], baseline: str, comparisons: Mapping[str, Comparison]) -> dict[str, Aggregate]:
    """Arm -> its comparisons with the baseline's over the seeds that both have, where there are two or more."""
    own = next(arm for arm in arms if baseline in arm.runs.values())
    found = {}
    for arm in arms:
        pairs = [comparisons[run] for seed, run in arm.runs.items() if seed in own.runs and run in comparisons]
        if arm is not own and len(pairs) > 1:
            found[arm.name] = aggregate(pairs)
    return found
