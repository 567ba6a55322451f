"""AdamW as torch has it, which is right at every layout: its update is elementwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec


def make_adamw(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> torch.optim.AdamW:
    """Return torch's AdamW as ``config`` has it."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


register_optimizer(
    "adamw",
    Spec(
        make=make_adamw,
        shaped=("exp_avg", "exp_avg_sq"),
        counts=True,
        elementwise=True,
        adam_moments=True,
        # Adam divides by sqrt(v) + eps. A gradient element that nearly cancelled (1e-4 among 1e-2) is wrong by 1e-4 of
        # itself after fp32 sums in another order; at eps=1e-4 it is the element with the largest step, and one of an
        # embedding row moved the utilities at cp=2 by 1e-5 (from the same weights and state they agree to 1e-6).
        example={"lr": 1e-2, "eps": 1e-3},
    ),
)
