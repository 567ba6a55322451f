"""Weights of a corpus's domains over the steps of a run, as arithmetic: how often each was drawn before any step.

Within a stage the places of the candidate stream are given to domains by a van der Corput sequence: place q goes to the
domain in whose interval of the cumulated weights the bit-reversed fraction of q falls. So any run of places has each
domain's share to within a logarithm, and the number of a domain's places before q is a sum over the bits of q.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BITS = 24
"""Weights are rounded to 2^-24."""


@dataclass(frozen=True)
class Stage:
    """From ``step`` on, until the next stage begins, domains are drawn by ``weights`` (any scale; not named: 0)."""

    step: int
    weights: Mapping[str, float]


def parse_stages(given: Sequence[Any]) -> list[Stage]:
    """``[[0, {books: 2, code: 1}], [1000, {...}]]`` as stages; raises ValueError saying what is wrong."""
    stages: list[Stage] = []
    for entry in given:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], dict):
            raise ValueError(f"{entry!r} is not a pair of a step and weights by domain")
        step, weights = entry
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"{step!r} is not a step")
        if stages and step <= stages[-1].step:
            raise ValueError(f"step {step} does not come after step {stages[-1].step}")
        for name, weight in weights.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {name} is {weight!r}, not a number that is at least 0")
        if not any(weights.values()):
            raise ValueError(f"no weight is above 0 from step {step} on")
        stages.append(Stage(step, {str(name): float(weight) for name, weight in weights.items()}))
    if stages and stages[0].step != 0:
        raise ValueError(f"the first stage begins at step {stages[0].step}, not 0")
    return stages


def plain(stages: Sequence[Stage]) -> list[Any]:
    """Stages in the form that ``parse_stages`` takes."""
    return [[stage.step, dict(stage.weights)] for stage in stages]


def continued(before: Sequence[Stage], now: Sequence[Stage], step: int) -> list[Stage]:
    """The stages of a run that used ``before`` for its first ``step`` steps and goes on with ``now``.

    What was drawn stays as it was drawn; ``now`` counts from ``step`` on.
    """
    past = [stage for stage in before if stage.step < step]
    current = next(stage for stage in reversed(now) if stage.step <= step)
    if not past or dict(past[-1].weights) != dict(current.weights):
        past.append(Stage(step, current.weights))
    return past + [stage for stage in now if stage.step > step]


def continued_weights(before: Sequence[Any], now: list[Any], step: int) -> list[Any]:
    """Join two settings of ``data.weights``: what a run had for its first ``step`` steps, then what it goes on with.

    Where either has no stages, ``now`` is left as it is. Raises ValueError as ``parse_stages`` does.
    """
    old, new = parse_stages(before), parse_stages(now)
    return plain(continued(old, new, step)) if old and new else now


class Mixture:
    """Says which domain each place of a stream of buffers is given to, and how many it was given before."""

    def __init__(self, stages: Sequence[Stage], domains: Sequence[str], per_buffer: int, steps_per_buffer: int = 1):
        """Args:
        stages: the first from step 0.
        domains: all there are, in order.
        per_buffer: N, places of a buffer.
        steps_per_buffer: steps that a buffer is for; a stage begins with the first buffer all of whose steps are in it.
        """
        self._per_buffer = per_buffer
        self._starts = [-(-stage.step // steps_per_buffer) for stage in stages]  # buffers
        self._bounds = []
        for stage in stages:
            weights = np.array([stage.weights.get(name, 0.0) for name in domains])
            bounds = np.round(np.cumsum(weights) / weights.sum() * (1 << _BITS)).astype(np.int64)
            self._bounds.append(bounds)

    def at(self, buffer: int) -> tuple[np.ndarray, np.ndarray]:
        """(domain of each place of a buffer (N,), how many places that domain was given before it (N,)), int64."""
        stage = max(index for index, start in enumerate(self._starts) if start <= buffer)
        first = (buffer - self._starts[stage]) * self._per_buffer
        places = first + np.arange(self._per_buffer)
        bounds = self._bounds[stage]
        domains = np.searchsorted(bounds, reversed_bits(places & ((1 << _BITS) - 1), _BITS), side="right")
        before = self.drawn(buffer)
        ranks = np.empty_like(domains)
        for domain in np.unique(domains):
            here = domains == domain
            ranks[here] = before[domain] + np.arange(here.sum())
        return domains, ranks

    def drawn(self, buffer: int) -> np.ndarray:
        """(domains,) int64: places given to each before buffer ``buffer``."""
        total = np.zeros(len(self._bounds[0]), dtype=np.int64)
        for start, end, bounds in self._spans(buffer):
            below = count_below((end - start) * self._per_buffer, bounds)
            total += np.diff(below, prepend=0)
        return total

    def _spans(self, buffer: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first buffer, buffer after the last, bounds) of each stage before ``buffer``."""
        for index, start in enumerate(self._starts):
            end = self._starts[index + 1] if index + 1 < len(self._starts) else buffer
            if start < buffer:
                yield start, min(end, buffer), self._bounds[index]


def reversed_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Each of ``values`` (below 2^bits) with its bits in the opposite order."""
    found = np.zeros_like(values)
    for bit in range(bits):
        found |= (values >> bit & 1) << (bits - 1 - bit)
    return found


def count_below(count: int, bounds: np.ndarray) -> np.ndarray:
    """For each bound (n,) in [0, 2^BITS]: how many of the places 0 .. count - 1 have a reversed value below it.

    Places whose upper bits agree with ``count``'s above bit j and whose bit j is 0 where that of ``count`` is 1: their
    j lower bits are free, so that their reversed values are F, F + 2^(BITS - j), F + 2 * 2^(BITS - j), ...
    """
    rounds, rest = divmod(count, 1 << _BITS)
    found = rounds * bounds.astype(np.int64)
    for bit in range(_BITS):
        if rest >> bit & 1:
            upper = np.array([(rest >> bit) - 1])  # bit j itself is 0
            fixed = int(reversed_bits(upper, _BITS - bit)[0])
            stride = 1 << (_BITS - bit)
            found = found + np.clip(-(-(bounds - fixed) // stride), 0, 1 << bit)
    return found
