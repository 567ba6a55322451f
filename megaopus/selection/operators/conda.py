"""Derives P_t of Conda."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megaopus.selection.operators.adam import adam
from megaopus.selection.operators.maps import Adaptive, ParameterOperator, Rotated
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import whole


@operator_of_class("Conda", state=("exp_avg_sq",))
def conda(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Conda: Adam's, times ``scale``, in the basis Q. Bounded: v takes the rotated gradient in, as Adam's does."""
    if "projection" not in state or (moment := adam(group, state, parameter)) is None:
        return None
    assert isinstance(moment, Adaptive)
    rows, columns = whole(group, state["exp_avg_sq"]).shape

    def factor(rotated: Tensor | None) -> Tensor:
        known = moment if rotated is None else moment.bounded(rotated)
        return known.diagonal() * group["scale"]

    return Rotated(state["projection"], rows <= columns, factor, group.get("shard"))
