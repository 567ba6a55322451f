"""Derives P_t of SGD-SaI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megaopus.selection.operators.maps import Diagonal, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import scalar


@operator_of_class("SGDSaI", state=("gsnr",))
def sgd_sai(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """SGD-SaI: lr gsnr (1 - mu) I; 0 while gsnr, which the first gradient sets, is not set."""
    if "gsnr" not in state:
        return None
    return Diagonal(scalar(group["lr"] * (1 - group["momentum"]) * state["gsnr"][0], parameter))
