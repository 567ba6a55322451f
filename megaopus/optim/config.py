"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megaopus.optim.registry import OPTIMIZERS, spec_of
from megaopus.optim.spec import Spec
from megaopus.settings import FIXED, TRAINING, setting

SCHEDULES = ("constant", "cosine", "wsd")
_PUBLISHED = "see configs/optim/ for published values"
_OFF = "0 switches it off"


def _two(value: list[float]) -> str | None:
    return None if len(value) == 2 and all(0 <= beta < 1 for beta in value) else "must be two numbers in [0, 1)"


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """The optimizer (docs/optimizers.md lists them); some take the blocks' matrices alone, and AdamW the rest."""

    RESUME: ClassVar[str] = TRAINING

    name: str = setting(
        "adamw",
        choices=OPTIMIZERS,
        resume=FIXED,
        doc="Which optimizer (docs/optimizers.md).",
        hint="or name its module in plugins",
    )
    lr: float = setting(1e-3, above=0, doc="Peak learning rate; where AdamW has a part only, AdamW's.", hint=_PUBLISHED)
    betas: list[float] = setting(
        [0.9, 0.95], check=_two, doc="Decays of the averages of gradients and of their squares, two numbers in [0, 1)."
    )
    eps: float = setting(1e-8, above=0, doc="Added to the root of the second average.", hint=_PUBLISHED)
    weight_decay: float = setting(
        0.1,
        min=0,
        doc="Decoupled; on matrices only (not on norms and biases). SGD's is part of the gradient.",
        hint=_OFF,
    )
    matrix_lr: float = setting(
        0.02,
        above=0,
        doc="Peak learning rate of the blocks' matrices, where they have an optimizer of their own.",
        hint=_PUBLISHED,
    )
    matrix_weight_decay: float = setting(0.0, min=0, doc="Weight decay of those matrices.", hint=_OFF)
    settings: dict[str, Any] = setting({}, members=OPTIMIZERS, doc="What this optimizer alone has.")
    clip_grad: float = setting(1.0, min=0, doc="Largest global gradient norm; 0: no clipping.", hint=_OFF)
    schedule: str = setting(
        "cosine",
        choices=SCHEDULES,
        doc="constant, cosine (to min_lr_ratio or min_lr at train.steps) or wsd (constant, then linear to it).",
    )
    warmup_steps: int = setting(0, min=0, doc="Steps of linear warm-up.", hint=_OFF)
    decay_steps: int = setting(0, min=0, doc="wsd: length of the final decay.", hint=_OFF)
    min_lr_ratio: float = setting(0.1, min=0, max=1, doc="Last learning rate over the peak.")
    min_lr: float | None = setting(
        None,
        min=0,
        doc="Last learning rate itself, instead of `min_lr_ratio`; matrices with a rate of their own end at the same "
        "share of theirs.",
        hint="null takes min_lr_ratio",
    )

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, reason, remedy) of what does not hold between settings."""
        if self.min_lr is not None and self.min_lr > self.lr:
            yield "min_lr", f"above the peak, optim.lr = {self.lr:g}", "use less, or null to take min_lr_ratio"

    def last_share(self) -> float:
        """Return the last learning rate over the peak."""
        return self.min_lr_ratio if self.min_lr is None else self.min_lr / self.lr

    def spec(self) -> Spec:
        """Return what is known of the optimizer; KeyError for an unknown name."""
        return spec_of(self.name)

    def is_known(self) -> bool:
        """Return whether an optimizer of this name is registered here."""
        return self.name in OPTIMIZERS

    def own_settings(self) -> dict[str, Any]:
        """All of the optimizer's own settings: those given, and defaults for the rest."""
        return self.spec().defaults() | self.settings
