"""Picks K of N candidates by utility: in float64 on the CPU and keyed by ids, so that every rank picks the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaopus.selection import counter_rng
from megaopus.selection.samplers.registry import SAMPLERS

_BULK = 0.9
"""Share of the distances from the median that says how far ordinary utilities spread; the rest may be anything."""
_WILD = 12.0
"""Times that spread is where outliers begin: 20 standard deviations of normal utilities, where one in 10,000 of
Student's t with three degrees of freedom lies."""


def outliers(utilities: Tensor) -> Tensor:
    """(N,) bool, of finite float64 (N,): those further than any ordinary one from the median."""
    return _distances(utilities)[1] > 1


def standardise(utilities: Tensor) -> Tensor:
    """z-score with mean and population deviation of all but the outliers; (N,) float64 with a positive spread.

    So an outlier is no other's matter, however far out. Its own distance counts by its logarithm from where outliers
    begin; ranks stay what they are.
    """
    median, ratio, edge = _distances(utilities)
    wild = ratio > 1
    if bool(wild.any()):
        beyond = edge * (1 + ratio[wild].log()) * (utilities[wild] - median).sign()
        utilities = utilities.index_put((wild,), median + beyond)
    ordinary = utilities[~wild]
    return (utilities - ordinary.mean()) / ordinary.std(correction=0)


def _distances(utilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(median, (N,) distances from it as multiples of the last, the distance at which outliers begin)."""
    median = utilities.median()
    distance = (utilities - median).abs().clamp_max(torch.finfo(utilities.dtype).max)
    apart = distance[distance > 0].sort().values  # many may be equal, as where most candidates have nothing to learn
    edge = _WILD * apart[int(_BULK * (len(apart) - 1))] if len(apart) else distance.new_ones(())
    return median, distance / edge, edge


def probabilities(utilities: Tensor, temperature: float) -> Tensor:
    """Return (N,) softmax(utilities / temperature): the chance of each candidate at the first draw."""
    return torch.softmax(utilities / temperature, 0)


@dataclass(frozen=True, slots=True)
class Draws:
    """Says how picks follow from utilities in one step: by which sampler, and by which noise."""

    sampler: str
    """A name of ``samplers.registry``."""
    temperature: float
    seed: int
    step: int

    def __call__(self, utilities: Tensor, ids: Tensor, *purpose: int | str) -> Tensor:
        """(n,) float64 of which the largest are picked; ``purpose`` names the noise."""
        key = counter_rng.key(self.seed, *purpose[:1], self.step, *purpose[1:])
        return SAMPLERS.find(self.sampler).draw(utilities, ids, self.temperature, key)


class Quotas:
    """Says which candidates may be picked next so that each domain still gets the least that is its due.

    ``domains``: (n,) of the candidates; ``least``: domain -> picks; ``count``: of all picks.
    """

    def __init__(self, domains: Tensor, least: Mapping[int, int], count: int):
        names, self._domain = domains.unique(return_inverse=True)
        self._due = torch.tensor([least.get(name, 0) for name in names.tolist()], dtype=torch.int64)
        self._free = count - int(self._due.sum())

    def open(self) -> Tensor:
        """(n,) bool: everyone while picks are left beyond those that are due, then those of domains that lack some."""
        return (self._due > 0)[self._domain] | (self._free > 0)

    def take(self, position: int) -> None:
        """Count the pick of the candidate at ``position``."""
        domain = self._domain[position]
        if self._due[domain] > 0:
            self._due[domain] -= 1
        else:
            self._free -= 1


def pick(
    utilities: Tensor,
    ids: Tensor,
    count: int,
    draws: Draws,
    penalty: Tensor | None = None,
    quotas: tuple[Tensor, Mapping[int, int]] | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """(count,) positions, picked one after another; of equal draws the smaller id comes first.

    Args:
        utilities: (n,) float64.
        ids: (n,) int64, which key the noise.
        count: how many.
        draws: how picks follow from utilities: by one noise, with ``penalty`` by noise of its own for every pick.
        penalty: (n, n); each pick s lowers every other utility z by ``penalty[z, s]``.
        quotas: ((n,) domains, domain -> picks that it gets at least).
        levels: (n,) int64; nobody is picked while there is someone of a lower level who may be.
    """
    if penalty is None and quotas is None:
        return _largest(draws(utilities, ids, draws.sampler), ids, count, levels)
    order = torch.argsort(ids)
    left, ids = utilities[order], ids[order]
    penalty = None if penalty is None else penalty[order][:, order]
    levels = None if levels is None or not bool(levels.any()) else levels[order]
    least = None if quotas is None else Quotas(quotas[0][order], quotas[1], count)
    free, picked = torch.ones(len(ids), dtype=torch.bool), []
    scores = draws(left, ids, draws.sampler) if penalty is None else left
    for number in range(count):
        may = (free if least is None else free & least.open()).nonzero().flatten()
        if levels is not None:
            may = may[levels[may] == levels[may].min()]
        if penalty is not None:
            scores = draws(left, ids, "diverse", number)
        best = int(may[scores[may].argmax()])  # the first of equal ones: the smallest id
        picked.append(best)
        free[best] = False
        if least is not None:
            least.take(best)
        if penalty is not None:
            left = left - penalty[:, best]
    return order[picked]


def pick_uniform(ids: Tensor, count: int, seed: int, step: int) -> Tensor:
    """(count,) positions drawn without replacement, every candidate equally likely."""
    return _largest(counter_rng.uniform(counter_rng.key(seed, "uniform", step), ids), ids, count)


def pick_top_k(utilities: Tensor, ids: Tensor, count: int, levels: Tensor | None = None) -> Tensor:
    """(count,) positions of the largest utilities, those of lower ``levels`` first; of equal ones the smaller id's."""
    return _largest(utilities, ids, count, levels)


def _largest(scores: Tensor, ids: Tensor, count: int, levels: Tensor | None = None) -> Tensor:
    order = torch.argsort(ids)
    order = order[torch.argsort(scores[order], descending=True, stable=True)]
    if levels is not None:
        order = order[torch.argsort(levels[order], stable=True)]
    return order[:count]
