"""Says before a step which candidates it will score and pick, as far as that needs no model: what can be read ahead.

A hint: no choice depends on it, and where it is wrong only time is lost. tests/contract/test_reads.py compares it with
what is chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megaopus.selection.config import SelectionConfig
from megaopus.selection.decide import Evidence, Key, decide, draws_uniformly, picks_by_predictor
from megaopus.selection.methods.registry import UNIFORM
from megaopus.selection.scoring import Scores

NOBODY = torch.empty(0, dtype=torch.int64)


class Foresight(NamedTuple):
    """Positions in the buffer, each (n,) int64; empty where nothing is known."""

    scored: Tensor = NOBODY
    """Whose utilities will be computed, over all ranks, in the order in which the ranks share them."""
    picked: Tensor = NOBODY
    """The picks of the buffer, K of each step that it serves, one step after the other."""
    by_value: bool = False
    """Whether the picks, known or not, go by value, so that their token pairs are compared with others'."""


def foresee(evidence: Evidence, config: SelectionConfig, key: Key, num_selected: int) -> Foresight:
    """Decide with ``evidence`` that has neither scores nor alarms, and keep what they will not change.

    ``key.step`` is the first step that the buffer serves; ``num_selected``: picks of a step.
    """
    asked: list[Tensor] = []

    def score(positions: Tensor) -> Scores:
        asked.append(positions)
        return Scores(utilities=None)

    choice = decide(replace(evidence, score=score), config, key, num_selected)
    scored = asked[0] if asked else NOBODY
    if draws_uniformly(config, key.step) or picks_by_predictor(config, key.step) or not evidence.scores_now:
        return Foresight(scored, choice.positions, by_value=choice.method != UNIFORM)
    return Foresight(scored, by_value=True)
