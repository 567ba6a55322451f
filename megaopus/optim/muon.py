"""Muon, right for weights of which tensor-parallel ranks hold parts.

torch.optim.Muon orthogonalises the tensor it is given, in bfloat16: under tensor parallelism that is the shard, and the
update then depends on the layout (docs/decisions/002-own-muon.md). This one gathers the momentum of a sharded matrix,
orthogonalises the whole, and keeps its part. State and group keys are torch.optim.Muon's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.shards import group_size, is_expert, whole_of
from megaopus.newton_schulz import orthogonalise, working_type
from megaopus.optim.base import LayoutOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Groups, Spec, momentum
from megaopus.settings import Setting

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ENOUGH = 1 << 26
"""Elements of matrices that keep a GPU busy."""


def together(shape: Sequence[int], device: torch.device) -> int:
    """Say how many matrices of a shape are orthogonalised at once."""
    if device.type != "cuda":  # gains nothing, and keeps the bits of earlier runs
        return 1
    return max(1, ENOUGH // math.prod(shape))


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

    def update_group(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Orthogonalise matrices of one shape together, each on one of the ranks that hold it; a collective call."""
        alike: dict[tuple[bool, tuple[int, ...]], list[Tensor]] = {}
        for parameter in parameters:
            alike.setdefault((is_expert(parameter), tuple(self.whole_shape(parameter))), []).append(parameter)
        for (_, shape), matrices in alike.items():
            turn = group_size(self.sharing(matrices[0])) * together(shape, matrices[0].device)
            for first in range(0, len(matrices), turn):
                self._take_turn(matrices[first : first + turn], group)

    def _take_turn(self, matrices: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Update some of one shape, all of them experts' or none."""
        sharing = self.sharing(matrices[0])
        ranks = group_size(sharing)
        rank = 0 if ranks == 1 else dist.get_rank(sharing)
        mine: list[Tensor] = []
        finishes: list[Callable[[Tensor], None]] = []
        for number, parameter in enumerate(matrices):
            assert parameter.grad is not None
            whole, finish = self.begin(parameter, parameter.grad, self.next_state(parameter), group)
            finishes.append(finish)
            if number % ranks == rank:
                mine.append(whole)
            del whole
        found = self._orthogonal_of(mine, group)
        for number, (parameter, finish) in enumerate(zip(matrices, finishes, strict=True)):
            owner, place = number % ranks, number // ranks
            if owner == rank:
                direction = found[place]
            else:
                shape, dtype = self.whole_shape(parameter), working_type(parameter)
                direction = torch.empty(shape, dtype=dtype, device=parameter.device)
            if ranks > 1:
                direction = direction.contiguous()
                dist.broadcast(direction, group=sharing, group_src=owner)
            finish(direction)

    def _orthogonal_of(self, wholes: list[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
        """NS(U) of matrices of one shape."""
        if len(wholes) < 2:
            return [self.orthogonal(whole, group) for whole in wholes]
        stacked = torch.stack(wholes)
        wholes.clear()
        return list(self.orthogonal(stacked, group))

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        whole, finish = self.begin(parameter, gradient, state, group)
        finish(self.orthogonal(whole, group))

    def begin(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """(the whole of U, what changes the parameter given NS(U)), with the state brought up to date."""
        whole = whole_of(self.averaged(gradient, state, group), parameter, self.splitting(parameter))

        def finish(orthogonal: Tensor) -> None:
            direction = self.part(self.scaled(orthogonal, parameter.dtype), parameter)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])

        return whole, finish

    def averaged(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """U, with the momentum brought up to date."""
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def scaled(self, orthogonal: Tensor, dtype: torch.dtype) -> Tensor:
        """max(1, m/n)^.5 NS(U) of a whole m x n matrix, in ``dtype``; may change ``orthogonal``."""
        return orthogonal.to(dtype).mul_(max(1.0, orthogonal.shape[0] / orthogonal.shape[1]) ** 0.5)

    def orthogonal(self, whole: Tensor, group: dict[str, Any]) -> Tensor:
        """NS(U) of a whole matrix, or of several (k, m, n)."""
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
