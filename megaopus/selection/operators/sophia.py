"""Derives P_t of Sophia-G."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megaopus.selection.operators.maps import Adaptive, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import saturated


@operator_of_class("SophiaG", state=("hessian",))
def sophia_g(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Sophia-G: lr (1 - b1) / (rho h + eps); where |b1 m| is above rho h + eps, and the update clipped therefore, 0.

    0 too where h is 0: nothing is known of the curvature. Bounded by a gradient g: the denominator is at least
    (1 - b1) |g|, so that no weight moves further than lr.
    """
    hessian = state.get("hessian")
    if hessian is None or float(state["step"]) < 1:
        return None
    beta1 = group["betas"][0]

    def factor(gradient: Tensor | None, hessian: Tensor, momentum: Tensor) -> Tensor:
        limit = (hessian * group["rho"]).add_(group["eps"])
        free = (hessian > 0).logical_and_(momentum.abs().mul_(beta1) <= limit)
        return saturated(group["lr"], 1 - beta1, limit, gradient).mul_(free)

    return Adaptive(factor, hessian, state["exp_avg"])
