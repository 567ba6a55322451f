"""Rotary positions: scaled frequencies, and the angles of a part of the sequence.

Import only after ``distributed.cpu.prepare_megatron``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megaopus.models.config import RopeScaling
from megaopus.models.context_parts import own_part


class PartRotary(RotaryEmbedding):
    """megatron's angles for context parallelism, cut where our parts lie (``context_parts``), whatever the length."""

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """(S / c, 1, 1, D) angles of this rank's positions; ``max_seq_len`` is the whole length S."""
        whole = super().forward(max_seq_len, offset, packed_seq=True)  # True: not cut
        return own_part(whole, self.cp_group.size(), self.cp_group.rank(), 0)


def scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """(D / 2,) frequencies, radians a position, as ``scaling`` slows them down.

    Llama 3.1 (arXiv 2407.21783, its code): one that turns r times in the original length is divided by the factor
    where r is below the low mark, kept where it is above the high one, and a weighted mean of both between them.
    """
    if scaling.factor is None:
        return frequencies
    slowed = frequencies / scaling.factor
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions
    if low is None or high is None or length is None:
        return slowed
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.where(kept == 1, frequencies, (1 - kept) * slowed + kept * frequencies)
