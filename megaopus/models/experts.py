"""megatron's mixture of experts for our layer specs, with a count of the tokens that each expert was given.

Import only after ``distributed.cpu.prepare_megatron``.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

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


def mixture_spec(shared: bool) -> ModuleSpec:
    """Say what megatron builds a layer's experts of."""
    mlp = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=mlp),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=mlp) if shared else None,
            router=Router,
        ),
    )
