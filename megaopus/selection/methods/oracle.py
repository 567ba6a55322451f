"""Picks what it is told is wanted."""

from __future__ import annotations

from megaopus.selection import counter_rng
from megaopus.selection.methods.registry import register_method
from megaopus.selection.scoring import Scores, ScoringStep


@register_method("domain_oracle", flops=(0.0, "labels alone"), needs={"wanted": "takes the target domains"})
def domain_oracle(step: ScoringStep) -> Scores:
    """Score target domains above all others; among equals by chance."""
    assert step.wanted is not None  # checked when the selector was made
    noise_N = counter_rng.uniform(counter_rng.key(step.seed, "domain_oracle", step.step), step.buffer.ids.cpu())
    return Scores(utilities=step.backend.from_rank_0(step.wanted(step.buffer).cpu().double()) + noise_N)
