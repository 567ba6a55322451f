"""Muon for weights that may be tensor-parallel shards.

torch.optim.Muon orthogonalises the tensor it is given, in bfloat16: under tensor parallelism that is the shard, and the
update then depends on the layout (docs/decisions/002-own-muon.md). This one gathers the momentum of a sharded matrix,
orthogonalises the whole, and keeps its part. State and group keys are torch.optim.Muon's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

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


class Muon(Optimizer):
    """Momentum M <- mu M + (1-mu) G, update U = (1-mu) G + mu M (Nesterov), W <- W - lr max(1, m/n)^.5 NS(U).

    ``tp_group``: the tensor-parallel group over which parameters with ``tensor_model_parallel`` are split along
    ``partition_dim``. Matrices only; raises ValueError for anything else.
    """

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
        }
        super().__init__(params, defaults)
        self._tp_group = tp_group
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon takes matrices only, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return result

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        direction = self.direction(update, parameter, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])

    def direction(self, update: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """max(1, m/n)^.5 NS(U) of a whole m x n matrix from this rank's part of U, ``update``; the same part of it."""
        whole, part = self._gather(update, parameter)
        ortho = orthogonalise(whole, group["ns_steps"], tuple(group["ns_coefficients"]), group["eps"])
        return part(ortho.mul_(max(1.0, whole.shape[0] / whole.shape[1]) ** 0.5))

    def _gather(self, update: Tensor, parameter: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The whole matrix, and the map from it back to this rank's part.

        Shards are put together in rank order: a gated MLP's rows then come permuted, which Newton-Schulz commutes with.
        """
        size = 1 if self._tp_group is None else dist.get_world_size(self._tp_group)
        if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
            return update, lambda whole: whole
        dim = parameter.partition_dim  # type: ignore[attr-defined]
        parts = [torch.empty_like(update) for _ in range(size)]
        dist.all_gather(parts, update.contiguous(), group=self._tp_group)
        rank = dist.get_rank(self._tp_group)
        return torch.cat(parts, dim), lambda whole: whole.chunk(size, dim)[rank]
