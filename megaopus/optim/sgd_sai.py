"""SGD-SaI: momentum at learning rates set once, by the first gradient (Xu et al., arXiv 2412.11768)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.shards import sum_parts
from megaopus.optim.base import LayoutOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec, momentum


class SGDSaI(LayoutOptimizer):
    """gsnr = ||G|| / (std(G) + eps) of the first gradient, M <- mu M + (1-mu) G, W <- (1 - lr wd) W - lr gsnr M.

    gsnr is one number for a tensor, of the whole of it at every layout, and part of the state. A tensor whose gradient
    is zero has none yet and is set by its first other gradient; one whose entries are all equal (or just one) gets 1.
    """

    shaped = ("momentum_buffer",)
    whole = ("gsnr",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        tp_group: dist.ProcessGroup | None = None,
    ):
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, tp_group)
        self._unset: set[Tensor] | None = None  # None: not looked at since the state was made or loaded

    def new_whole(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"gsnr": torch.zeros(1, dtype=parameter.dtype, device=parameter.device)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._unset = None

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if self._unset is None:
            parameters = [p for g in self.param_groups for p in g["params"]]
            self._unset = {p for p in parameters if not bool(self.state_of(p)["gsnr"])}
        if parameter in self._unset:
            self._set(parameter, gradient, state, group)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer * state["gsnr"], alpha=group["lr"])

    def _set(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        count = torch.Size(self.whole_shape(parameter)).numel()
        total = sum_parts(gradient.double().sum().view(1), parameter, self.splitting(parameter))
        square = sum_parts(gradient.double().square().sum().view(1), parameter, self.splitting(parameter))
        deviation = ((square - total.square() / count) / max(1, count - 1)).clamp(min=0).sqrt()
        if not bool(square):
            return
        flat = deviation <= 1e-6 * (square / count).sqrt()  # what is left of equal entries is rounding
        gsnr = torch.where(flat, 1.0, square.sqrt() / (deviation + group["eps"]))
        state["gsnr"].copy_(gsnr)
        assert self._unset is not None
        self._unset.discard(parameter)


def make_sgd_sai(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> SGDSaI:
    """Return SGD-SaI as ``config`` and its own ``settings`` have it."""
    return SGDSaI(groups, lr=config.lr, momentum=settings["momentum"], tp_group=tp_group)


register_optimizer(
    "sgd_sai",
    Spec(
        make=make_sgd_sai,
        shaped=SGDSaI.shaped,
        settings={"momentum": momentum(0.9)},
        map_size=lambda rows, columns: 0,  # one number for all
        example={"lr": 5e-2},
    ),
)
