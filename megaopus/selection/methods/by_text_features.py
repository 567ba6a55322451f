"""Picks by numbers of the candidates' text, without a model."""

from __future__ import annotations

from megaopus.selection.methods.registry import register_method
from megaopus.selection.scoring import Scores, ScoringStep

_COST = (0.0, "text features alone, worked out beforehand")


@register_method("dsir", flops=_COST, needs={"text_features": "scores by n-grams of proxy and pool"})
def dsir(step: ScoringStep) -> Scores:
    """Score by the log-odds of proxy over pool under their tokens' n-grams (DSIR-like, arXiv 2302.03169)."""
    assert step.text_features is not None  # checked when the selector was made
    return Scores(utilities=step.backend.from_rank_0(step.text_features.log_odds(step.buffer.ids)))


@register_method("importance", flops=_COST, needs={"text_features": "scores by a classifier of proxy against pool"})
def importance(step: ScoringStep) -> Scores:
    """Score by the log of how much likelier the proxy holds such text than the pool."""
    assert step.text_features is not None  # checked when the selector was made
    return Scores(utilities=step.backend.from_rank_0(step.text_features.importance(step.buffer.ids)))
