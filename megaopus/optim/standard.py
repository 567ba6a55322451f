"""Makes SGD and AdamW of torch, right at every layout: their updates are elementwise, their states tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megaopus.optim.base import Groups
from megaopus.optim.config import OptimConfig


def make_adamw(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> torch.optim.AdamW:
    """Return AdamW as ``config`` has it."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def make_sgd(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> torch.optim.SGD:
    """Return SGD as ``config`` and its own ``settings`` have it."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=settings["momentum"], nesterov=settings["nesterov"])
