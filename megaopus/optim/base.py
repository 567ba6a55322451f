"""Gives optimizers whose update needs a parameter's whole tensor what they need to be right at every layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from megaopus.distributed.shards import group_size, is_expert, is_split, part_of


class LayoutOptimizer(Optimizer, ABC):
    """Updates a weight that tensor-parallel ranks share as one rank would update the whole.

    Its state is made of tensors alone: ``shaped`` names those of the local parameter's shape, split as it is; ``whole``
    those that are the same on every tensor- and data-parallel rank, whatever their shape; ``step`` counts updates where
    ``counts`` is set. ``tp_group``: the ranks over which parameters with ``tensor_model_parallel`` are split, but for
    those of experts.
    """

    shaped: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], tp_group: dist.ProcessGroup | None):
        super().__init__(params, defaults)
        self.tp_group = tp_group
        self.same_group: dist.ProcessGroup | None = None
        """Ranks that hold the same parameters and gradients, and may share the work; None: a rank alone."""
        self.expert_groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None)
        """``tp_group`` and ``same_group`` of experts' parameters."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if self.matrices_only and parameter.dim() != 2:
                shape = tuple(parameter.shape)
                raise ValueError(f"{type(self).__name__} takes matrices only, not a parameter of shape {shape}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Collective over ``tp_group`` and ``same_group``."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            self.update_group([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return result

    def update_group(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Update parameters that have gradients and share the settings ``group``."""
        for parameter in parameters:
            assert parameter.grad is not None
            self.update(parameter, parameter.grad, self.next_state(parameter), group)

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change one parameter and its state; ``step`` already counts this update."""

    def next_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state, in which ``step`` already counts the update to come."""
        state = self.state_of(parameter)
        if self.counts:
            state["step"] += 1
        return state

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state, made of zeros first if there is none."""
        state = self.state[parameter]
        if not state:
            state.update({name: torch.zeros_like(parameter) for name in self.shaped_of(parameter)})
            state.update(self.new_whole(parameter))
            if self.counts:
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU, so that reading it waits for nothing
        return state

    def shaped_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Those of ``shaped`` that this parameter has."""
        return self.shaped

    def new_whole(self, parameter: Tensor) -> dict[str, Tensor]:
        """Zeros for each of ``whole`` that this parameter has."""
        return {}

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        group = self.splitting(parameter)
        size = group_size(group)
        return whole if size == 1 else part_of(whole, parameter, dist.get_rank(group), size)

    def whole_shape(self, parameter: Tensor) -> list[int]:
        """Of the parameter over all tensor-parallel ranks."""
        shape = list(parameter.shape)
        if is_split(parameter):
            shape[parameter.partition_dim] *= group_size(self.splitting(parameter))  # type: ignore[attr-defined]
        return shape

    def splitting(self, parameter: Tensor) -> dist.ProcessGroup | None:
        """Give the ranks that hold parts of a parameter, where it is split."""
        return self.expert_groups[0] if is_expert(parameter) else self.tp_group

    def sharing(self, parameter: Tensor) -> dist.ProcessGroup | None:
        """Give the ranks that hold the same of a parameter."""
        return self.expert_groups[1] if is_expert(parameter) else self.same_group


class CurvatureOptimizer(LayoutOptimizer):
    """Steps by an estimate of the curvature, which gradients on labels that the model samples give it."""

    @abstractmethod
    def estimate(self, tokens: int) -> None:
        """Take the gradients there are, of the mean loss of ``tokens`` sampled labels, into the estimate."""
