"""Adjoint scoring: the alignment of linear and embedding layers, exactly, without any per-sample gradient.

<P sum_t b_t a_t^T, G> = <sum_t b_t a_t^T, P^T G> = sum_t b_t^T Q a_t with Q = P^T G_proxy, which is computed once per
layer and step (P is self-adjoint for most optimizers).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from megaopus.selection.backend import (
    Candidates,
    GhostConsumer,
    GhostLayer,
    ScoringBackend,
    UpdateOperator,
)
from megaopus.selection.estimators.ghost import local_rows
from megaopus.selection.estimators.layers import ghost_layers
from megaopus.selection.estimators.registry import (
    ESTIMATORS,
    Request,
    Sizes,
    Sketch,
    Taken,
    put_together,
    register_estimator,
)
from megaopus.selection.pieces import direction, gathered

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


def adjoint_utilities(
    backend: ScoringBackend,
    candidates: Candidates,
    operator: UpdateOperator,
    proxy_gradient: Mapping[str, Tensor],
    *,
    layers: str = "linear",
    length: int | None = None,
    micro_batch_size: int = 16,
) -> Tensor:
    """(n,) float64: this rank's part of <P g_z, g_proxy>, summed over ``layers`` (``layers.ghost_layers``).

    Costs a forward pass, the gradients of the activations, and a product with Q: 6 FLOPs per weight and token.
    Raises RuntimeError naming any layer whose activations could not be captured.
    """
    uses = ghost_layers(backend, layers)
    with (
        torch.no_grad(),
        adjoint_consumer(backend, len(candidates), operator, proxy_gradient, uses) as (parts, consume),
    ):
        backend.ghost_pass(candidates, uses, consume, length=length, micro_batch_size=micro_batch_size)
    return parts


@contextmanager
def adjoint_consumer(
    backend: ScoringBackend,
    count: int,
    operator: UpdateOperator,
    proxy_gradient: Mapping[str, Tensor],
    uses: Iterable[GhostLayer],
) -> Iterator[tuple[Tensor, GhostConsumer]]:
    """((count,) float64 zeros, what adds to them in a ghost pass inside): to score beside something else."""
    update = direction(operator, proxy_gradient, dict.fromkeys(layer.parameter for layer in uses))
    parts = torch.zeros(count, dtype=torch.float64, device=backend.device)
    with gathered(backend, update) as matrices:

        def consume(layer: GhostLayer, rows: slice, act_a: Tensor, grad_b: Tensor) -> None:
            q = matrices[layer.parameter].to(grad_b.dtype)
            if layer.kind == "embedding":
                index, mine = local_rows(layer, len(q), act_a)
                product = q[index] * mine.unsqueeze(-1) * grad_b
            elif q.shape[0] > q.shape[1]:  # b^T Q a from the side whose product is narrower
                product = (grad_b @ q) * act_a
            else:
                product = (act_a.to(grad_b.dtype) @ q.t()) * grad_b
            parts[rows] += product.flatten(1).sum(1, dtype=torch.float64)

        yield parts, consume


def _memory(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    rows = {"update on the proxy": Taken(4 * sum(sizes.matrices) // sizes.shards, "fp32, P g_proxy of each matrix")}
    return {**rows, **put_together(sizes)}


@register_estimator(
    "adjoint",
    flops=(1.0, "forward, input gradients, and a product of each layer's with the update on the proxy"),
    shared=2 / 3,  # forward and input gradients
    needs={"hooks": "captures the activations of layers"},
    memory=_memory,
    pieces=True,
    example={"layers": "all", "proxy_half_life": 0.0},
)
class Adjoint:
    """Estimates by ``adjoint_utilities``; the sketches of a Gram matrix come from the same pass."""

    def __init__(self, config: SelectionConfig):
        self._layers = config.derived_layers()
        self._gram = cast(Sketch, ESTIMATORS.find(config.gram).make(config)) if config.redundancy > 0 else None

    def uses(self, backend: ScoringBackend, gradient: Mapping[str, Tensor]) -> list[GhostLayer]:
        return ghost_layers(backend, self._layers)

    def estimate(self, request: Request) -> tuple[Tensor, dict[str, Tensor] | None]:
        given = (request.operator, request.proxy_gradient)
        if self._gram is not None and request.keep_updates:
            uses = ghost_layers(request.backend, self._layers)
            count = len(request.candidates)
            with adjoint_consumer(request.backend, count, *given, uses) as (parts, consume):
                return parts, self._gram.sketches(request, extra_consumer=consume)
        passes: dict[str, Any] = {"length": request.length, "micro_batch_size": request.micro_batch_size}
        return adjoint_utilities(request.backend, request.candidates, *given, layers=self._layers, **passes), None
