"""Derives P_t of Adafactor: torch's, ours (which has torch's names) and transformers' (which has others)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaopus.selection.operators.maps import Adaptive, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import refuse_maximize, whole


class _Rule(NamedTuple):
    """Holds what the update takes from settings and state, whichever class has them."""

    rate: Tensor | float
    """What the scaled-down update is multiplied by."""
    weight: float
    """Of the coming gradient's squares in the second moment."""
    threshold: float
    """Root mean square above which an update is scaled down."""
    row_M1: Tensor | None
    col_1N: Tensor | None
    variance: Tensor | None
    """The second moment: its factors, or of a vector itself."""
    added: float
    """To squares of gradients."""
    floor: float | None
    """Under the mean of row_M1 and, as its square, under the second moment; None: there is none."""


@operator_of_class("Adafactor", state=("row_var", "variance", "exp_avg_sq_row", "exp_avg_sq"))
def adafactor(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Adafactor: a_t / sqrt(V), a_t = max(RMS(W), eps2) min(lr, t^-0.5), V = R C / mean(R) or, of a vector, itself.

    t is the step about to be taken; an update is not scaled down, for how large it is depends on the gradient. Bounded
    by a gradient g: V takes g in as the update would, and what it makes of g is scaled down to d; then P g is the
    optimizer's own step. With transformers' ``beta1`` a_t (1 - beta1). ``shard``: means are those of the whole.
    """
    refuse_maximize(group)
    if float(state.get("step", 0)) < 1:
        return None
    rule = (_transformers if "clip_threshold" in group else _torch)(group, state, parameter)

    @torch.no_grad()
    def factor(gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return _own(group, _inverse_root(rule, None) * rule.rate)
        gradient = whole(group, gradient)
        inverse = _inverse_root(rule, gradient)
        size = (inverse * gradient).square_().mean().sqrt() / rule.threshold
        return _own(group, inverse.mul_(rule.rate / size.clamp(min=1)))

    return Adaptive(factor)


def _torch(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> _Rule:
    t, (eps1, eps2) = float(state["step"]) + 1, group["eps"]
    floor = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
    rate = _rms(whole(group, parameter)).clamp(min=eps2) * min(float(group["lr"]), t**-0.5)
    rows, columns, vector = state.get("row_var"), state.get("col_var"), state.get("variance")
    return _Rule(rate, t ** group["beta2_decay"], group["d"], rows, columns, _whole(group, vector), 0.0, floor)


def _transformers(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> _Rule:
    t, (eps1, eps2) = float(state["step"]) + 1, group["eps"]
    rate: Tensor | float = group["lr"]
    if group["relative_step"]:
        rate = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
    if group["scale_parameter"]:
        rate = _rms(whole(group, parameter)).clamp(min=eps2) * rate
    if group["beta1"] is not None:
        rate = rate * (1 - group["beta1"])
    rows, columns, vector = (state.get(f"exp_avg_sq{part}") for part in ("_row", "_col", ""))
    rows, columns = (None, None) if rows is None or columns is None else (rows.unsqueeze(-1), columns.unsqueeze(-2))
    weight = t ** group["decay_rate"]
    return _Rule(rate, weight, group["clip_threshold"], rows, columns, _whole(group, vector), eps1, None)


def _inverse_root(rule: _Rule, gradient: Tensor | None) -> Tensor:
    """1 / sqrt(V) of the whole parameter, after V takes in ``gradient``."""
    row, col, variance = rule.row_M1, rule.col_1N, rule.variance
    if gradient is not None:
        square = gradient.to((row if row is not None else variance).dtype).square() + rule.added  # type: ignore[union-attr]
        row = None if row is None else row.lerp(square.mean(-1, keepdim=True), rule.weight)
        col = None if col is None else col.lerp(square.mean(-2, keepdim=True), rule.weight)
        variance = None if variance is None else variance.lerp(square, rule.weight)
        del square  # of the whole matrix, as is all that follows: in place
    if row is None or col is None:
        assert variance is not None
        return (variance if rule.floor is None else variance.clamp(min=rule.floor**2)).rsqrt()
    mean = row.mean(-2, keepdim=True)
    if rule.floor is None:
        return (row / mean).rsqrt() * col.rsqrt()  # apart: their product may be too small for fp32
    return (row @ col).div_(mean.clamp(min=rule.floor)).clamp_(min=rule.floor**2).rsqrt_()


def _rms(value: Tensor) -> Tensor:
    dtype = torch.promote_types(value.dtype, torch.float32)
    return torch.linalg.vector_norm(value, dtype=dtype) / value.numel() ** 0.5


def _whole(group: Mapping[str, Any], vector: Tensor | None) -> Tensor | None:
    return None if vector is None else whole(group, vector)


def _own(group: Mapping[str, Any], value: Tensor) -> Tensor:
    """This rank's part of a factor."""
    shard = group.get("shard")
    return value if shard is None else value.index_select(shard.dim, shard.index)
