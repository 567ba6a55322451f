"""Which K of N candidates, given their utilities: float64 on the CPU and keyed by ids, so every rank picks the same."""

from __future__ import annotations

import torch
from torch import Tensor

from megaopus.selection import counter_rng


def standardise(utilities: Tensor) -> Tensor:
    """z-score with the population standard deviation; (N,) float64 with a positive spread."""
    return (utilities - utilities.mean()) / utilities.std(correction=0)


def probabilities(utilities: Tensor, temperature: float) -> Tensor:
    """(N,) softmax(utilities / temperature): the chance of each candidate at the first draw."""
    return torch.softmax(utilities / temperature, 0)


def pick(
    utilities: Tensor,
    ids: Tensor,
    count: int,
    temperature: float | None,
    penalty: Tensor | None,
    quotas: tuple[Tensor, dict[int, int]] | None,
    seed: int,
    step: int,
) -> Tensor:
    """(count,) positions: the largest utilities, or with ``temperature`` draws; with ``penalty`` one after another.

    ``quotas``: ((N,) domains, picks that each gets at least): those come first, from the domain alone.
    """

    def draw(among: Tensor, count: int) -> Tensor:
        values, names = utilities[among], ids[among]
        if penalty is not None:
            overlap = penalty[among][:, among]
            found = pick_diverse(values, overlap, names, count, temperature=temperature, seed=seed, step=step)
        elif temperature is not None:
            found = pick_boltzmann(values, names, count, temperature, seed, step)
        else:
            found = pick_top_k(values, names, count)
        return among[found]

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


def pick_boltzmann(utilities: Tensor, ids: Tensor, count: int, temperature: float, seed: int, step: int) -> Tensor:
    """(count,) positions drawn one after another without replacement, p ~ exp(utility / temperature) among those left.

    Done at once: the largest of utility / temperature + Gumbel noise are distributed as those draws (Yellott, 1977).
    """
    return _largest(
        utilities / temperature + counter_rng.gumbel(counter_rng.key(seed, "boltzmann", step), ids), ids, count
    )


def pick_diverse(
    utilities: Tensor,
    penalty: Tensor,
    ids: Tensor,
    count: int,
    *,
    temperature: float | None,
    seed: int,
    step: int,
) -> Tensor:
    """(count,) positions picked one after another; each pick s lowers every other utility z by ``penalty[z, s]``.

    ``penalty``: (N, N). With ``temperature`` None each pick is the largest utility, else a draw with
    p ~ exp(utility / temperature) among those left, by noise of its own.
    """
    order = torch.argsort(ids)
    left, penalty, ids = utilities[order].clone(), penalty[order][:, order], ids[order]
    picked = []
    for draw in range(count):
        score = left
        if temperature is not None:
            score = left / temperature + counter_rng.gumbel(counter_rng.key(seed, "diverse", step, draw), ids)
        best = int(torch.argmax(score))  # the first of equal scores: the smallest id
        picked.append(best)
        left = left - penalty[:, best]
        left[picked] = -torch.inf
    return order[picked]


def _largest(scores: Tensor, ids: Tensor, count: int) -> Tensor:
    order = torch.argsort(ids)
    return order[torch.argsort(scores[order], descending=True, stable=True)[:count]]
