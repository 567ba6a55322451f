"""Says where and in what precision the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megaopus.distributed.config import ParallelConfig
from megaopus.engine.registry import ENGINES, EngineSpec, Refusal
from megaopus.optim.config import OptimConfig
from megaopus.selection.config import SelectionConfig
from megaopus.selection.methods.registry import UNIFORM
from megaopus.settings import FIXED, HARMLESS, setting

ZERO_STAGES = (1, 2, 3)
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
KERNELS = ("auto", "fused", "eager")


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """The trainer under the loop."""

    RESUME: ClassVar[str] = HARMLESS

    name: str = setting(
        "megatron",
        choices=ENGINES,
        resume=FIXED,
        doc="The library that trains (docs/engines.md).",
        hint="or name its module in plugins",
    )
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
    kernels: str = setting(
        "auto",
        choices=KERNELS,
        doc="fused: losses, rotary positions, SwiGLU, sums of weight gradients, all experts take one kernel each; auto:"
        " on cuda.",
    )
    use_cpu_initialization: bool = setting(
        True, doc="Draw first weights on the CPU, each whole; false: each rank its part, on the device (other numbers)."
    )
    deterministic: bool = setting(
        False, doc="The same job gives the same bits again, on CUDA too, which takes time (docs/engines.md)."
    )
    timeout_minutes: float = setting(10.0, above=0, doc="Longest wait in a collective before the job fails.")

    def spec(self) -> EngineSpec:
        """Return what is known of the engine; KeyError for an unknown name."""
        return ENGINES[self.name]

    def is_bf16(self, on_cpu: bool) -> bool:
        """Say whether the model is held in bf16, with fp32 main weights."""
        return self.precision == "bf16" or (self.precision == "auto" and not on_cpu)

    def is_fused(self, on_cpu: bool) -> bool:
        """Say whether losses, rotary positions, SwiGLU and sums of weight gradients take a kernel each."""
        return self.kernels == "fused" or (self.kernels == "auto" and not on_cpu)

    def refusals(
        self, parallel: ParallelConfig, optim: OptimConfig, selection: SelectionConfig | None = None
    ) -> Iterator[Refusal]:
        """Yield what this engine cannot serve of the settings elsewhere; ``selection`` None: of the first two."""
        yield from self.spec().refusals(self, parallel, optim, selection)
        if self.deterministic and selection is not None:
            yield from self._found_sizes(selection)

    def _found_sizes(self, selection: SelectionConfig) -> Iterator[Refusal]:
        """Yield the sizes of passes, on which last bits depend, that the free memory would decide."""
        reason = "engine.deterministic=true, but the free memory, which may be other in the same job again, decides it"
        if selection.method == UNIFORM:
            return
        if selection.score_micro_batch_size is None:
            key = "selection.score_micro_batch_size"
            yield Refusal(key, None, reason, f"{key}=8, or as many candidates as a forward pass has memory for")
        if selection.needs_proxy and selection.proxy_micro_batch_size is None and self.device != "cpu":
            key = "selection.proxy_micro_batch_size"
            yield Refusal(key, None, reason, f"{key}=8, or as many sequences as a backward pass has memory for")
