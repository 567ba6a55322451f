"""Takes the highest utilities."""

from __future__ import annotations

from torch import Tensor

from megaopus.selection.samplers.registry import register_sampler


@register_sampler("top_k", greedy=True)
def top_k(utilities: Tensor, ids: Tensor, temperature: float, key: int) -> Tensor:
    """Give the utilities as they are."""
    return utilities
