"""Derives P_t of Muon, torch's and ours, and of NAMO and NAMO-D, which scale its direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megaopus.selection.operators.maps import OneSided, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import whole


@operator_of_class("Muon", state=("momentum_buffer",))
def muon(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Muon: lr s kappa S / ||M||_F, M the momentum buffer, S = S_k .. S_1, S_j = aI + bA_j + cA_j^2, A_j = X_j X_j^T.

    X_1 = M / ||M||_F, X_(j+1) = S_j X_j, on the short side of the matrix. kappa is the weight of the new gradient in
    the update: 1 - mu^2 with Nesterov, else 1 - mu. s is the optimizer's scale for the shape. ``muon_operator`` 'paper'
    keeps S_1; 'full' takes every factor of the Newton-Schulz iteration. A matrix without momentum does not move: 0.
    """
    found = _newton_schulz(group, state)
    if found is None:
        return None
    matrix, rows, columns = found
    return _one_sided(group, matrix * (group["lr"] * _muon_shape_scale(group, rows, columns)), rows <= columns)


@operator_of_class("NAMO", state=("momentum_buffer",))
def namo(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """NAMO: Muon's with min(0.2 a sqrt(max(m, n)), 1) for lr s; a as the optimizer's with ||M|| for ||U||, frozen.

    As for Adam, v after t - 1 steps is corrected for as many, momentum for t.
    """
    found = _newton_schulz(group, state)
    if found is None:
        return None
    matrix, rows, columns = found
    rate = _namo_rate(group, state, whole(group, state["momentum_buffer"]).norm(), state["v_squared"])
    scale = (0.2 * max(rows, columns) ** 0.5 * rate).clamp(max=1).float()
    return _one_sided(group, matrix * scale, rows <= columns)


@operator_of_class("NAMOD", state=("momentum_buffer",))
def namo_d(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """NAMO-D: S / ||M||_F kappa, then columns times min(0.2 sqrt(max(m, n)) e s_j, 1), s_j clamped, all frozen.

    Not self-adjoint where m > n: S then mixes the columns that are scaled.
    """
    found = _newton_schulz(group, state)
    if found is None:
        return None
    matrix, rows, columns = found
    rate_N = _namo_rate(group, state, whole(group, state["momentum_buffer"]).norm(dim=0), state["V"])
    mean = rate_N.mean()
    rate_N = rate_N.clamp(group["clamp"] * mean, mean / group["clamp"])
    scale_N = (0.2 * max(rows, columns) ** 0.5 * rate_N).clamp(max=1)
    return _one_sided(group, matrix, rows <= columns, scale_N.float())


def _namo_rate(group: Mapping[str, Any], state: Mapping[str, Any], norm: Tensor, second: Tensor) -> Tensor:
    step = float(state["step"])
    correction = (1 - group["mu2"] ** step) ** 0.5 / (1 - group["momentum"] ** (step + 1))
    return group["lr"] * correction * norm / (second.sqrt() + group["scale_eps"])


def _newton_schulz(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Tensor, int, int] | None:
    """(kappa S / ||M||_F, rows, columns) of the whole momentum M; zero where M is, None where there is none."""
    if state.get("momentum_buffer") is None or ("step" in state and float(state["step"]) < 1):
        return None
    momentum = whole(group, state["momentum_buffer"])
    rows, columns = momentum.shape
    x = momentum.float() if rows <= columns else momentum.float().t()
    length = x.norm()
    norm = length.clamp(min=group.get("eps") or 1e-30)
    x = x / norm
    a, b, c = group["ns_coefficients"]
    identity = torch.eye(len(x), device=x.device)
    product = identity
    for _ in range(group["ns_steps"] if group["muon_operator"] == "full" else 1):
        gram = x @ x.t()
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor @ product
        x = factor @ x
    mu = group["momentum"]
    scale = (1 - (mu**2 if group["nesterov"] else mu)) * (length > 0) / norm
    # every S_j is a polynomial in the same Gram matrix, so the product is symmetric; rounding is averaged out
    return (product + product.t()) * (0.5 * scale), rows, columns


def _one_sided(group: Mapping[str, Any], matrix: Tensor, left: bool, columns: Tensor | None = None) -> OneSided:
    return OneSided(matrix, left, group.get("shard"), columns)


def _muon_shape_scale(group: Mapping[str, Any], rows: int, columns: int) -> float:
    rule = group.get("adjust_lr_fn") or "original"
    if rule == "original":
        return max(1.0, rows / columns) ** 0.5
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    raise ValueError(f"Muon's adjust_lr_fn={rule!r} is unknown: use 'original' or 'match_rms_adamw'")
