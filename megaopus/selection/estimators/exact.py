"""Estimates utilities from float64 per-sample gradients: the oracle, for small models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaopus.selection.backend import Candidates, ScoringBackend, UpdateOperator
from megaopus.selection.estimators.layers import parameter_names
from megaopus.selection.estimators.registry import Request, Sizes, Taken, register_estimator

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


def exact_utilities(
    backend: ScoringBackend,
    candidates: Candidates,
    operator: UpdateOperator,
    proxy_gradient: Mapping[str, Tensor],
    *,
    parameters: Collection[str] | None = None,
    length: int | None = None,
) -> Tensor:
    """(n,) float64 alignments <P_t g_z, g_proxy>, summed over ``parameters`` (names), or over all of them."""
    return exact_estimate(backend, candidates, operator, proxy_gradient, parameters=parameters, length=length)[0]


def exact_estimate(
    backend: ScoringBackend,
    candidates: Candidates,
    operator: UpdateOperator,
    proxy_gradient: Mapping[str, Tensor],
    *,
    parameters: Collection[str] | None = None,
    length: int | None = None,
    keep_updates: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """((n,) alignments, updates P_t g_z (n, number of weights) or None), float64.

    The inner products of the updates are the Gram matrix of the redundancy term.
    """
    names = list(backend.parameters()) if parameters is None else list(parameters)
    proxy = torch.cat([proxy_gradient[name].double().flatten() for name in names])
    alignments, kept = [], []
    for gradient in backend.exact_gradients(candidates.batch(length)):
        applied = operator.apply({name: gradient[name] for name in names})
        update = torch.cat([applied[name].flatten() for name in names])
        alignments.append(update @ proxy)
        if keep_updates:
            kept.append(update)
    return torch.stack(alignments), torch.stack(kept) if keep_updates else None


def _memory(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    updates = 8 * sizes.weights * (sizes.candidates if config.redundancy else 0)
    return {
        "exact gradients": Taken(
            # of the largest, which may have several uses, a part of its gradient besides
            40 * sizes.weights + 8 * sizes.largest,
            "float64: weights, proxy gradient, a candidate's gradients, and its update twice",
        ),
        **({"updates": Taken(updates, "float64, of every candidate")} if updates else {}),
    }


_COST = (1.0, "forward and backward per candidate, in float64")


@register_estimator(
    "exact",
    flops=_COST,
    gram=_COST,
    auto_layers="all",
    micro_batches=False,
    needs={
        "whole_model": "one float64 gradient per candidate is taken of a whole model: it needs tp = pp = cp = ep = 1",
        "whole_weights": "needs whole weights on every rank",
        "small_model": "makes one float64 gradient per candidate",
    },
    memory=_memory,
)
class Exact:
    """Estimates by ``exact_estimate``."""

    def __init__(self, config: SelectionConfig):
        self._layers = config.derived_layers()

    def uses(self, backend: ScoringBackend, gradient: Mapping[str, Tensor]) -> list[str]:
        return parameter_names(backend, gradient, self._layers)

    def estimate(self, request: Request) -> tuple[Tensor, dict[str, Tensor] | None]:
        parts, updates = exact_estimate(
            request.backend,
            request.candidates,
            request.operator,
            request.proxy_gradient,
            parameters=self.uses(request.backend, request.proxy_gradient),
            length=request.length,
            keep_updates=request.keep_updates,
        )
        return parts, None if updates is None else {"": updates}
