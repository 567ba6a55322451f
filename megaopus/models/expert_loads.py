"""Tells how evenly tokens are spread over experts, and moves the biases by which these are chosen towards even loads.

Shapes: L layers of the model, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megaopus.models.config import ModelConfig


class ExpertLoads(NamedTuple):
    """Says how tokens were spread over the experts of a layer, on average over layers."""

    busiest: float
    """Tokens of the expert that was given most, over the even share."""
    idle: float
    """Share of experts that were given none."""


class ExpertBalance:
    """Counts what the experts on this rank are given, where it is told to, and evens their loads out."""

    def __init__(self, module: nn.Module, model: ModelConfig):
        """Find the routers of a rank's model; of one without experts there are none."""
        self._model = model
        routers: list[Any] = [each for each in module.modules() if hasattr(each, "counts_tokens")]
        self._routers = {router.layer: router for router in routers}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count in the passes inside, from zero."""
        for router in self._routers.values():
            router.counts_tokens, router.given = True, None
        try:
            yield
        finally:
            for router in self._routers.values():
                router.counts_tokens = False

    @contextmanager
    def without_losses(self) -> Iterator[None]:
        """Let routers add no loss of theirs to gradients of passes inside."""
        before = {layer: router.training for layer, router in self._routers.items()}
        try:
            for router in self._routers.values():
                router.training = False
            yield
        finally:
            for layer, router in self._routers.items():
                router.training = before[layer]

    def counts(self, device: torch.device) -> Tensor | None:
        """(L x E,) float64 tokens that this rank gave to experts, 0 in other ranks' layers; None: there are no experts.

        To be added up over all ranks.
        """
        if self._model.num_experts is None:
            return None
        shape = self._model.num_layers, self._model.num_experts
        counts = torch.zeros(shape, dtype=torch.float64, device=device)
        for layer, router in self._routers.items():
            if router.given is not None:
                counts[layer] = router.given
        return counts.view(-1)

    @torch.no_grad()
    def even_out(self, counts: Sequence[float]) -> None:
        """Move each expert's bias by ``router.bias_rate`` towards an even load; ``counts`` (L x E,), of all ranks.

        Loss-free balancing (Wang et al., arXiv 2408.15664).
        """
        if (rate := self._model.router.bias_rate) is None:
            return
        given = torch.tensor(counts, dtype=torch.float64).view(self._model.num_layers, -1)
        ways = torch.sign(given.mean(1, keepdim=True) - given) * rate
        for layer, router in self._routers.items():
            router.expert_bias += ways[layer].to(router.expert_bias)

    def told(self, counts: Sequence[float]) -> ExpertLoads:
        """Sum up ``counts`` (L x E,), of all ranks."""
        of_layers = torch.tensor(counts, dtype=torch.float64).view(self._model.num_layers, -1)
        given = of_layers[self._model.first_dense_layers :]
        busiest = given.amax(1) / given.mean(1).clamp(min=1e-300)
        return ExpertLoads(float(busiest.mean()), float((given == 0).double().mean()))
