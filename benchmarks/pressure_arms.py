"""Registers what pressure.py needs beside the product: draws and buffers whose pressure changes by chance.

A plugin: ``plugins=[benchmarks.pressure_arms]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaopus.selection import Scores, ScoringStep, counter_rng, register_method, register_sampler
from megaopus.selection.methods.registry import METHODS
from megaopus.selection.samplers.registry import SAMPLERS

_TEXT = {"text_features": "scores by a classifier of proxy against pool"}
_COST = (0.0, "n-grams")


@register_sampler("pressure_placebo")
def sampled_now_and_then(utilities: Tensor, ids: Tensor, temperature: float, key: int) -> Tensor:
    """Draw in half of the steps, by chance, and take the best in the others."""
    name = "boltzmann" if _coin(key) else "top_k"
    return SAMPLERS.find(name).draw(utilities, ids, temperature, key)


@register_method("pressure_narrow", flops=_COST, needs=_TEXT)
def narrow(step: ScoringStep) -> Scores:
    """Score a quarter of the buffer, drawn by chance, by importance; the others are not picked."""
    found = METHODS.find("importance").score(step)
    assert found.utilities is not None
    ids = step.buffer.ids.cpu()
    order = counter_rng.uniform(counter_rng.key(step.seed, "pressure_narrow", step.step), ids).argsort()
    others = order[len(ids) // 4 :]
    least = float(found.utilities.min()) - 1
    return Scores(utilities=found.utilities.index_fill(0, others, least))


@register_method("pressure_width_placebo", flops=_COST, needs=_TEXT)
def narrow_now_and_then(step: ScoringStep) -> Scores:
    """Score as ``narrow`` does in half of the steps, by chance, and all by importance in the others."""
    name = "pressure_narrow" if _coin(counter_rng.key(step.seed, "pressure_width", step.step)) else "importance"
    return METHODS.find(name).score(step)


def _coin(key: int) -> bool:
    return bool(counter_rng.uniform(key, torch.zeros(1, dtype=torch.int64)) < 0.5)
