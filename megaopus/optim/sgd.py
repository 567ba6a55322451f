"""SGD as torch has it, which is right at every layout: its update is elementwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec, momentum
from megaopus.settings import Setting


def make_sgd(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> torch.optim.SGD:
    """Return torch's SGD as ``config`` and its own ``settings`` have it."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=settings["momentum"], nesterov=settings["nesterov"])


register_optimizer(
    "sgd",
    Spec(
        make=make_sgd,
        shaped=("momentum_buffer",),
        settings={
            "momentum": momentum(0.9),
            "nesterov": Setting(default=False, doc="Nesterov's momentum: look one update ahead."),
        },
        stateless=lambda settings: settings["momentum"] == 0,
        elementwise=True,
        map_size=lambda rows, columns: 0,  # one number for all
        example={"lr": 0.5, "settings": {"nesterov": True}},
    ),
)
