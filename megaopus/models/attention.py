"""Causal core attention for megatron's SelfAttention over torch's scaled_dot_product_attention.

The stock local one is unfused and draws from the CUDA generator; this one runs on every device. Shapes: S sequence,
B micro-batch, A heads of this tensor-parallel rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class CausalAttention(torch.nn.Module):
    """softmax(q k^T * scale) v over earlier positions; grouped-query heads are shared, not copied, where torch can."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBAD: Tensor,
        key_SBAD: Tensor,
        value_SBAD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> Tensor:
        """(S, B, A*D) context."""
        seq_len, batch = query_SBAD.shape[:2]
        query_BASD, key_BASD, value_BASD = (x.permute(1, 2, 0, 3) for x in (query_SBAD, key_SBAD, value_SBAD))
        if query_SBAD.device.type == "cpu":
            # neighbouring positions lie a whole micro-batch apart: the copy costs less than the cache misses
            query_BASD, key_BASD, value_BASD = query_BASD.contiguous(), key_BASD.contiguous(), value_BASD.contiguous()
        context_BASD = F.scaled_dot_product_attention(
            query_BASD,
            key_BASD,
            value_BASD,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=key_SBAD.shape[2] != query_SBAD.shape[2],
        )
        return context_BASD.permute(2, 0, 1, 3).reshape(seq_len, batch, -1)
