"""What the training loop asks of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megaopus.engine.pending_save import Saving
from megaopus.selection.backend import Candidates, Gradient, ScoringBackend


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step."""

    loss: float
    """Mean token loss of the global batch, before the update."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    applied: bool
    """False: the loss or a gradient was not finite, or the norm above the limit; no weight was touched."""
    own_s: float = field(default=0.0, compare=False)
    """Seconds of this rank's forward and backward passes, before gradients are reduced; 0: not known."""


class Engine(Protocol):
    """A model, its optimizer and their layout. Every method is collective: all ranks call it."""

    step: int
    """Updates so far: what the learning rate depends on."""

    def train_step(self, batch: Candidates, limit: float = math.inf) -> StepResult:
        """One update from a global batch of K sequences; each data-parallel rank reads only its share.

        ``limit``: the largest gradient norm with which the update is made.
        """

    def evaluate(self, sequences: Candidates) -> Tensor:
        """(n,) mean token loss of each sequence, float64, the same on every rank."""

    def scoring_backend(self) -> ScoringBackend:
        """The model and optimizer as the selector sees them."""

    def saving(self, folder: Path, groups: dict[str, Gradient], copy: bool) -> Saving:
        """A save of weights, optimizer state and further parameter-shaped tensors (by group, then whole-model name).

        ``copy``: it keeps copies, so that training may go on while it writes; else it must be carried out at once.
        """

    def load(self, folder: Path, groups: list[str]) -> dict[str, Gradient]:
        """Restore what ``save`` wrote into this engine; returns the groups asked for."""
