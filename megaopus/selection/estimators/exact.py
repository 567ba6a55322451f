"""The oracle: utilities from float64 per-sample gradients. One backward pass per candidate; meant for small models."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from megaopus.selection.backend import Candidates, Gradient, ScoringBackend, UpdateOperator


def exact_utilities(
    backend: ScoringBackend,
    candidates: Candidates,
    operator: UpdateOperator,
    proxy_gradient: Gradient,
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
    proxy_gradient: Gradient,
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
