"""Picks K of N candidates by utility: in float64 on the CPU and keyed by ids, so that every rank picks the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaopus.selection import counter_rng
from megaopus.selection.samplers.registry import SAMPLERS


def standardise(utilities: Tensor) -> Tensor:
    """z-score with the population standard deviation; (N,) float64 with a positive spread."""
    return (utilities - utilities.mean()) / utilities.std(correction=0)


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


def pick(
    utilities: Tensor,
    ids: Tensor,
    count: int,
    draws: Draws,
    penalty: Tensor | None = None,
    quotas: tuple[Tensor, dict[int, int]] | None = None,
) -> Tensor:
    """(count,) positions, as ``draws`` has it; with ``penalty`` (n, n) one after another.

    ``quotas``: ((n,) domains, picks that each gets at least): those come first, from the domain alone.
    """

    def draw(among: Tensor, count: int) -> Tensor:
        values, names = utilities[among], ids[among]
        if penalty is None:
            return among[pick_at_once(values, names, count, draws)]
        return among[pick_diverse(values, penalty[among][:, among], names, count, draws)]

    left = torch.ones(len(ids), dtype=torch.bool)
    picked = []
    if quotas is not None:
        domains, least = quotas
        for domain, quota in least.items():
            picked.append(draw((domains == domain).nonzero().flatten(), quota))
            left[picked[-1]] = False
            count -= quota
    return torch.cat([*picked, draw(left.nonzero().flatten(), count)])


def pick_uniform(ids: Tensor, count: int, seed: int, step: int) -> Tensor:
    """(count,) positions drawn without replacement, every candidate equally likely."""
    return _largest(counter_rng.uniform(counter_rng.key(seed, "uniform", step), ids), ids, count)


def pick_top_k(utilities: Tensor, ids: Tensor, count: int) -> Tensor:
    """(count,) positions of the largest utilities; of equal ones the smaller id comes first."""
    return _largest(utilities, ids, count)


def pick_at_once(utilities: Tensor, ids: Tensor, count: int, draws: Draws) -> Tensor:
    """(count,) positions, all by one noise."""
    return _largest(draws(utilities, ids, draws.sampler), ids, count)


def pick_diverse(utilities: Tensor, penalty: Tensor, ids: Tensor, count: int, draws: Draws) -> Tensor:
    """(count,) positions picked one after another; each pick s lowers every other utility z by ``penalty[z, s]``.

    ``penalty``: (n, n). Every pick is a draw among those left, by noise of its own.
    """
    order = torch.argsort(ids)
    left, penalty, ids = utilities[order].clone(), penalty[order][:, order], ids[order]
    picked = []
    for pick in range(count):
        best = int(torch.argmax(draws(left, ids, "diverse", pick)))  # the first of equal scores: the smallest id
        picked.append(best)
        left = left - penalty[:, best]
        left[picked] = -torch.inf
    return order[picked]


def _largest(scores: Tensor, ids: Tensor, count: int) -> Tensor:
    order = torch.argsort(ids)
    return order[torch.argsort(scores[order], descending=True, stable=True)[:count]]
