"""Derives P_t of Muon, torch's and ours, and of NAMO and NAMO-D, which scale its direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megaopus.newton_schulz import orthogonalise, product
from megaopus.selection.operators.maps import Deferred, Derivative, OneSided, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import whole

Scale = Callable[[Tensor], Tensor | float]
"""The whole of U -> what multiplies its orthogonalised form: a number, or one for each column."""


@operator_of_class("Muon", state=("momentum_buffer",))
def muon(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Muon: s = lr times the optimizer's scale for the shape, the same whatever the gradient."""
    _muon_shape_scale(group, 1, 1)  # an unknown rule is refused here
    return _operator(group, state, lambda update: group["lr"] * _muon_shape_scale(group, *update.shape))


@operator_of_class("NAMO", state=("momentum_buffer",))
def namo(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """NAMO: s = min(0.2 a sqrt(max(m, n)), 1), a as the optimizer's, its v frozen.

    As for Adam, v after t - 1 steps is corrected for as many, momentum for t.
    """

    def scale(update: Tensor) -> Tensor:
        rate = _namo_rate(group, state, update.norm(), state["v_squared"][0])
        return (0.2 * max(update.shape) ** 0.5 * rate).clamp(max=1)

    return _operator(group, state, scale)


@operator_of_class("NAMOD", state=("momentum_buffer",))
def namo_d(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """NAMO-D: column j times s_j = min(0.2 sqrt(max(m, n)) e s_j, 1), s_j clamped, its V frozen.

    Not self-adjoint where m > n: S then mixes the columns that are scaled.
    """

    def scale(update: Tensor) -> Tensor:
        rate_N = _namo_rate(group, state, update.norm(dim=0), state["V"])
        mean = rate_N.mean()
        rate_N = rate_N.clamp(group["clamp"] * mean, mean / group["clamp"])
        return (0.2 * max(update.shape) ** 0.5 * rate_N).clamp(max=1)

    return _operator(group, state, scale)


def _operator(group: Mapping[str, Any], state: Mapping[str, Any], scale: Scale) -> ParameterOperator | None:
    """P_t where the step on a gradient is scale(U) NS(U), U = kappa g + ... of the momentum M and the gradient g.

    kappa is 1 - mu^2 with Nesterov, else 1 - mu. ``muon_operator`` 'full': kappa times the derivative of the step
    (without weight decay) at U = M, where a gradient that equals the momentum leads, whatever mu is; not self-adjoint,
    for NS begins by dividing by a norm. 'paper': kappa scale(M) S_1 g / ||M||_F with S_1 = aI + bA + cA^2 the first
    factor of the Newton-Schulz iteration, A = X X^T, X = M / ||M||_F, on the short side of the matrix. A matrix without
    momentum does not move: 0.
    """
    if state.get("momentum_buffer") is None or ("step" in state and float(state["step"]) < 1):
        return None
    return Deferred(lambda: _built(group, state, scale))


@torch.no_grad()
def _built(group: Mapping[str, Any], state: Mapping[str, Any], scale: Scale) -> ParameterOperator:
    """Work ``_operator`` out. Collective where ranks share the matrix."""
    momentum, mu, shard = whole(group, state["momentum_buffer"]), group["momentum"], group.get("shard")
    momentum = momentum.to(torch.promote_types(momentum.dtype, torch.float32))
    length = momentum.norm()
    kappa = (1 - (mu**2 if group["nesterov"] else mu)) * (length > 0)
    if group["muon_operator"] == "full":
        return Derivative(lambda update: scale(update) * _newton_schulz(update, group), momentum, kappa, shard)
    left, norm = momentum.shape[0] <= momentum.shape[1], length.clamp(min=group.get("eps") or 1e-30)
    x = (momentum if left else momentum.t()) / norm
    a, b, c = group["ns_coefficients"]
    gram = product(x, x.t())
    first = a * torch.eye(len(x), dtype=x.dtype, device=x.device) + b * gram + c * product(gram, gram)
    first = (first + first.t()) * (0.5 * kappa / norm)  # symmetric but for rounding, which is averaged out
    scales = scale(momentum)
    if isinstance(scales, Tensor) and scales.ndim:
        return OneSided(first, left, shard, scales)
    return OneSided(first * scales, left, shard)


def _newton_schulz(update: Tensor, group: Mapping[str, Any]) -> Tensor:
    """NS(U) as the optimizer has it."""
    return orthogonalise(update, group["ns_steps"], tuple(group["ns_coefficients"]), group["eps"]).to(update.dtype)


def _namo_rate(group: Mapping[str, Any], state: Mapping[str, Any], norm: Tensor, second: Tensor) -> Tensor:
    step = float(state["step"])
    correction = (1 - group["mu2"] ** step) ** 0.5 / (1 - group["momentum"] ** (step + 1))
    return group["lr"] * correction * norm / (second.to(norm.dtype).sqrt() + group["scale_eps"])


def _muon_shape_scale(group: Mapping[str, Any], rows: int, columns: int) -> float:
    rule = group.get("adjust_lr_fn") or "original"
    if rule == "original":
        return max(1.0, rows / columns) ** 0.5
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    raise ValueError(f"Muon's adjust_lr_fn={rule!r} is unknown: use 'original' or 'match_rms_adamw'")
