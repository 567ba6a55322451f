"""LayerNorm and RMSNorm for megatron's layer specs: torch's, plus the mark that sequence parallelism needs; Gemma's."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class RMSNormPlus1(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32 throughout; the weight starts at zero (Gemma)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x.float(), self.normalized_shape, None, self.eps)
        return (normed * (1 + self.weight.float())).type_as(x)


class Norm:
    """Built by megatron as ``Norm(config=..., hidden_size=..., eps=...)``; returns a torch norm."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        kind = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        if config.layernorm_zero_centered_gamma:
            kind = RMSNormPlus1
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            # Each rank sees part of the sequence: megatron adds up the gradients of parameters marked so.
            parameter.sequence_parallel = config.sequence_parallel
        return norm
