"""Derives P_t of Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megaopus.selection.operators.maps import Adaptive, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import refuse_maximize, saturated


@operator_of_class("Lion", state=("exp_avg",))
def lion(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Lion: lr (1 - b1) / (b1 |m|): sign(c) = c / |c|, c = b1 m + (1 - b1) g, with the denominator frozen at g = 0.

    A sign has no derivative to speak of; this is what Adam's rule is for its own denominator. Where m is 0, 0. Bounded
    by a gradient g: lr (1 - b1) / max(b1 |m|, (1 - b1) |g|), so that no weight moves further than lr.
    """
    refuse_maximize(group)
    if (m := state.get("exp_avg")) is None:
        return None
    beta1 = group["betas"][0]
    return Adaptive(lambda gradient, m: saturated(group["lr"], 1 - beta1, m.abs().mul_(beta1), gradient), m)
