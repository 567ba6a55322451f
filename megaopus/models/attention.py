"""Causal core attention for megatron's SelfAttention over torch's scaled_dot_product_attention.

The stock local one is unfused and draws from the CUDA generator; this one runs on every device. Under context
parallelism each rank has the queries of its part of the sequence and gathers the keys and values of all parts. Shapes:
S positions of this rank, T positions up to its last, B micro-batch, A heads of this tensor-parallel rank, D head size.
Import only after ``distributed.cpu.prepare_megatron``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
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
        # Under sequence parallelism megatron has the whole block draw from the tensor-parallel rank's own state.
        self.shares_state = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        self.cp_group = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None
        # megatron counts the positions before one; we count it too
        self.window = None if config.window_size is None else config.window_size[0] + 1

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
        """(S, B, A*D) context. ``attention_mask``: (B, 1, S, T) what is seen, bool or to be added; None: all before."""
        seq_len, batch, num_heads = query_SBAD.shape[:3]
        if self.cp_group is not None:
            key_SBAD, value_SBAD = _gathered(key_SBAD, value_SBAD, self.cp_group)
        mask = attention_mask
        if mask is None or self.window is not None:
            window_ST = _window(seq_len, len(key_SBAD), self.window, query_SBAD.device)
            mask = window_ST if mask is None else mask if window_ST is None else _both(mask, window_ST)
        if mask is not None and key_SBAD.shape[2] != num_heads:  # torch's fused kernels share heads without one only
            key_SBAD, value_SBAD = (x.repeat_interleave(num_heads // x.shape[2], 2) for x in (key_SBAD, value_SBAD))
        query_BASD, key_BATD, value_BATD = (x.permute(1, 2, 0, 3) for x in (query_SBAD, key_SBAD, value_SBAD))
        if query_SBAD.device.type == "cpu":
            # neighbouring positions lie a whole micro-batch apart: the copy costs less than the cache misses
            query_BASD, key_BATD, value_BATD = query_BASD.contiguous(), key_BATD.contiguous(), value_BATD.contiguous()
        with self._own_masks():
            context_BASD = F.scaled_dot_product_attention(
                query_BASD,
                key_BATD,
                value_BATD,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=key_SBAD.shape[2] != num_heads,
            )
        return context_BASD.permute(2, 0, 1, 3).reshape(seq_len, batch, -1)

    def _own_masks(self) -> AbstractContextManager[None]:
        """Inside, dropout draws for the heads of this tensor-parallel rank alone."""
        drops = self.training and self.dropout > 0
        return get_cuda_rng_tracker().fork() if drops and self.shares_state else nullcontext()


def _gathered(key_SBAD: Tensor, value_SBAD: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(T, B, A, D) keys and values of every position up to this rank's last.

    Backward sums each part's gradient over the ranks that saw it.
    """
    both = gather_from_sequence_parallel_region(torch.stack((key_SBAD, value_SBAD), dim=1), group=group)
    key_TBAD, value_TBAD = both[: (dist.get_rank(group) + 1) * len(key_SBAD)].unbind(1)
    return key_TBAD, value_TBAD


def _window(seq_len: int, seen: int, window: int | None, device: torch.device) -> Tensor | None:
    """(S, T) bool: which positions each of the last S of T sees. None: all before it, and S = T."""
    first = seen - seq_len
    if first == 0 and (window is None or seen <= window):
        return None
    mask_ST = torch.ones(seq_len, seen, dtype=torch.bool, device=device).tril_(first)
    return mask_ST if window is None else mask_ST.triu_(first - window + 1)


def _both(mask: Tensor, other: Tensor) -> Tensor:
    """A mask, bool or to be added, that is narrowed to where ``other`` (bool) is true."""
    return mask & other if mask.dtype == torch.bool else mask.masked_fill(~other, -torch.inf)
