"""Derives P_t of SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megaopus.selection.operators.maps import Diagonal, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import refuse_maximize, scalar


@operator_of_class("SGD", state=("momentum_buffer",))
def sgd(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator:
    """torch.optim.SGD: lr I; with momentum lr (1 - dampening) I, with Nesterov lr (1 + momentum (1 - dampening)) I.

    The first step copies the gradient into the momentum buffer, so no dampening applies there.
    """
    refuse_maximize(group)
    factor = 1.0
    momentum = group.get("momentum", 0)
    if momentum:
        fresh = 1.0 if state.get("momentum_buffer") is None else 1.0 - group.get("dampening", 0)
        factor = 1.0 + momentum * fresh if group.get("nesterov") else fresh
    return Diagonal(scalar(group["lr"] * factor, parameter))
