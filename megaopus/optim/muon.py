"""Muon, right for weights of which tensor-parallel ranks hold parts.

torch.optim.Muon orthogonalises the tensor it is given, in bfloat16: under tensor parallelism that is the shard, and the
update then depends on the layout (docs/decisions/002-own-muon.md). This one gathers the momentum of a sharded matrix,
orthogonalises the whole, and keeps its part. State and group keys are torch.optim.Muon's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.shards import whole_of
from megaopus.optim.base import LayoutOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec, momentum
from megaopus.settings import Setting

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """Newton-Schulz iteration X <- aX + (bA + cA^2)X, A = XX^T, from X = matrix / ||matrix||_F, on the short side.

    Source: Keller Jordan et al., "Muon", 2024. Runs in the matrix's dtype; shape kept.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / (x.norm() + eps)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


class Muon(LayoutOptimizer):
    """Momentum M <- mu M + (1-mu) G, update U = (1-mu) G + mu M (Nesterov), W <- W - lr max(1, m/n)^.5 NS(U).

    Matrices only; raises ValueError for anything else.
    """

    shaped = ("momentum_buffer",)
    matrices_only = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        tp_group: dist.ProcessGroup | None = None,
        **more: Any,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "adjust_lr_fn": "original",
            **more,
        }
        super().__init__(params, defaults, tp_group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        direction = self.direction(self.averaged(gradient, state, group), parameter, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])

    def averaged(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """U, with the momentum brought up to date."""
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def direction(self, update: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """max(1, m/n)^.5 NS(U) of a whole m x n matrix from this rank's part of U, ``update``; the same part of it."""
        whole = whole_of(update, parameter, self.tp_group)
        scale = max(1.0, whole.shape[0] / whole.shape[1]) ** 0.5
        return self.part(self.orthogonal(whole, group).mul_(scale), parameter)

    def orthogonal(self, whole: Tensor, group: dict[str, Any]) -> Tensor:
        """NS(U) of a whole matrix."""
        return orthogonalise(whole, group["ns_steps"], tuple(group["ns_coefficients"]), group["eps"])


def make_muon(
    groups: Groups,
    config: OptimConfig,
    settings: Mapping[str, Any],
    tp_group: dist.ProcessGroup | None,
    cls: type[Muon] = Muon,
) -> Muon:
    """Return Muon, or a class that extends it, as ``config`` and its own ``settings`` have it."""
    return cls(
        groups,
        lr=config.matrix_lr,
        momentum=settings["momentum"],
        ns_steps=settings["ns_steps"],
        momentum_range=(settings["momentum_start"], settings["momentum"]),
        momentum_warmup_steps=settings["momentum_warmup_steps"],
        tp_group=tp_group,
    )


def shorter_squared(rows: int, columns: int) -> int:
    """Numbers of the matrix that the update operator multiplies the momentum's shorter side with."""
    return min(rows, columns) ** 2


NS_STEPS = Setting(default=5, min=1, doc="Newton-Schulz iterations that orthogonalise the momentum.")
register_optimizer(
    "muon",
    Spec(
        make=make_muon,
        shaped=Muon.shaped,
        settings={
            "momentum": momentum(0.95),
            "ns_steps": NS_STEPS,
            "momentum_start": Setting(default=0.85, min=0, below=1, doc="Momentum of the first step."),
            "momentum_warmup_steps": Setting(default=0, min=0, doc="Steps until momentum is whole; 0: at once."),
        },
        matrices=True,
        by_matrix=Muon,
        map_size=shorter_squared,
        example={"lr": 1e-2, "eps": 1e-3, "matrix_lr": 0.02, "matrix_weight_decay": 0.1},
    ),
)
