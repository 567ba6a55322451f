"""Picks by the candidates' own losses."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megaopus.selection.methods.registry import register_method
from megaopus.selection.scoring import Scores, ScoringStep

_COST = (1 / 3, "one forward")


def _scores(step: ScoringStep, utility: Callable[[Tensor], Tensor]) -> Scores:
    """Score each candidate by a function of all mean token losses (n,), float64."""
    losses = step.sum_parts(step.measured(lambda passes: step.backend.losses(step.share, **passes)))
    return Scores(utilities=utility(losses), events=step.lost_labels(losses))


@register_method("high_ppl", flops=_COST, micro_batches=True)
def high_ppl(step: ScoringStep) -> Scores:
    """Score by the loss: the highest are picked."""
    return _scores(step, lambda losses: losses)


@register_method("low_ppl", flops=_COST, micro_batches=True)
def low_ppl(step: ScoringStep) -> Scores:
    """Score by the loss: the lowest are picked."""
    return _scores(step, lambda losses: -losses)


@register_method("mid_ppl", flops=_COST, micro_batches=True)
def mid_ppl(step: ScoringStep) -> Scores:
    """Score by the loss: those nearest the median are picked."""

    def nearness(losses: Tensor) -> Tensor:
        finite = losses[losses.isfinite()]
        return -(losses - (finite.median() if len(finite) else 0)).abs()

    return _scores(step, nearness)
