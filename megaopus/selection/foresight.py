"""Says before a step which candidates it will score and pick, as far as that needs no model: what can be read ahead.

A hint: no choice depends on it, and where it is wrong only time is lost. test_selection_foresight.py compares it with
what is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megaopus.selection import counter_rng, sampler
from megaopus.selection.config import BY_LOSS, BY_PROXY, SelectionConfig
from megaopus.selection.prescreen import Prescreen

NOBODY = torch.empty(0, dtype=torch.int64)


class Foresight(NamedTuple):
    """Positions in the buffer, each (n,) int64; empty where nothing is known."""

    scored: Tensor = NOBODY
    """Whose utilities will be computed, over all ranks, in the order in which the ranks share them."""
    picked: Tensor = NOBODY
    """The picks of the buffer, K of each step that it serves, one step after the other."""
    by_value: bool = False
    """Whether the picks, known or not, go by value, so that their token pairs are compared with others'."""


def foresee(
    config: SelectionConfig,
    ids: Tensor,
    step: int,
    times: Tensor | None,
    prescreen: Prescreen | None,
    num_picked: int,
    num_scored: int,
    seed: int,
) -> Foresight:
    """Foresee the choice from the buffer of candidates ``ids`` (N,) that ``step`` is the first to be served from.

    Args:
        config: the selector's settings.
        ids: names of the candidates.
        step: the update, from 0.
        times: (N,) exposures if each were picked now; None: not counted, or not known.
        prescreen: as it was left by the step before; None: there is none.
        num_picked: picks from the buffer, of all the steps that it serves.
        num_scored: candidates that are scored exactly.
        seed: of the run.
    """
    period, past_warmup = step // config.score_every, step >= config.warmup_steps
    everyone = torch.arange(len(ids))
    if config.method == "uniform" or not (past_warmup or config.has_prior):
        return Foresight(picked=sampler.pick_uniform(ids, num_picked, seed, period))
    if prescreen is None:
        return Foresight(everyone if config.method in BY_LOSS + BY_PROXY else NOBODY, by_value=True)
    capped = times is not None and config.guards.exposure_cap > 0
    allowed = (times <= config.guards.exposure_cap).nonzero().flatten() if capped and times is not None else everyone
    if len(allowed) < max(num_picked, num_scored):
        return Foresight()  # the cap will be lifted
    standing = None if prescreen.doubt() else prescreen.standing(ids)
    use_predictor = config.prescreen.mode == "predict" or not past_warmup
    scored = NOBODY
    if past_warmup and not (use_predictor and period % config.prescreen.every):
        key = counter_rng.key(seed, "slice", period)
        scored = prescreen.screen(ids, allowed, standing, num_scored, key)[0]
    if not use_predictor or (standing is not None and config.guards.domain_floor > 0):
        return Foresight(scored, by_value=True)
    if standing is None:
        return Foresight(scored, allowed[sampler.pick_uniform(ids[allowed], num_picked, seed, period)])
    temperature = config.temperature if config.sampler == "boltzmann" else None
    values = standing[allowed]
    if config.utilities == "standardised":
        values = sampler.standardise(values)
    picked = allowed[sampler.pick(values, ids[allowed], num_picked, temperature, None, None, seed, period)]
    if config.score_every > 1:
        picked = picked[counter_rng.uniform(counter_rng.key(seed, "turns", period), ids[picked]).argsort()]
    return Foresight(scored, picked, by_value=True)
