"""Where and in what precision the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megaopus.distributed.config import ParallelConfig
from megaopus.optim.config import OptimConfig
from megaopus.settings import FIXED, HARMLESS, setting

ENGINES = ("megatron", "deepspeed")
ZERO_STAGES = (1, 2, 3)
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """The trainer under the loop."""

    RESUME: ClassVar[str] = HARMLESS

    name: str = setting("megatron", choices=ENGINES, resume=FIXED, doc="The library that trains (docs/engines.md).")
    zero_stage: int = setting(
        1,
        choices=ZERO_STAGES,
        doc="deepspeed: what data-parallel ranks share: 1 the optimizer's state, 2 gradients too, 3 weights too.",
        hint="without sharding: engine.name=megatron",
    )
    device: str = setting("auto", choices=DEVICES, doc="auto: cuda where there is one, else cpu.")
    precision: str = setting(
        "auto", choices=PRECISIONS, resume=FIXED, doc="auto: bf16 with fp32 main weights on cuda, fp32 on cpu."
    )
    recompute: bool = setting(
        False, doc="Recompute each layer in the backward pass instead of keeping its activations."
    )
    timeout_minutes: float = setting(10.0, above=0, doc="Longest wait in a collective before the job fails.")

    def refusals(self, parallel: ParallelConfig, optim: OptimConfig) -> Iterator[tuple[str, object, str, str]]:
        """Yield ``(dotted key, value, reason, remedy)`` for each setting elsewhere that this engine cannot serve."""
        if self.name != "deepspeed":
            return
        megatron = "or engine.name=megatron"
        for key in ("pp", "cp"):
            if (degree := getattr(parallel, key)) > 1:
                reason = "the deepspeed engine has tensor and data parallelism only"
                yield f"parallel.{key}", degree, reason, f"parallel.{key}=1, {megatron}"
        if parallel.distributed_optimizer:
            reason = "is megatron's way of sharding the optimizer; the deepspeed engine has engine.zero_stage for it"
            yield "parallel.distributed_optimizer", True, reason, f"parallel.distributed_optimizer=false, {megatron}"
        spec = optim.spec()
        if not spec.elementwise and optim.name != "muon":
            why = "takes its curvature from gradients of its own" if spec.curvature else "needs whole tensors"
            reason = f"{why}, of which ZeRO keeps flat pieces (it has an update of its own for muon alone)"
            yield "optim.name", optim.name, reason, f"optim=adamw, sgd, lion or muon, {megatron}"
