"""Sophia-G: steps by the curvature, clipped (Liu et al., arXiv 2305.14342)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.optim.base import CurvatureOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec
from megaopus.settings import Setting


class SophiaG(CurvatureOptimizer):
    """m as Adam's; W <- (1 - lr wd) W - lr sign(m) min(|m| / (rho h + eps), 1); every k updates, before the update,
    h <- b2 h + (1-b2) B Ghat^2, Ghat the mean gradient of B tokens whose labels the model sampled.

    The authors' code keeps Ghat^2 and multiplies by B in the update; h here is the estimate itself, which does not
    change its meaning with the batch size. Their k-th estimate comes after update 10k - 1; here, as in the paper, the
    first comes before the first update.
    """

    shaped = ("exp_avg", "hessian")
    counts = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        eps: float = 1e-15,
        weight_decay: float = 0.2,
        tp_group: dist.ProcessGroup | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, tp_group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        m = state["exp_avg"].lerp_(gradient, 1 - group["betas"][0])
        ratio = (m.abs() / (state["hessian"] * group["rho"] + group["eps"])).clamp_(max=1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(ratio.mul_(m.sign()), alpha=group["lr"])

    @torch.no_grad()
    def estimate(self, tokens: int) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    beta2 = group["betas"][1]
                    hessian = self.state_of(parameter)["hessian"]
                    hessian.mul_(beta2).addcmul_(gradient, gradient, value=(1 - beta2) * tokens)


def make_sophia_g(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> SophiaG:
    """Return Sophia-G as ``config`` and its own ``settings`` have it."""
    betas = (config.betas[0], config.betas[1])
    return SophiaG(groups, lr=config.lr, betas=betas, rho=settings["rho"], tp_group=tp_group)


register_optimizer(
    "sophia_g",
    Spec(
        make=make_sophia_g,
        shaped=SophiaG.shaped,
        settings={
            "rho": Setting(
                default=0.05, above=0, doc="Factor on the curvature that divides a step; larger clips less."
            ),
            "curvature_every": Setting(default=10, min=1, doc="Steps between two estimates of the curvature."),
        },
        curvature=True,
        whole_because="takes its curvature from gradients of its own",
        example={"lr": 2e-2, "settings": {"rho": 20.0, "curvature_every": 3}},
    ),
)
