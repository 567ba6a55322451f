"""Holds what several update rules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def refuse_maximize(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an optimizer that climbs."""
    if group.get("maximize"):
        raise ValueError(
            "selection lowers a loss, but the optimizer was made with maximize=True: negate the loss instead"
        )


def scalar(value: float | Tensor, parameter: Tensor) -> Tensor:
    """Put a number beside the parameter, as a tensor."""
    return torch.as_tensor(value, dtype=torch.float32, device=parameter.device)


def whole(group: Mapping[str, Any], value: Tensor) -> Tensor:
    """Gather the whole of a matrix that ranks share; collective then."""
    return value if group.get("shard") is None else group["shard"].gather(value)


def saturated(lr: float, weight: float, limit: Tensor, gradient: Tensor | None) -> Tensor:
    """Turn ``limit`` into lr weight / limit, the limit raised to weight |gradient|; 0 where both are 0 or no number."""
    if gradient is not None:
        torch.maximum(limit, gradient.to(limit.dtype).abs().mul_(weight), out=limit)
    return limit.reciprocal_().mul_(lr * weight).nan_to_num_(nan=0.0, posinf=0.0)
