"""Draws without replacement by utility and temperature."""

from __future__ import annotations

from torch import Tensor

from megaopus.selection import counter_rng
from megaopus.selection.samplers.registry import register_sampler


@register_sampler("boltzmann")
def boltzmann(utilities: Tensor, ids: Tensor, temperature: float, key: int) -> Tensor:
    """Draw one after another without replacement, p ~ exp(utility / temperature) among those left.

    Done at once: the largest of utility / temperature + Gumbel noise are distributed as those draws (Yellott, 1977).
    """
    return utilities / temperature + counter_rng.gumbel(key, ids)
