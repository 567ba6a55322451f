"""Degrees of parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """How ranks are arranged; data parallelism takes what is left: dp = world size / (tp x cp x pp)."""

    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Context-parallel ranks: each holds a contiguous part of every sequence."""
    vpp: int = 1
    """Model chunks per pipeline stage (interleaved schedule)."""
    sequence_parallel: bool = False
    """Split norms and dropout over the tensor-parallel ranks too."""
    distributed_optimizer: bool = False
    """Shard AdamW's state (and fp32 main weights) over the data- and context-parallel ranks."""

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one sequence together: the world size is a multiple of it."""
        return self.tp * self.cp * self.pp

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        for key in ("tp", "pp", "cp", "vpp"):
            if getattr(self, key) < 1:
                yield key, "must be at least 1", "1 switches this kind of parallelism off"
        if self.sequence_parallel and self.tp == 1:
            yield "sequence_parallel", "needs tp > 1", "set parallel.tp, or sequence_parallel=false"
        if self.vpp > 1 and self.pp == 1:
            yield "vpp", "needs pp > 1", "set parallel.pp, or vpp=1"
