"""megatron's linear layers with the bias inside the matrix product where one rank holds the whole matrix.

megatron adds the bias afterwards (or hands it on to be added), which reads and writes every activation once more.
Import only after ``distributed.cpu.prepare_megatron``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor
from torch.nn import functional as F


class ColumnLinear(ColumnParallelLinear):
    """(output, None) on one tensor-parallel rank; megatron's own forward, with its collectives, on more."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1 or weight is not None:
            return super().forward(input_, weight, runtime_gather_output)
        return _linear(self, input_), None


class RowLinear(RowParallelLinear):
    """(output, None) on one tensor-parallel rank; megatron's own forward, with its collectives, on more."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return _linear(self, input_), None


def _linear(layer: Any, input_: Tensor) -> Tensor:
    weight = layer.weight
    if layer.gradient_accumulation_fusion and weight.requires_grad and hasattr(weight, "main_grad"):
        output: Tensor = _AddsGradient.apply(input_, weight, layer.bias)
        return output
    return F.linear(input_, weight, layer.bias)


class _AddsGradient(torch.autograd.Function):
    """A linear layer whose backward pass adds to ``weight.main_grad`` inside the product, as megatron's own does."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_, weight)
        return F.linear(input_, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        input_, weight = ctx.saved_tensors
        grad_MO = grad.reshape(-1, grad.shape[-1])
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(input_.flatten(0, -2), grad_MO, weight.main_grad)
        weight.grad_added_to_main_grad = True  # DDP's hook, which waits for a gradient, adds none
        before = grad @ weight if ctx.needs_input_grad[0] else None
        return before, torch.empty_like(weight), grad_MO.sum(0) if ctx.needs_input_grad[2] else None
