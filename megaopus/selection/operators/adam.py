"""Derives P_t of Adam and AdamW, torch's and Apex's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megaopus.selection.operators.maps import Adaptive, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import refuse_maximize


@operator_of_class("Adam", "AdamW", "FusedAdam", state=("exp_avg_sq",))
def adam(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Adam and AdamW: C_t / (sqrt(v / (1 - b2^(t-1))) + eps), C_t = lr (1 - b1) / (1 - b1^t).

    t is the step about to be taken: the state holds v after t - 1 steps and is corrected for as many, while b1's
    correction is the one the coming update uses. With amsgrad, v is its running maximum. Bounded by a gradient g:
    v' = b2 v + (1 - b2) g^2 in place of v, corrected for t steps, as the update itself would have it; then
    |P g| <= C_t sqrt((1 - b2^t) / (1 - b2)) whatever g is.
    """
    refuse_maximize(group)
    step = float(state.get("step", group.get("step", 0)))  # apex keeps it in the group
    if step < 1 or "exp_avg_sq" not in state:
        return None
    beta1, beta2 = (float(beta) for beta in group["betas"])
    corrected = group.get("bias_correction", True)
    first, second = (1 - beta1 ** (step + 1), 1 - beta2**step) if corrected else (1.0, 1.0)
    v, largest = state["exp_avg_sq"], state["max_exp_avg_sq"] if group.get("amsgrad") else None
    scale = group["lr"] * (1 - beta1) / first

    @torch.no_grad()
    def factor(gradient: Tensor | None) -> Tensor:
        moment, correction = v if largest is None else largest, second
        if gradient is not None:
            moment = v * beta2 + (1 - beta2) * gradient.to(v.dtype).square()
            moment = moment if largest is None else moment.maximum(largest)
            correction = 1 - beta2 ** (step + 1) if corrected else 1.0
        return (moment / correction).sqrt_().add_(group["eps"]).reciprocal_().mul_(scale)

    return Adaptive(factor)
