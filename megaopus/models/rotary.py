"""Rotary positions of a contiguous part of the sequence. Import only after ``distributed.cpu.prepare_megatron``."""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class ContiguousRotary(RotaryEmbedding):
    """megatron's angles for context parallelism, cut where our parts lie: rank r of c has positions r*S/c to (r+1)*S/c.

    megatron's own gives each rank two pieces, one from either end of the sequence.
    """

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """(S / c, 1, 1, D) angles of this rank's positions; ``max_seq_len`` is the whole length S."""
        whole = super().forward(max_seq_len, offset, packed_seq=True)  # True: not cut
        return whole.chunk(self.cp_group.size())[self.cp_group.rank()]
