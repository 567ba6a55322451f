"""megatron's mixture of experts for our layer specs, with a count of the tokens that each expert was given.

Shapes: M tokens of this rank, E experts of a layer, H hidden size, N tokens given to experts, a token counted for each.
Import only after ``distributed.cpu.prepare_megatron``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional as F

from megaopus.models.linear import ColumnLinear, RowLinear

# megatron 0.16 defines the name only where Transformer Engine is installed, and reads it everywhere
moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


class Router(TopKRouter):
    """Chooses experts, and while it ``counts_tokens`` adds up what each was given.

    megatron's own counts in every pass with gradients, scoring's among them, and moves biases before it is known
    whether there will be an update.
    """

    layer = -1
    """Its layer's number, from 0; megatron's own, by which it would keep losses for a log of its own, is not set."""
    counts_tokens = False
    given: Tensor | None = None
    """(E,) int64 tokens of this rank that each expert was given; None: nothing was counted."""

    def set_layer_number(self, layer_number: int) -> None:
        self.layer = layer_number - 1

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # what is recomputed is counted then, with gradients
        if self.counts_tokens and torch.is_grad_enabled():
            given = routing_map.sum(dim=0)
            self.given = given if self.given is None else self.given + given


def permuted(
    tokens_MH: Tensor,
    map_ME: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(tokens in order of the experts that they are given to (N, H), their weights (N,), their numbers (N,)).

    As megatron's ``permute``, to the last bit, but that the host need not wait to know N, which it has been told.
    ``map_ME``: true where a token is given to an expert; ``probs`` (M, E): weights.
    """
    assert num_out_tokens is not None
    assert not fused
    assert not drop_and_pad
    chosen_N = map_ME.t().flatten().to(torch.uint8).argsort(descending=True, stable=True)[:num_out_tokens]
    numbers_N = chosen_N % len(map_ME)
    weights_N = None if probs is None else probs.t().flatten().index_select(0, chosen_N)
    return tokens_MH.index_select(0, numbers_N), weights_N, numbers_N


def permute_without_waiting() -> None:
    """Have megatron's dispatchers take ``permuted``: its own selects by masks, and the host waits twice a layer."""
    token_dispatcher.permute = permuted


class _Products(torch.autograd.Function):
    """Each run of rows times its own matrix (O, I); laid side by side in either pass anew, and not kept in between."""

    @staticmethod
    def forward(ctx: Any, inputs_NI: Tensor, ends: Tensor, *matrices_OI: Tensor) -> Tensor:
        ctx.save_for_backward(inputs_NI, ends, *matrices_OI)
        return F.grouped_mm(inputs_NI, torch.stack(matrices_OI).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        inputs_NI, ends, *matrices_OI = ctx.saved_tensors
        before = F.grouped_mm(grad_NO, torch.stack(matrices_OI), offs=ends) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return before, None, *(None for _ in matrices_OI)
        found_EOI = F.grouped_mm(grad_NO.t(), inputs_NI, offs=ends)
        empty_E = ends.diff(prepend=ends.new_zeros(1)) == 0  # of no rows a kernel need not write anything
        return before, None, *found_EOI.masked_fill(empty_E.view(-1, 1, 1), 0.0).unbind()


class GroupedExperts(SequentialMLP):
    """Computes all experts of a rank in two grouped products, for which their matrices are laid side by side."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        tokens_NH, weights_N = permuted_local_hidden_states, permuted_probs
        if self.num_local_experts == 1 or not tokens_NH.numel():
            return super().forward(tokens_NH, tokens_per_expert, weights_N)
        ends = tokens_per_expert.cumsum(0).to(device=tokens_NH.device, dtype=torch.int32)
        inside = self._products(tokens_NH, ends, "linear_fc1")
        if self.config.bias_activation_fusion:
            inside = weighted_bias_swiglu_impl(inside, None, weights_N.unsqueeze(1))
        else:
            inside = (self._activated(inside) * weights_N.unsqueeze(1)).to(inside.dtype)
        return self._products(inside, ends, "linear_fc2"), None

    def _products(self, inputs: Tensor, ends: Tensor, name: str) -> Tensor:
        matrices: list[Any] = [getattr(expert, name).weight for expert in self.local_experts]
        found: Tensor = _Products.apply(inputs, ends, *matrices)
        return found

    def _activated(self, inside: Tensor) -> Tensor:
        if not self.config.gated_linear_unit:
            return self.config.activation_func(inside)
        gate, up = inside.chunk(2, -1)
        return self.config.activation_func(gate) * up


def mixture_spec(shared: bool, grouped: bool) -> ModuleSpec:
    """Say what megatron builds a layer's experts of; ``grouped``: two products for all of a rank, not two for each."""
    mlp = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=GroupedExperts if grouped else SequentialMLP, submodules=mlp),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=mlp) if shared else None,
            router=Router,
        ),
    )
