"""Picks by the candidates' own losses."""

from __future__ import annotations

from torch import Tensor

from megaopus.selection.methods.registry import register_method
from megaopus.selection.scoring import Scores, ScoringStep

_COST = (1 / 3, "one forward")


def _losses(step: ScoringStep) -> Tensor:
    """(n,) float64 mean token loss of each candidate."""
    return step.sum_parts(step.measured(lambda passes: step.backend.losses(step.share, **passes)))


@register_method("high_ppl", flops=_COST, micro_batches=True)
def high_ppl(step: ScoringStep) -> Scores:
    """Score by the loss: the highest are picked."""
    return Scores(utilities=_losses(step))


@register_method("low_ppl", flops=_COST, micro_batches=True)
def low_ppl(step: ScoringStep) -> Scores:
    """Score by the loss: the lowest are picked."""
    return Scores(utilities=-_losses(step))


@register_method("mid_ppl", flops=_COST, micro_batches=True)
def mid_ppl(step: ScoringStep) -> Scores:
    """Score by the loss: those nearest the median are picked."""
    losses = _losses(step)
    finite = losses[losses.isfinite()]
    return Scores(utilities=-(losses - (finite.median() if len(finite) else 0)).abs())
