"""What a person sees of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WANDB_MODES = ("off", "offline", "online")


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    """Console lines, files in the run folder, and Weights & Biases."""

    every: int = 10
    """Steps between progress lines; metrics.jsonl has every step."""
    selection: bool = True
    """Write selection.jsonl: candidates, utilities and picks of every step."""
    wandb: str = "off"
    wandb_project: str = "megaopus"

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if self.every < 1:
            yield "every", "must be at least 1", "10 is usual"
        if self.wandb not in WANDB_MODES:
            yield "wandb", "unknown choice", f"use one of: {', '.join(WANDB_MODES)}"
