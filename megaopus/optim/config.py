"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("constant", "cosine", "wsd")


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW, SGD, or Muon on the matrices inside the blocks with AdamW for the rest."""

    name: str = "adamw"
    lr: float = 1e-3
    """Peak learning rate of AdamW (and SGD)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; on matrices only (not on norms and biases)."""
    momentum: float = 0.9
    """SGD's momentum."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices under Muon."""
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    muon_ns_steps: int = 5
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    schedule: str = "cosine"
    """constant, cosine (to min_lr_ratio at train.steps) or wsd (constant, then linear to min_lr_ratio)."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """wsd: length of the final decay."""
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if self.name not in OPTIMIZERS:
            yield "name", "unknown optimizer", f"use one of: {', '.join(OPTIMIZERS)}"
        if self.schedule not in SCHEDULES:
            yield "schedule", "unknown schedule", f"use one of: {', '.join(SCHEDULES)}"
        for key in ("lr", "muon_lr", "eps"):
            if not getattr(self, key) > 0:
                yield key, "must be positive", "see configs/optim/ for published values"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", "must be two numbers in [0, 1)", "[0.9, 0.95] is usual"
        for key in ("weight_decay", "muon_weight_decay", "clip_grad", "warmup_steps", "decay_steps"):
            if getattr(self, key) < 0:
                yield key, "must not be negative", "0 switches it off"
        for key in ("momentum", "muon_momentum"):
            if not 0 <= getattr(self, key) < 1:
                yield key, "must lie in [0, 1)", "0.95 is Muon's usual value"
        if self.muon_ns_steps < 1:
            yield "muon_ns_steps", "must be at least 1", "5 is usual"
        if not 0 <= self.min_lr_ratio <= 1:
            yield "min_lr_ratio", "must lie in [0, 1]", "0.1 is usual"
