"""Lion: the sign of an average of gradients (Chen et al., arXiv 2302.06675), as pytorch-optimizer has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from megaopus.errors import EngineError
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec


def make_lion(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> Optimizer:
    """Return pytorch-optimizer's Lion as ``config`` has it. Raises EngineError where that is not installed."""
    lion = import_lion()
    return lion(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), weight_decay=0.0)


def import_lion() -> Any:
    """Return pytorch-optimizer's class. Raises EngineError where that is not installed."""
    try:
        from pytorch_optimizer import Lion
    except ImportError as error:
        raise EngineError(
            f"optim.name=lion, but pytorch_optimizer cannot be imported ({error}): pip install 'megaopus[lion]'"
        ) from error
    return Lion


register_optimizer(
    "lion",
    Spec(
        make=make_lion,
        shaped=("exp_avg",),
        update_numbers=1,
        elementwise=True,
        check_installed=import_lion,
        example={"lr": 5e-3, "betas": [0.95, 0.98]},
    ),
)
