"""Causal core attention for megatron's SelfAttention over torch's scaled_dot_product_attention.

The stock local one is unfused and draws from the CUDA generator; this one runs on every device. Under context
parallelism each rank has the queries of its part of the sequence, two runs of positions, and gathers the keys and
values of all parts; a run of queries is a call of its own. Shapes: S positions of this rank or of a run, T positions up
to its last, B micro-batch, A heads of this tensor-parallel rank, D head size.
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

from megaopus.models.context_parts import in_order, runs_of


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
        seq_len, batch = query_SBAD.shape[:2]
        runs = [slice(0, seq_len)]
        if self.cp_group is not None:
            runs = runs_of(seq_len * self.cp_group.size(), self.cp_group.size(), self.cp_group.rank())
            key_SBAD, value_SBAD = _gathered(key_SBAD, value_SBAD, self.cp_group, runs[-1].stop)
        query_BASD, key_BATD, value_BATD = (x.permute(1, 2, 0, 3) for x in (query_SBAD, key_SBAD, value_SBAD))
        if query_SBAD.device.type == "cpu":
            # neighbouring positions lie a whole micro-batch apart: the copy costs less than the cache misses
            query_BASD, key_BATD, value_BATD = query_BASD.contiguous(), key_BATD.contiguous(), value_BATD.contiguous()
        parts, begin = [], 0
        for run in runs:
            rows = slice(begin, begin + run.stop - run.start)
            mask = None if attention_mask is None else attention_mask[..., rows, : run.stop]
            seen = key_BATD[:, :, : run.stop], value_BATD[:, :, : run.stop]
            parts.append(self._attend(query_BASD[:, :, rows], *seen, mask))
            begin = rows.stop
        context_BASD = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return context_BASD.permute(2, 0, 1, 3).reshape(seq_len, batch, -1)

    def _attend(self, query_BASD: Tensor, key_BATD: Tensor, value_BATD: Tensor, mask: Tensor | None) -> Tensor:
        """(B, A, S, D) context of the last S of T positions that follow one another."""
        num_heads, seq_len, seen = query_BASD.shape[1], query_BASD.shape[2], key_BATD.shape[2]
        shared, dropout = key_BATD.shape[1] != num_heads, self.dropout if self.training else 0.0
        windowed = self.window is not None and seen > self.window
        if mask is None and seen > seq_len and not windowed and _is_fused(query_BASD):
            with self._own_masks():  # this kernel means by causal that the last query sees all
                found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
                    query_BASD, key_BATD, value_BATD, dropout, True, scale=self.softmax_scale
                )[0]
            return found
        if mask is None or self.window is not None:
            window_ST = _window(seq_len, seen, self.window, query_BASD.device)
            mask = window_ST if mask is None else mask if window_ST is None else _both(mask, window_ST)
        if mask is not None and shared:  # torch's fused kernels share heads without one only
            key_BATD, value_BATD = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (key_BATD, value_BATD))
        with self._own_masks():
            return F.scaled_dot_product_attention(
                query_BASD,
                key_BATD,
                value_BATD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=shared and mask is None,
            )

    def _own_masks(self) -> AbstractContextManager[None]:
        """Inside, dropout draws for the heads of this tensor-parallel rank alone."""
        drops = self.training and self.dropout > 0
        return get_cuda_rng_tracker().fork() if drops and self.shares_state else nullcontext()


def _gathered(key_SBAD: Tensor, value_SBAD: Tensor, group: dist.ProcessGroup, stop: int) -> tuple[Tensor, Tensor]:
    """(T, B, A, D) keys and values of the first T = ``stop`` positions.

    Backward sums each part's gradient over the ranks that saw it.
    """
    both = gather_from_sequence_parallel_region(torch.stack((key_SBAD, value_SBAD), dim=1), group=group)
    key_TBAD, value_TBAD = in_order(both.chunk(group.size()), stop).unbind(1)
    return key_TBAD, value_TBAD


def _is_fused(query: Tensor) -> bool:
    """Tell whether flash attention takes it: 16-bit numbers on CUDA, heads of at most 256 in eights."""
    sizes = query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and sizes


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
