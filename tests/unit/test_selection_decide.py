"""The decision is a function of its arguments: evidence, settings, key. A selector adds nothing to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaopus.selection import Scores, SelectionConfig, TensorCandidates, sampler
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.decide import Evidence, Key, decide
from megaopus.selection.guards import token_pair_check
from tests.unit.selection_net import UNGUARDED, K, N, batch, make, make_backend

IDS = torch.arange(64) + 500
VALUES = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def evidence(asked: list[list[int]] | None = None, **known: Any) -> Evidence:
    """Of 64 candidates whose utilities are ``VALUES``; ``asked`` is told whose were asked for."""

    def score(positions: Tensor) -> Scores:
        if asked is not None:
            asked.append(positions.tolist())
        return Scores(utilities=VALUES[positions])

    return Evidence(**{"ids": IDS, "score": score, "exposures": torch.ones(64, dtype=torch.int64), **known})


def config(**settings: Any) -> SelectionConfig:
    return SelectionConfig(**{"method": "opus", "guards": UNGUARDED, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "boltzmann", "score_every": 2},
        {"prescreen": PrescreenConfig(mode="cascade"), "guards": GuardConfig(min_distinct=0)},
        {
            "prescreen": PrescreenConfig(mode="predict", every=1),
            "guards": GuardConfig(domain_floor=0.5, min_distinct=0),
        },
    ],
)
def test_the_same_arguments_give_the_same_choice(settings: dict[str, Any]) -> None:
    known = evidence(prescreen_score=-VALUES, domains=IDS % 3)
    first, second = (decide(known, config(**settings), Key(3, 8), 4) for _ in range(2))
    assert torch.equal(first.positions, second.positions)
    assert torch.equal(first.probabilities, second.probabilities)
    assert len(first.positions.unique()) == 4 * config(**settings).score_every


def test_it_asks_for_scores_of_whom_it_screened_alone() -> None:
    asked: list[list[int]] = []
    screening = config(prescreen=PrescreenConfig(mode="cascade", multiple=4, slice=4))
    choice = decide(evidence(asked, prescreen_score=VALUES), screening, Key(0, 0), 4)
    (positions,) = asked
    assert len(positions) == 16
    assert choice.uniform is not None
    assert int(choice.uniform.sum()) == 4
    best = sampler.pick_top_k(VALUES[positions], IDS[positions], 4)
    assert choice.positions.tolist() == torch.tensor(positions)[best].tolist()
    assert choice.scored.nonzero().flatten().tolist() == positions
    # in a warm-up nothing is scored, and the prescreen's scores pick
    asked.clear()
    warming = config(prescreen=PrescreenConfig(mode="cascade"), warmup_steps=5)
    choice = decide(evidence(asked, prescreen_score=VALUES), warming, Key(0, 4), 4)
    assert asked == []
    assert choice.positions.tolist() == sampler.pick_top_k(VALUES, IDS, 4).tolist()
    assert choice.utilities is None


def test_a_method_without_scores_needs_ids_alone() -> None:
    choice = decide(Evidence(ids=IDS), config(method="uniform"), Key(3, 7), 4)
    assert choice.positions.tolist() == sampler.pick_uniform(IDS, 4, 3, 7).tolist()
    assert choice.utilities is choice.exposures is choice.prescreen_score is None


def test_numbers_that_the_scores_bring_are_kept_where_they_were_scored() -> None:
    def score(positions: Tensor) -> Scores:
        return Scores(utilities=VALUES[positions], columns={"position": positions})

    known = evidence(score=score, prescreen_score=VALUES)
    choice = decide(known, config(prescreen=PrescreenConfig(mode="cascade")), Key(0, 0), 4)
    values, where = choice.more["position"]
    assert torch.equal(where, choice.scored)
    assert torch.equal(values[where], where.nonzero().flatten())
    assert int(values[~where].abs().sum()) == 0


def test_a_selector_decides_as_the_function_does() -> None:
    backend, guards = make_backend(), GuardConfig(exposure_cap=0, min_unique=0, min_ess=1.05)
    selector = make(backend, sampler="boltzmann", guards=guards)
    for step in range(3):
        x = TensorCandidates(batch(step), torch.arange(N) + 100 * step)
        found = selector.select(x, step)
        known = Evidence(
            ids=found.ids,
            score=lambda positions, found=found: Scores(utilities=found.utilities[positions]),
            token_pair_alarm=token_pair_check(x, None, 0.5, 0, step, step),
        )
        choice = decide(known, selector.config, Key(0, step), K)
        assert torch.equal(choice.at(step, 0, found.ids, K).indices, found.indices)
        assert choice.ess == found.ess
