"""Adafactor: Adam's second moment kept as row and column means (Shazeer and Stern, arXiv 1804.04235).

The update is torch.optim.Adafactor's, and so are the names of state and settings; transformers' class of the same name
has others. torch's is right on a whole matrix only: here means and norms are those of the whole at every layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.shards import group_size, is_split, sum_parts, whole_of
from megaopus.optim.base import LayoutOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec
from megaopus.settings import Setting


class Adafactor(LayoutOptimizer):
    """b = t^beta2_decay; R <- (1-b) R + b mean of G^2 over columns, C the same over rows, V = R C / mean(R);
    U = G / max(sqrt V, eps1), a = max(RMS(W), eps2) min(lr, t^-0.5);
    W <- (1 - lr wd) W - a U / max(1, RMS(U) / d).

    A vector keeps V itself. R (m, 1) and C (1, n) of an m x n matrix are whole on every rank.
    """

    shaped = ("variance",)
    whole = ("row_var", "col_var")
    counts = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        tp_group: dist.ProcessGroup | None = None,
    ):
        """``eps``: (eps1, eps2); eps1 None is the rounding of the weights' precision."""
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, defaults, tp_group)

    def shaped_of(self, parameter: Tensor) -> tuple[str, ...]:
        return self.shaped if parameter.dim() < 2 else ()

    def new_whole(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.dim() < 2:
            return {}
        *_, rows, columns = self.whole_shape(parameter)
        return {"row_var": parameter.new_zeros(rows, 1), "col_var": parameter.new_zeros(1, columns)}

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        t, (eps1, eps2) = float(state["step"]), group["eps"]
        eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
        rate = self._rms(parameter, parameter).clamp(min=eps2) * min(group["lr"], t**-0.5)
        weight = t ** group["beta2_decay"]
        if parameter.dim() < 2:
            second = state["variance"].lerp_(gradient.square(), weight).clamp(min=eps1**2)
        else:
            second = self._factored(parameter, gradient, state, weight, eps1).clamp_(min=eps1**2)
        update = second.rsqrt_().mul_(gradient)
        rate = rate / (self._rms(update, parameter) / group["d"]).clamp(min=1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(rate))

    def _factored(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], weight: float, eps1: float
    ) -> Tensor:
        """This rank's part of V, with R and C brought up to date."""
        rows, columns = self.whole_shape(parameter)
        split = is_split(parameter) and group_size(self.splitting(parameter)) > 1
        by_row = split and parameter.partition_dim == 0  # type: ignore[attr-defined]
        by_column = split and not by_row
        # squares of norms: no tensor of squares is made
        square_M1 = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square()
        square_1N = torch.linalg.vector_norm(gradient, dim=0, keepdim=True).square()
        # a rank has whole sums for the rows or columns that it holds, and parts of the others
        square_M1 = (whole_of if by_row else sum_parts)(square_M1, parameter, self.splitting(parameter))
        square_1N = (whole_of if by_column else sum_parts)(square_1N, parameter, self.splitting(parameter))
        row_M1 = state["row_var"].lerp_(square_M1 / columns, weight)
        col_1N = state["col_var"].lerp_(square_1N / rows, weight)
        own_M1 = self.part(row_M1, parameter) if by_row else row_M1
        own_1N = self.part(col_1N, parameter) if by_column else col_1N
        return (own_M1 @ own_1N).div_(row_M1.mean().clamp(min=eps1))

    def _rms(self, part: Tensor, parameter: Tensor) -> Tensor:
        """(1,) root mean square of the whole of which ``part`` is this rank's, split as ``parameter`` is."""
        square = sum_parts(torch.linalg.vector_norm(part).square().view(1), parameter, self.splitting(parameter))
        return (square / torch.Size(self.whole_shape(parameter)).numel()).sqrt()


def make_adafactor(
    groups: Groups, config: OptimConfig, settings: Mapping[str, Any], tp_group: dist.ProcessGroup | None
) -> Adafactor:
    """Return Adafactor as ``config`` and its own ``settings`` have it."""
    return Adafactor(
        groups,
        lr=config.lr,
        beta2_decay=settings["beta2_decay"],
        eps=(settings["eps1"], settings["eps2"]),
        d=settings["d"],
        tp_group=tp_group,
    )


register_optimizer(
    "adafactor",
    Spec(
        make=make_adafactor,
        shaped=Adafactor.shaped,
        settings={
            "beta2_decay": Setting(default=-0.8, max=0, doc="A second moment of step t has weight t ** beta2_decay."),
            "eps1": Setting(
                default=torch.finfo(torch.float32).eps,
                min=1e-18,  # its square is still a number in fp32
                doc="Smallest root of the second moment that divides a gradient.",
            ),
            "eps2": Setting(default=1e-3, min=0, doc="Smallest root mean square of a weight that scales its steps."),
            "d": Setting(default=1.0, min=1, doc="Root mean square above which an update is scaled down."),
        },
        factored=True,
        extra_state=lambda rows, columns: rows + columns,
        whole_because="needs the row and column means of whole matrices",
        example={"lr": 1e-2, "settings": {"eps1": 1e-3}},
    ),
)
