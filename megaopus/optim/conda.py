"""Conda: Adam in the basis of the momentum's singular vectors (Wang et al., arXiv 2509.24218)."""

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
from megaopus.optim.spec import Groups, Spec
from megaopus.settings import Setting


class Conda(LayoutOptimizer):
    """m as Adam's; every ``projection_every`` updates Q <- singular vectors of m on its short side; R(X) = Q^T X where
    m has no more rows than columns, else X Q; v <- b2 v + (1-b2) R(G)^2;
    W <- (1 - lr wd) W - lr scale sqrt(1-b2^t) / (1-b1^t) R^T(R(m) / (sqrt v + eps)).

    Q is that of the whole matrix, on every rank; v has the parameter's shape and is split as it is. Matrices only;
    raises ValueError for anything else.
    """

    shaped = ("exp_avg", "exp_avg_sq")
    whole = ("projection",)
    counts = True
    matrices_only = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 6e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        scale: float = 0.25,
        projection_every: int = 2000,
        tp_group: dist.ProcessGroup | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "projection_every": projection_every,
        }
        super().__init__(params, defaults, tp_group)

    def new_whole(self, parameter: Tensor) -> dict[str, Tensor]:
        short = min(self.whole_shape(parameter))
        return {"projection": torch.zeros(short, short, dtype=parameter.dtype, device=parameter.device)}

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        mean = whole_of(state["exp_avg"], parameter, self.splitting(parameter))
        t = float(state["step"])
        if (t - 1) % group["projection_every"] == 0:
            state["projection"].copy_(singular_vectors(mean))
        basis = state["projection"]
        rotated = rotate(whole_of(gradient, parameter, self.splitting(parameter)), basis)
        state["exp_avg_sq"].mul_(beta2).add_(self.part(rotated.square(), parameter), alpha=1 - beta2)
        second = whole_of(state["exp_avg_sq"], parameter, self.splitting(parameter))
        direction = rotate_back(rotate(mean, basis) / (second.sqrt() + group["eps"]), basis)
        rate = group["lr"] * group["scale"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(self.part(direction, parameter), alpha=rate)


def singular_vectors(matrix: Tensor) -> Tensor:
    """Return the singular vectors on the short side s, (s, s), in columns, smallest singular value first.

    By the eigenvectors of the Gram matrix in float64: their signs are arbitrary and cancel in Conda's update.
    """
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()).double()
    return torch.linalg.eigh(wide @ wide.t())[1].to(matrix.dtype)


def rotate(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return R(X) of a whole matrix."""
    return basis.t() @ matrix if matrix.shape[0] <= matrix.shape[1] else matrix @ basis


def rotate_back(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return R^T(X)."""
    return basis @ matrix if matrix.shape[0] <= matrix.shape[1] else matrix @ basis.t()


def make_conda(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> Conda:
    """Return Conda as ``config`` and its own ``settings`` have it."""
    return Conda(
        groups,
        lr=config.matrix_lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        scale=settings["scale"],
        projection_every=settings["projection_every"],
        tp_group=tp_group,
    )


register_optimizer(
    "conda",
    Spec(
        make=make_conda,
        shaped=Conda.shaped,
        settings={
            "scale": Setting(default=0.25, above=0, doc="Factor on the update of a matrix."),
            "projection_every": Setting(default=2000, min=1, doc="Steps between two bases of singular vectors."),
        },
        matrices=True,
        extra_state=lambda rows, columns: min(rows, columns) ** 2,
        example={"lr": 1e-2, "eps": 1e-3, "matrix_lr": 0.02, "settings": {"projection_every": 2}},
    ),
)
