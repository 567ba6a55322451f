"""Lion: the sign of an average of gradients (Chen et al., arXiv 2302.06675), as pytorch-optimizer has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from megaopus.errors import EngineError
from megaopus.optim.base import Groups
from megaopus.optim.config import OptimConfig


def make_lion(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> Optimizer:
    """Return Lion as ``config`` has it. Raises EngineError where pytorch-optimizer is not installed."""
    try:
        from pytorch_optimizer import Lion
    except ImportError as error:
        raise EngineError(
            f"optim.name=lion, but pytorch_optimizer cannot be imported ({error}): pip install 'megaopus[lion]'"
        ) from error
    return Lion(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), weight_decay=0.0)
