"""Where and in what precision the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megaopus.distributed.config import ParallelConfig
from megaopus.optim.config import OptimConfig

ENGINES = ("megatron", "deepspeed")
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
        for key, allowed in (("name", ENGINES), ("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, key) not in allowed:
                yield key, "unknown choice", f"use one of: {', '.join(allowed)}"
        if self.zero_stage not in ZERO_STAGES:
            yield "zero_stage", "unknown ZeRO stage", "use 1, 2 or 3; without sharding: engine.name=megatron"
        if not self.timeout_minutes > 0:
            yield "timeout_minutes", "must be positive", "10 is usual"

    def refusals(self, parallel: ParallelConfig, optim: OptimConfig) -> Iterator[tuple[str, object, str, str]]:
        """Yield ``(dotted key, value, reason, remedy)`` for each setting elsewhere that this engine cannot serve."""
        if self.name != "deepspeed":
            return
        megatron = "or engine.name=megatron"
        for key in ("pp", "cp"):
            if (degree := getattr(parallel, key)) > 1:
                yield (
                    f"parallel.{key}",
                    degree,
                    "the deepspeed engine has tensor and data parallelism only",
                    (f"parallel.{key}=1, {megatron}"),
                )
        if parallel.distributed_optimizer:
            reason = "is megatron's way of sharding the optimizer; the deepspeed engine has engine.zero_stage for it"
            yield "parallel.distributed_optimizer", True, reason, f"parallel.distributed_optimizer=false, {megatron}"
        spec = optim.spec()
        if not spec.elementwise and optim.name != "muon":
            why = "takes its curvature from gradients of its own" if spec.curvature else "needs whole tensors"
            reason = f"{why}, of which ZeRO keeps flat pieces (it has an update of its own for muon alone)"
            yield "optim.name", optim.name, reason, f"optim=adamw, sgd, lion or muon, {megatron}"
