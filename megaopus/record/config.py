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
    """Record every choice: selection.jsonl, a line per step, and choices/, a row per candidate (docs/report.md)."""
    selection_every: int = 1
    """Steps from one that keeps all its candidates in choices/ to the next; the picks of every step are kept."""
    overlaps_mb: float = 1.0
    """With a redundancy term: megabytes a step up to which choices/ keeps the inner products it rests on; 0: never."""
    wandb: str = "off"
    wandb_project: str = "megaopus"

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if self.every < 1:
            yield "every", "must be at least 1", "10 is usual"
        if self.selection_every < 1:
            yield "selection_every", "must be at least 1", "1 keeps all candidates; selection=false records nothing"
        if not 0 <= self.overlaps_mb < float("inf"):
            yield "overlaps_mb", "must be 0 or more, and finite", "1 is usual; 0 keeps no inner products"
        if self.wandb not in WANDB_MODES:
            yield "wandb", "unknown choice", f"use one of: {', '.join(WANDB_MODES)}"
