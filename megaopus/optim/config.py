"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megaopus.optim.registry import OPTIMIZERS, spec_of
from megaopus.optim.spec import Spec

SCHEDULES = ("constant", "cosine", "wsd")


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """The optimizer (docs/optimizers.md lists them); some take the blocks' matrices alone, and AdamW the rest."""

    name: str = "adamw"
    lr: float = 1e-3
    """Peak learning rate; where AdamW has a part only, AdamW's."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; on matrices only (not on norms and biases). SGD's is part of the gradient."""
    matrix_lr: float = 0.02
    """Peak learning rate of the blocks' matrices, where they have an optimizer of their own."""
    matrix_weight_decay: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    """What this optimizer alone has; configs/optim/NAME.yaml lists it."""
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

    def spec(self) -> Spec:
        """What is known of the optimizer; KeyError for an unknown name."""
        return spec_of(self.name)

    def is_known(self) -> bool:
        """Whether an optimizer of this name is registered here."""
        return self.name in OPTIMIZERS

    def own_defaults(self) -> dict[str, Any]:
        """Defaults of the optimizer's own settings; none of one that is not known here (a plugin's, not imported)."""
        return self.spec().defaults() if self.is_known() else {}

    def own_settings(self) -> dict[str, Any]:
        """All of the optimizer's own settings: those given, and defaults for the rest."""
        return {**self.spec().defaults(), **self.settings}

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if not self.is_known():
            yield "name", "unknown optimizer", f"use one of: {OPTIMIZERS.names()}; or name its module in plugins"
        else:
            yield from self._setting_problems()
        if self.schedule not in SCHEDULES:
            yield "schedule", "unknown schedule", f"use one of: {', '.join(SCHEDULES)}"
        for key in ("lr", "matrix_lr", "eps"):
            if not getattr(self, key) > 0:
                yield key, "must be positive", "see configs/optim/ for published values"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", "must be two numbers in [0, 1)", "[0.9, 0.95] is usual"
        for key in ("weight_decay", "matrix_weight_decay", "clip_grad", "warmup_steps", "decay_steps"):
            if getattr(self, key) < 0:
                yield key, "must not be negative", "0 switches it off"
        if not 0 <= self.min_lr_ratio <= 1:
            yield "min_lr_ratio", "must lie in [0, 1]", "0.1 is usual"

    def _setting_problems(self) -> Iterator[tuple[str, str, str]]:
        """Of ``settings``: a name that the optimizer lacks, or a value that is not of its kind and range."""
        known = self.spec().settings
        for name, value in self.settings.items():
            key = f"settings.{name}"
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                has = f"it has {', '.join(known)}" if known else "it has none"
                yield key, f"{self.name} has no such setting", f"did you mean {near[0]}?" if near else has
                continue
            default = known[name].default
            if isinstance(default, bool) or isinstance(value, bool):
                if not (isinstance(default, bool) and isinstance(value, bool)):
                    yield key, f"must be {'true or false' if isinstance(default, bool) else 'a number'}", f"{default}"
            elif not isinstance(value, int | float) or (isinstance(default, int) and not isinstance(value, int)):
                kind = "whole number" if isinstance(default, int) else "number"
                yield key, f"must be a {kind}, not {type(value).__name__}", f"{default} is usual"
            elif refusal := known[name].refusal(value):
                yield key, *refusal
