"""torch's own optimizers, which are right at every layout: their updates are elementwise, their states tensors."""

from __future__ import annotations

import torch

from megaopus.optim.base import Spec

ADAMW = Spec(
    make=lambda groups, config, settings, tp_group: torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
    ),
    shaped=("exp_avg", "exp_avg_sq"),
    settings={},
    elementwise=True,
)
SGD = Spec(
    make=lambda groups, config, settings, tp_group: torch.optim.SGD(
        groups, lr=config.lr, momentum=settings["momentum"], nesterov=settings["nesterov"]
    ),
    shaped=("momentum_buffer",),
    settings={"momentum": 0.9, "nesterov": False},
    elementwise=True,
)
