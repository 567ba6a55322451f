"""Degrees of parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megaopus.settings import HARMLESS, setting

_OFF = "1 switches this kind of parallelism off"


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """Says how ranks are arranged; data parallelism takes what is left: dp = world size / (tp x cp x pp)."""

    RESUME: ClassVar[str] = HARMLESS

    tp: int = setting(1, min=1, doc="Tensor-parallel ranks.", hint=_OFF)
    pp: int = setting(1, min=1, doc="Pipeline stages.", hint=_OFF)
    cp: int = setting(
        1, min=1, doc="Context-parallel ranks: each holds a piece from either end of every sequence.", hint=_OFF
    )
    ep: int = setting(
        1,
        min=1,
        doc="Expert-parallel ranks, among the data- and context-parallel ones: each holds as many experts.",
        hint=_OFF,
    )
    expert_tp: int | None = setting(
        None, min=1, doc="Tensor-parallel ranks of an expert: tp or 1; null: tp without expert parallelism, else 1."
    )
    vpp: int = setting(1, min=1, doc="Model chunks per pipeline stage (interleaved schedule).", hint=_OFF)
    sequence_parallel: bool = setting(False, doc="Split norms and dropout over the tensor-parallel ranks too.")
    distributed_optimizer: bool = setting(
        False, doc="Shard AdamW's state (and fp32 main weights) over the ranks that hold the same weights."
    )

    overlap_grad_reduce: bool | None = setting(
        None, doc="megatron: sum gradients over ranks bucket by bucket while others are computed; null: on cuda."
    )
    overlap_param_gather: bool | None = setting(
        None,
        doc="megatron: with distributed_optimizer, gather updated weights beside what comes after the update, until "
        "they are used; null: on cuda.",
    )

    def derived_expert_tp(self) -> int:
        """Tensor-parallel ranks of an expert after the default is applied."""
        if self.expert_tp is not None:
            return self.expert_tp
        return self.tp if self.ep == 1 else 1

    def overlaps(self, on_cpu: bool) -> bool:
        """Say whether gradients are summed over ranks during the backward pass."""
        return not on_cpu if self.overlap_grad_reduce is None else self.overlap_grad_reduce

    def gathers_late(self, on_cpu: bool) -> bool:
        """Say whether updated weights are gathered beside what comes after the update."""
        return not on_cpu if self.overlap_param_gather is None else self.overlap_param_gather

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one sequence together: the world size is a multiple of it."""
        return self.tp * self.cp * self.pp

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for settings that do not go together."""
        if self.sequence_parallel and self.tp == 1:
            yield "sequence_parallel", "needs tp > 1", "set parallel.tp, or sequence_parallel=false"
        if self.vpp > 1 and self.pp == 1:
            yield "vpp", "needs pp > 1", "set parallel.pp, or vpp=1"
        if self.expert_tp not in (None, self.tp, *([1] if self.ep > 1 else [])):
            reason = f"is neither tp = {self.tp}" + (" nor 1" if self.ep > 1 else "")
            yield "expert_tp", reason, "leave it null"
