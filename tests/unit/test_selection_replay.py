"""Picks made again from what was recorded of them, without a run."""

import pytest
import torch

from megaopus.selection import SelectionConfig, sampler
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.prescreen import DOUBT
from megaopus.selection.replay import Evidence, NamedCandidates, NotOnRecord, replay

IDS = torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1000
VALUES = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NO_ALARMS = GuardConfig(min_ess=0, min_distinct=0, min_unique=0)


def evidence(**known: object) -> Evidence:
    blank = {"utilities": None, "standing": None, "exposures": torch.ones(64, dtype=torch.int64)}
    return Evidence(**{**blank, "domains": torch.zeros(64, dtype=torch.int64), **known})  # type: ignore[arg-type]


def replayed(config: SelectionConfig, known: Evidence, step: int = 7):
    return replay(config, known, NamedCandidates(IDS), step, num_selected=4, seed=3)


def test_a_distrusted_predictor_does_not_pick() -> None:
    config = SelectionConfig(method="opus", prescreen=PrescreenConfig(mode="predict", every=8), guards=NO_ALARMS)
    trusted = replayed(config, evidence(standing=VALUES))
    assert trusted.indices.tolist() == sampler.pick_top_k(VALUES, IDS, 4).sort().values.tolist()
    doubted = replayed(config, evidence(standing=VALUES, doubt=f"{DOUBT} with utilities is -0.50"))
    assert doubted.method == "uniform"
    assert doubted.indices.tolist() == sampler.pick_uniform(IDS, 4, 3, 7).sort().values.tolist()


def test_what_may_not_be_trained_on_again_has_no_probability() -> None:
    config = SelectionConfig(method="opus", sampler="boltzmann", guards=GuardConfig(min_ess=0, min_distinct=0))
    exposures = torch.where(torch.arange(64) % 2 == 0, 2, 1)
    found = replayed(config, evidence(utilities=VALUES, exposures=exposures))
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
        replayed(config, evidence(utilities=VALUES))
    assert replayed(config, evidence()).method == "uniform"  # nothing was scored
    with pytest.raises(NotOnRecord, match="how often each candidate was trained on"):
        replayed(SelectionConfig(method="high_ppl"), evidence(utilities=VALUES, exposures=None))
    with pytest.raises(NotOnRecord, match="tokens"):
        replayed(SelectionConfig(method="high_ppl"), evidence(utilities=VALUES))
