"""Where and in what precision the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megaopus.distributed.config import ParallelConfig
from megaopus.engine.registry import ENGINES, EngineSpec, Refusal
from megaopus.optim.config import OptimConfig
from megaopus.selection.config import SelectionConfig

ZERO_STAGES = (1, 2, 3)
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """The trainer under the loop."""

    name: str = "megatron"
    zero_stage: int = 1
    """deepspeed: what data-parallel ranks share: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    precision: str = "auto"
    """auto: bf16 with fp32 main weights on cuda, fp32 on cpu."""
    recompute: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    timeout_minutes: float = 10.0
    """Longest wait in a collective before the job fails."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        for key, allowed in (("name", tuple(ENGINES)), ("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, key) not in allowed:
                yield key, "unknown choice", f"use one of: {', '.join(allowed)}"
        if self.zero_stage not in ZERO_STAGES:
            yield "zero_stage", "unknown ZeRO stage", "use 1, 2 or 3; without sharding: engine.name=megatron"
        if not self.timeout_minutes > 0:
            yield "timeout_minutes", "must be positive", "10 is usual"

    def spec(self) -> EngineSpec:
        """What is known of the engine; KeyError for an unknown name."""
        return ENGINES[self.name]

    def refusals(
        self, parallel: ParallelConfig, optim: OptimConfig, selection: SelectionConfig | None = None
    ) -> Iterator[Refusal]:
        """Yield what this engine cannot serve of the settings elsewhere; ``selection`` None: of the first two."""
        yield from self.spec().refusals(self, parallel, optim, selection)
