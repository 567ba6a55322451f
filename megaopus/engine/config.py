"""Where and in what precision the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ENGINES = ("megatron",)
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """The trainer under the loop."""

    name: str = "megatron"
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
        if not self.timeout_minutes > 0:
            yield "timeout_minutes", "must be positive", "10 is usual"
