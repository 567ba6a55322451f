"""Tells how much utilities have to do with picks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megaopus.selection import counter_rng, sampler

_COUNTED = 64
"""Picks that are compared, over several draws where one has fewer."""


def share_by_utility(
    utilities: Tensor,
    ids: Tensor,
    count: int,
    draws: sampler.Draws,
    penalty: Callable[[int], Tensor] | None = None,
) -> float:
    """Return the share of picks that are others than at utilities of zero, by the same noise; 0: utilities say nothing.

    ``utilities`` (n,), ``ids`` (n,), ``penalty`` and ``draws`` as ``sampler.pick`` takes them: the share is that
    of the step that ``draws`` is of, and of as many like it as make 64 picks.
    """
    times, found = math.ceil(_COUNTED / count), 0
    known = without = None
    if penalty is not None:
        nothing = torch.zeros(len(ids), dtype=torch.float64)
        # a replay knows what the step's own picks took off the others, and no more
        known, without = (lambda pick: penalty(pick).nan_to_num(0.0)), (lambda pick: nothing)
    for turn in range(times):
        noise = draws if turn == 0 else replace(draws, seed=counter_rng.key(draws.seed, "uniformity", turn))
        picked = sampler.pick(utilities, ids, count, noise, known)
        blind = sampler.pick(torch.zeros_like(utilities), ids, count, noise, without)
        found += int(torch.isin(picked, blind).sum())
    return 1 - found / (times * count)
