"""Picks K of N candidates by utility: in float64 on the CPU and keyed by ids, so that every rank picks the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


Penalty = Tensor | Callable[[int], Tensor]
"""(n, n), its column s what a pick of s takes off every utility, or the function that gives that column (n,)."""


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

    def take(self, position: int) -> bool:
        """Count the pick of the candidate at ``position``; returns whether someone else may not be picked any more."""
        domain = self._domain[position]
        if self._due[domain] > 0:
            self._due[domain] -= 1
            return self._free <= 0 and not self._due[domain]
        self._free -= 1
        return self._free == 0

    def among(self, order: Tensor) -> Tensor:
        """Those of ``order`` (n,), all candidates from the best on, that are picked if one after another is, (m,)."""
        domain = self._domain[order]
        by_domain = domain.argsort(stable=True)
        sizes = domain.bincount(minlength=len(self._due))
        firsts = sizes.cumsum(0) - sizes
        place = torch.empty_like(order).index_copy(0, by_domain, torch.arange(len(order)) - firsts[domain[by_domain]])
        is_due = place < self._due[domain]  # of a domain the best
        return order[is_due | ((~is_due).cumsum(0) <= self._free)]


class _Closed:
    """Keeps who may not be picked next: whom a quota bars, and who is above the lowest level of the others."""

    def __init__(self, size: int, quotas: Quotas | None, levels: Tensor | None):
        self._free, self._quotas, self._levels = torch.ones(size, dtype=torch.bool), quotas, levels
        self._renew()

    def take(self, position: int) -> None:
        """Count the pick of the candidate at ``position``."""
        self._free[position], self.mask[position] = False, True
        self._left -= 1
        if (self._quotas is not None and self._quotas.take(position)) or not self._left:
            self._renew()

    def _renew(self) -> None:
        may = self._free if self._quotas is None else self._free & self._quotas.open()
        if self._levels is not None and bool(may.any()):
            may = may & (self._levels == self._levels[may].min())
        self.mask, self._left = ~may, int(may.sum())

    def best(self, scores: Tensor) -> int:
        """Find who has the largest of ``scores`` (n,) of those who may be picked, the first of equal ones."""
        found = int(scores.masked_fill(self.mask, -torch.inf).argmax())
        if self.mask[found]:  # all others are as low as can be
            may = (~self.mask).nonzero().flatten()
            found = int(may[scores[may].argmax()])
        return found


def pick(
    utilities: Tensor,
    ids: Tensor,
    count: int,
    draws: Draws,
    penalty: Penalty | None = None,
    quotas: tuple[Tensor, Mapping[int, int]] | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """(count,) positions, picked one after another; of equal draws the smaller id comes first.

    Args:
        utilities: (n,) float64.
        ids: (n,) int64, which key the noise.
        count: how many.
        draws: how picks follow from utilities: by one noise, with ``penalty`` by noise of its own for every pick.
        penalty: each pick s lowers every other utility z by ``penalty[z, s]``.
        quotas: ((n,) domains, domain -> picks that it gets at least).
        levels: (n,) int64; nobody is picked while there is someone of a lower level who may be.
    """
    if penalty is None and quotas is None:
        return _largest(draws(utilities, ids, draws.sampler), ids, count, levels)
    order = torch.argsort(ids)
    levels = None if levels is None or not bool(levels.any()) else levels[order]
    least = None if quotas is None else Quotas(quotas[0][order], quotas[1], count)
    if penalty is not None:
        return order[
            _one_by_one(utilities[order], ids[order], order, count, draws, penalty, _Closed(len(ids), least, levels))
        ]
    assert least is not None
    best = _descending(draws(utilities[order], ids[order], draws.sampler), levels)
    picked = order[least.among(best)[:count]]
    if len(picked) < count:
        raise ValueError(f"{count} picks: quotas, which ask for more of some domain than there is, leave {len(picked)}")
    return picked


def _one_by_one(
    left: Tensor, ids: Tensor, order: Tensor, count: int, draws: Draws, penalty: Penalty, closed: _Closed
) -> list[int]:
    """Pick as ``pick`` does, each pick lowering the others; ``order``: positions in ``penalty`` of ascending ids."""
    ordered = torch.equal(order, torch.arange(len(order)))
    picked = []
    for number in range(count):
        best = closed.best(draws(left, ids, "diverse", number))
        closed.take(best)
        picked.append(best)
        at = int(order[best])
        taken = penalty[:, at] if isinstance(penalty, Tensor) else penalty(at)
        left = left - (taken if ordered else taken[order])
    return picked


def pick_uniform(ids: Tensor, count: int, seed: int, step: int) -> Tensor:
    """(count,) positions drawn without replacement, every candidate equally likely."""
    return _largest(counter_rng.uniform(counter_rng.key(seed, "uniform", step), ids), ids, count)


def pick_top_k(utilities: Tensor, ids: Tensor, count: int, levels: Tensor | None = None) -> Tensor:
    """(count,) positions of the largest utilities, those of lower ``levels`` first; of equal ones the smaller id's."""
    return _largest(utilities, ids, count, levels)


def _largest(scores: Tensor, ids: Tensor, count: int, levels: Tensor | None = None) -> Tensor:
    order = torch.argsort(ids)
    return order[_descending(scores[order], None if levels is None else levels[order])[:count]]


def _descending(scores: Tensor, levels: Tensor | None) -> Tensor:
    """(n,) positions from the best on, those of lower levels first, then by scores; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order if levels is None else order[torch.argsort(levels[order], stable=True)]
