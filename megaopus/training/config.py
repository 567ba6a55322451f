"""Declares the length and batches of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megaopus.settings import FIXED, HARMLESS, TRAINING, setting


def _spike_factor(value: float) -> str | None:
    return None if value == 0 or value > 1 else "must be above 1"


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Steps, batches and validation of a run."""

    RESUME: ClassVar[str] = TRAINING

    steps: int = setting(100, min=1, doc="Steps in all; a resumed run goes on to this number.")
    tokens: int | None = setting(
        None,
        min=1,
        resume=HARMLESS,  # what it means is in steps
        doc="Update tokens in all, in place of `steps`, which follows: as many as make no fewer tokens.",
        hint="null takes train.steps",
    )
    epochs: float | None = setting(
        None,
        above=0,
        resume=HARMLESS,
        doc="The same in passes over the pool: so many times its tokens are trained on, whichever they are.",
        hint="null takes train.steps",
    )
    global_batch_size: int = setting(8, min=1, resume=FIXED, doc="Sequences per optimizer step over all ranks [K].")
    micro_batch_size: int = setting(8, min=1, resume=HARMLESS, doc="Sequences per forward pass on one rank.")
    eval_every: int = setting(
        0,
        min=0,
        resume=HARMLESS,
        doc="Steps between validations; 0: only after the last step.",
        hint="0 validates only after the last step",
    )
    eval_sequences: int = setting(64, min=1, resume=HARMLESS, doc="Sequences per domain and validation.")
    spike_factor: float = setting(
        20.0,
        check=_spike_factor,
        doc="An update whose gradient norm is above so many times the median of those before is skipped; 0: none is. "
        "After three in a row, with `optim.clip_grad`, such gradients are trained on, and the median starts anew.",
        hint="20 leaves ordinary noise alone; 0 switches the rule off",
    )
    spike_window: int = setting(
        128, min=1, doc="Applied updates over which that median is taken; the rule begins after a quarter of them."
    )
    max_skipped: int = setting(
        10,
        min=1,
        doc="Skipped updates in a row (spikes, or a loss or gradient that is not finite) after which the run stops.",
    )

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, reason, remedy) of what does not hold between settings."""
        if self.tokens is not None and self.epochs is not None:
            yield "epochs", f"the length is given already, as train.tokens = {self.tokens}", "give one of them"
