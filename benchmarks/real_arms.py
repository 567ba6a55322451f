"""Registers the methods of selection that the study on a real model alone needs (real_study.py).

A plugin: ``plugins=[benchmarks.real_arms]``. What they are told beforehand are score columns of documents, beside the
corpus as ``score`` writes them; a sequence has the score of the document that it begins in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaopus.data.scores import load_column
from megaopus.selection import Scores, ScoringStep, counter_rng, register_method
from megaopus.selection.methods.registry import METHODS

WORTH, FROZEN = "worth", "frozen"
"""Columns: what a document's kind is worth, and its utility for a model that is not trained on."""
_COLUMN_COST = (0.0, "a column made ahead of time")
_TEXT = "adds the importance of n-grams"


@register_method("study_oracle", flops=(0.0, "labels alone"))
def oracle(step: ScoringStep) -> Scores:
    """Score by what the candidate's kind is worth, and among equals by chance."""
    _, places = _column(step, WORTH).unique(return_inverse=True)
    key = counter_rng.key(step.seed, "study_oracle", step.step)
    return Scores(utilities=places.double() + counter_rng.uniform(key, step.buffer.ids.cpu()))


@register_method("study_frozen", flops=_COLUMN_COST)
def frozen(step: ScoringStep) -> Scores:
    """Score by the utility that a frozen model gave the document."""
    return Scores(utilities=_column(step, FROZEN))


@register_method("study_frozen_sum", flops=_COLUMN_COST, needs={"text_features": _TEXT})
def frozen_sum(step: ScoringStep) -> Scores:
    """Score by the z-score of that utility plus the z-score of the importance."""
    return Scores(utilities=_z(_column(step, FROZEN)) + _z(_importance(step)))


@register_method("study_sum", flops=None, needs={"proxy": "scores candidates against a proxy", "text_features": _TEXT})
def plain_sum(step: ScoringStep) -> Scores:
    """Score by the z-score of the utility plus the z-score of the importance; by the latter while there is no other."""
    found, importance = METHODS.find("opus").score(step), _z(_importance(step))
    if found.utilities is None:
        return Scores(utilities=importance)
    return replace(found, utilities=_z(found.utilities) + importance)


@register_method("study_placebo", flops=None, needs={"proxy": "scores candidates against a proxy"})
def placebo(step: ScoringStep) -> Scores:
    """Score as ``opus`` does, and hand the model's numbers out among the candidates anew, by chance.

    What is known of text stays where it was, and so do the numbers of sequences by which the model is judged.
    """
    found = METHODS.find("opus").score(step)
    count = len(step.buffer) - step.judged
    key = counter_rng.key(step.seed, "study_placebo", step.step)
    order = counter_rng.uniform(key, step.buffer.ids[:count].cpu()).argsort()
    order = torch.cat([order, torch.arange(count, len(step.buffer))])
    known = {"utilities": found.utilities, "losses": found.losses}
    return replace(found, **{name: values[order] for name, values in known.items() if values is not None})


@register_method("study_loss", flops=None, needs={"proxy": "judges losses by a proxy's"})
def loss(step: ScoringStep) -> Scores:
    """Give losses and no utility: what a forward pass alone is worth to the log-odds."""
    found = METHODS.find("high_ppl").score(step)
    if found.utilities is None:
        return found
    return replace(found, losses=found.utilities, utilities=found.utilities * 0)


@register_method("study_utility", flops=None, needs={"proxy": "scores candidates against a proxy"})
def utility(step: ScoringStep) -> Scores:
    """Give utilities and no losses."""
    return replace(METHODS.find("opus").score(step), losses=None)


def _column(step: ScoringStep, name: str) -> Tensor:
    """(n,) float64 of the document that each candidate begins in; nan for one without a score, which is not picked."""
    buffer: Any = step.buffer
    sequences, numbers = buffer.reads
    values = torch.from_numpy(load_column(sequences.corpus, name).values[sequences.first_document_of(numbers)])
    return step.backend.from_rank_0(values.double())


def _importance(step: ScoringStep) -> Tensor:
    """(n,) float64, as method ``importance`` has it."""
    assert step.text_features is not None  # checked when the selector was made
    return step.backend.from_rank_0(step.text_features.importance(step.buffer.ids))


def _z(values: Tensor) -> Tensor:
    """(n,) in standard deviations from the mean of the finite ones; zeros where all are equal."""
    known = values[values.isfinite()]
    if not len(known) or bool(known.min() == known.max()):
        return values * 0
    return (values - known.mean()) / known.std(correction=0)
