"""NAMO and NAMO-D: Muon's direction at a step size that Adam would take (Zhang, Liu, Schaeffer, arXiv 2602.17080)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.shards import sum_parts, whole_of
from megaopus.optim.config import OptimConfig
from megaopus.optim.muon import NS_STEPS, Muon, shorter_squared
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec, momentum
from megaopus.settings import Setting


class NAMO(Muon):
    """v <- mu2 v + (1-mu2) ||G||_F^2, a = eta sqrt(1-mu2^t) / (1-mu^t) ||U||_F / (sqrt v + eps), U as Muon's;
    W <- (1 - a wd) W - min(0.2 a sqrt(max(m, n)), 1) NS(U).

    v is one number for a matrix, of the whole of it at every layout.
    """

    whole = ("v_squared",)
    counts = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.2e-2,
        momentum: float = 0.95,
        mu2: float = 0.99,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        tp_group: dist.ProcessGroup | None = None,
        **more: Any,
    ):
        super().__init__(
            params, lr, momentum, weight_decay, ns_steps=ns_steps, tp_group=tp_group, mu2=mu2, scale_eps=1e-8, **more
        )

    def new_whole(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"v_squared": torch.zeros(1, dtype=parameter.dtype, device=parameter.device)}

    def begin(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        square = sum_parts(gradient.square().sum().view(1), parameter, self.splitting(parameter))
        state["v_squared"].lerp_(square, 1 - group["mu2"])
        whole = whole_of(self.averaged(gradient, state, group), parameter, self.splitting(parameter))
        rate = adaptive_rate(group, float(state["step"]), whole.norm(), state["v_squared"])
        scale = (0.2 * max(whole.shape) ** 0.5 * rate).clamp(max=1)

        def finish(orthogonal: Tensor) -> None:
            direction = self.part(orthogonal.to(parameter.dtype).mul_(scale), parameter)
            parameter.mul_(1 - rate * group["weight_decay"]).sub_(direction)

        return whole, finish


class NAMOD(NAMO):
    """V_j <- mu2 V_j + (1-mu2) ||G_j||^2 for each column j, s_j = ||U_j|| / (sqrt V_j + eps) brought into
    [c mean(s), mean(s) / c]; W <- (1 - a wd) W - NS(U) diag(min(0.2 sqrt(max(m, n)) e s_j, 1)).

    e = eta sqrt(1-mu2^t) / (1-mu^t), a = e mean(s). V is that of all columns on every rank.
    """

    whole = ("V",)

    def __init__(self, params: Iterable[Any], lr: float = 9e-3, clamp: float = 0.01, **more: Any):
        super().__init__(params, lr, clamp=clamp, **more)

    def new_whole(self, parameter: Tensor) -> dict[str, Tensor]:
        columns = self.whole_shape(parameter)[1]
        return {"V": torch.zeros(columns, dtype=parameter.dtype, device=parameter.device)}

    def begin(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        gradient_MN = whole_of(gradient, parameter, self.splitting(parameter))
        state["V"].lerp_(gradient_MN.square().sum(0), 1 - group["mu2"])
        whole = whole_of(self.averaged(gradient, state, group), parameter, self.splitting(parameter))
        rate_N = adaptive_rate(group, float(state["step"]), whole.norm(dim=0), state["V"])
        mean = rate_N.mean()
        rate_N = rate_N.clamp(group["clamp"] * mean, mean / group["clamp"])
        scale_N = (0.2 * max(whole.shape) ** 0.5 * rate_N).clamp(max=1)

        def finish(orthogonal: Tensor) -> None:
            direction = self.part(orthogonal.to(parameter.dtype) * scale_N, parameter)
            parameter.mul_(1 - mean * group["weight_decay"]).sub_(direction)

        return whole, finish


def adaptive_rate(group: dict[str, Any], t: float, norm: Tensor, second: Tensor) -> Tensor:
    """eta sqrt(1-mu2^t) / (1-mu^t) norm / (sqrt second + eps)."""
    correction = (1 - group["mu2"] ** t) ** 0.5 / (1 - group["momentum"] ** t)
    return group["lr"] * correction * norm / (second.sqrt() + group["scale_eps"])


def make_namo(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> NAMO:
    """Return NAMO as ``config`` and its own ``settings`` have it."""
    return NAMO(groups, lr=config.matrix_lr, tp_group=tp_group, **settings)


def make_namo_d(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> NAMOD:
    """Return NAMO-D as ``config`` and its own ``settings`` have it."""
    return NAMOD(groups, lr=config.matrix_lr, tp_group=tp_group, **settings)


_COMMON = {
    "momentum": momentum(0.95),
    "mu2": Setting(default=0.99, min=0, below=1, doc="Decay of the average of squared gradients that sets the rate."),
    "ns_steps": NS_STEPS,
}
_CLAMP = Setting(default=0.01, above=0, doc="Columns' rates lie in [clamp, 1 / clamp] times their mean.")
_EXAMPLE = {"lr": 1e-2, "eps": 1e-3, "matrix_lr": 0.02}
register_optimizer(
    "namo",
    Spec(
        make=make_namo,
        shaped=NAMO.shaped,
        settings=_COMMON,
        matrices=True,
        map_size=shorter_squared,
        example={**_EXAMPLE, "matrix_weight_decay": 0.1},
    ),
)
register_optimizer(
    "namo_d",
    Spec(
        make=make_namo_d,
        shaped=NAMOD.shaped,
        settings={**_COMMON, "clamp": _CLAMP},
        matrices=True,
        map_size=shorter_squared,
        extra_state=lambda rows, columns: columns,
        example={**_EXAMPLE, "settings": {"clamp": 0.3}},
    ),
)
