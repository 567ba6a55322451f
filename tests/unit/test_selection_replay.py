"""Picks made again from what was recorded of them, without a run."""

from typing import Any

import pytest
import torch

from megaopus.events import read_event
from megaopus.selection import CandidateTable, SelectionConfig, sampler
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.replay import NamedCandidates, NotOnRecord, replay

IDS = torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1000
VALUES = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NO_ALARMS = GuardConfig(min_ess=0, min_distinct=0, min_unique=0)
DISTRUSTED = "alarm: the predictor's correlation with utilities is -0.50; picked uniformly"


def table(**known: Any) -> CandidateTable:
    blank: dict[str, Any] = {
        "id": IDS,
        "sequence": IDS,
        "domain": torch.zeros(64, dtype=torch.int64),
        "picked": torch.zeros(64, dtype=torch.bool),
        "probability": torch.full((64,), 1 / 64),
        "exposures": torch.ones(64, dtype=torch.int64),
    }
    return CandidateTable({name: value for name, value in (blank | known).items() if value is not None}, ["all"])


def replayed(config: SelectionConfig, known: CandidateTable, *sentences: str, step: int = 7):
    events = [read_event(sentence) for sentence in sentences]
    return replay(config, known, events, NamedCandidates(IDS), step, num_selected=4, seed=3)


def test_a_distrusted_predictor_does_not_pick() -> None:
    """By the event of version 0.1, a sentence, as by today's."""
    config = SelectionConfig(method="opus", prescreen=PrescreenConfig(mode="predict", every=8), guards=NO_ALARMS)
    known = table(prescreen_score=VALUES)
    trusted = replayed(config, known, "fewer than 8 candidates would be trained on at most 1 time(s) in 1000 steps")
    assert trusted.indices.tolist() == sampler.pick_top_k(VALUES, IDS, 4).sort().values.tolist()
    distrusted = replayed(config, known, DISTRUSTED)
    assert distrusted.method == "uniform"
    assert distrusted.indices.tolist() == sampler.pick_uniform(IDS, 4, 3, 7).sort().values.tolist()


def test_what_may_not_be_trained_on_again_has_no_probability() -> None:
    config = SelectionConfig(method="opus", sampler="boltzmann", guards=GuardConfig(min_ess=0, min_distinct=0))
    exposures = torch.where(torch.arange(64) % 2 == 0, 2, 1)
    found = replayed(config, table(utility=VALUES, exposures=exposures))
    assert bool((found.probabilities[::2] == 0).all())
    assert found.probabilities.sum() == pytest.approx(1)
    odd = torch.arange(1, 64, 2)
    expected = sampler.probabilities(sampler.standardise(VALUES[odd]), config.temperature)
    assert torch.equal(found.probabilities[odd], expected)
    assert found.ess == pytest.approx(float(1 / found.probabilities.square().sum()))
    assert bool((found.indices % 2 == 1).all())


def test_what_is_missing_is_named() -> None:
    config = SelectionConfig(method="opus", redundancy=1.0, guards=NO_ALARMS)
    with pytest.raises(NotOnRecord, match=r"inner products of 64 updates"):
        replayed(config, table(utility=VALUES))
    assert replayed(config, table()).method == "uniform"  # nothing was scored
    with pytest.raises(NotOnRecord, match="how often each candidate was trained on"):
        replayed(SelectionConfig(method="high_ppl"), table(utility=VALUES, exposures=None))
    with pytest.raises(NotOnRecord, match="tokens"):
        replayed(SelectionConfig(method="high_ppl"), table(utility=VALUES))
