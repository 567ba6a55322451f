"""LayerNorm and RMSNorm for megatron's layer specs: torch's, plus the mark that sequence parallelism needs."""

from __future__ import annotations

from typing import Any

import torch


class Norm:
    """Built by megatron as ``Norm(config=..., hidden_size=..., eps=...)``; returns a torch norm."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        kind = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            # Each rank sees part of the sequence: megatron adds up the gradients of parameters marked so.
            parameter.sequence_parallel = config.sequence_parallel
        return norm
