"""The decision is a function of its arguments: evidence, settings, key. A selector adds nothing to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection import Scores, SelectionConfig, TensorCandidates, sampler
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.decide import Evidence, Key, decide
from megaopus.selection.guards import quotas as quotas_of
from megaopus.selection.guards import token_pair_check
from tests.unit.selection_net import UNGUARDED, K, N, batch, make, make_backend
from tests.unit.test_selection_sampler import one_after_another

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


@pytest.mark.parametrize("mode", ["predict", "cascade"])
def test_a_distrusted_predictor_leaves_what_is_better_than_chance(mode: str) -> None:
    """Its scores are importance alone then; those of records that do not say so (version 0.1) are not used."""
    screening = config(prescreen=PrescreenConfig(mode=mode, multiple=4, slice=4, every=2))
    for facts, by_score in (({"instead": "importance"}, True), ({"instead": "chance"}, False), ({}, False)):
        asked: list[list[int]] = []
        reason = Event("selection.prescreen_distrusted", "alarm", **facts)
        choice = decide(evidence(asked, prescreen_score=VALUES, distrust=reason), screening, Key(0, 1), 4)
        assert choice.events[0] == reason
        best = VALUES.topk(12).indices.tolist()
        if mode == "predict":
            assert (choice.positions.tolist() == best[:4]) == by_score
            assert (choice.method == "uniform") != by_score
        else:
            assert (len(set(asked[0]) & set(best)) == 12) == by_score


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


def test_what_is_above_the_cap_comes_last_whatever_the_scale_of_utilities() -> None:
    exposures = torch.where(torch.arange(64) < 60, 2, 1)  # four are new, and worth least
    small = 1e-8 * torch.cat([VALUES[:60], VALUES[60:] - 100])
    capped = config(utilities="raw", guards=GuardConfig(min_ess=0, min_distinct=0, min_unique=0))
    known = evidence(score=lambda positions: Scores(utilities=small[positions]), exposures=exposures)
    choice = decide(known, capped, Key(0, 0), 14)
    assert sorted(choice.positions[:4].tolist()) == [60, 61, 62, 63]
    assert choice.positions[4:].tolist() == VALUES[:60].topk(10).indices.tolist()
    screening = config(prescreen=PrescreenConfig(mode="cascade", multiple=4, slice=1), guards=capped.guards)
    asked: list[list[int]] = []
    decide(evidence(asked, prescreen_score=small, exposures=exposures), screening, Key(0, 0), 4)
    assert set(VALUES[:60].topk(11).indices.tolist()) <= set(asked[0])


@pytest.mark.parametrize("utilities", ["standardised", "raw"])
def test_redundancy_is_as_strong_however_many_steps_a_buffer_serves(utilities: str) -> None:
    """Of the picks, one in ``score_every`` goes into the same update. Greedily on plain numbers, beside."""
    updates = torch.randn(64, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gram = updates @ updates.t()
    known = evidence(score=lambda positions: Scores(utilities=VALUES[positions], gram=gram))
    for every, strength in ((1, 3.0), (4, 3.0)):
        settings = {"utilities": utilities, "redundancy": strength, "score_every": every}
        scale = strength / every if utilities == "raw" else strength / (every * 4 * float(gram.diagonal().mean()))
        left = VALUES if utilities == "raw" else (VALUES - VALUES.mean()) / VALUES.std(correction=0)
        picked: list[int] = []
        for _ in range(4 * every):
            score = left - scale * gram[:, picked].sum(1)
            score[picked] = -torch.inf
            picked.append(int(score.argmax()))
        choice = decide(known, config(**settings), Key(0, 0), 4)
        assert sorted(choice.positions.tolist()) == sorted(picked)


@pytest.mark.parametrize("utilities", ["standardised", "raw"])
def test_an_outlier_moves_no_other_pick(utilities: str) -> None:
    """Though its update is as far out as its utility, and redundancy counts: beside a buffer that cannot pick it."""
    updates = torch.randn(64, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = {}
    for size in (None, 1e6, 1e30):
        values, rows = VALUES.clone(), updates.clone()
        values[7], rows[7] = (torch.nan, rows[7]) if size is None else (size, rows[7] * size**0.5)
        gram = rows @ rows.t()
        known = evidence(score=lambda positions, v=values, g=gram: Scores(utilities=v[positions], gram=g))
        found[size] = decide(known, config(utilities=utilities, redundancy=3.0), Key(0, 0), 5).positions.tolist()
    assert found[1e6] == found[1e30] == [7, *found[None][:4]]


def test_quota_picks_count_for_redundancy() -> None:
    values = torch.tensor([1.0, 0.99, 0.5, 0.4], dtype=torch.float64)
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1
    known = Evidence(
        ids=torch.arange(4),
        score=lambda positions: Scores(utilities=values, gram=gram),
        domains=torch.tensor([0, 0, 1, 1]),
        exposures=torch.ones(4, dtype=torch.int64),
    )
    diverse = config(utilities="raw", redundancy=1.0)
    assert sorted(decide(known, diverse, Key(0, 0), 2).positions.tolist()) == [0, 2]
    diverse.guards = GuardConfig(domain_floor=0.6, exposure_cap=0, min_ess=0, min_distinct=0, min_unique=0)
    for step in range(8):  # with one pick or two that are somebody's due
        assert sorted(decide(known, diverse, Key(0, step), 2).positions.tolist()) == [0, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "boltzmann", "utilities": "raw", "temperature": 0.3},
        {"groups": 4},
        {"guards": GuardConfig(domain_floor=0.6, min_ess=0, min_distinct=0, min_unique=0)},
        {"prescreen": PrescreenConfig(mode="cascade", slice=8, multiple=2)},
    ],
)
def test_redundancy_takes_columns_of_the_whole_matrix_off(settings: dict[str, Any]) -> None:
    """Picks are those of a plain loop over the matrix of all pairs, an outlier's column zero, to the last one."""
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    gram = vectors @ vectors.t() + 0.1 * torch.randn(64, 64, generator=generator, dtype=torch.float64)  # not symmetric
    values, asked = VALUES.clone(), list[Tensor]()
    values[7] = 1e6

    def score(positions: Tensor) -> Scores:
        asked.append(positions)
        return Scores(utilities=values[positions], gram=gram[positions][:, positions])

    exposures, domains = torch.arange(64) % 3, torch.arange(64) % 2
    ids = IDS[torch.randperm(64, generator=generator)]
    known = Evidence(ids=ids, score=score, exposures=exposures, domains=domains, prescreen_score=VALUES)
    used = config(**{"sampler": "top_k", "redundancy": 0.7, **settings})
    choice = decide(known, used, Key(3, 9), 16)
    (among,) = asked
    own, overlap = values[among], gram[among][:, among]
    wild, norms = sampler.outliers(own), overlap.diagonal()
    standard = used.utilities == "standardised"
    scale = 1 / (16 * norms[~sampler.outliers(norms)].mean()) if standard else 1.0
    places, quotas = among * used.groups // 64, None
    if used.groups > 1:
        overlap, quotas = overlap * (places[:, None] == places), (places, dict.fromkeys(range(4), 4))
    if used.guards.domain_floor:
        quotas = domains[among], quotas_of(0.6, domains, domains[among], 16, 3, 9)
    penalty = (0.7 * scale * overlap).masked_fill(wild, 0)
    draws = sampler.Draws(used.sampler, used.temperature, 3, 9)
    levels = (exposures[among] - 1).clamp_min(0) if used.guards.exposure_cap else None
    taken = sampler.standardise(own) if standard else own
    picked = among[one_after_another(taken, ids[among], 16, draws, penalty, quotas, levels)]
    assert choice.positions.tolist() == picked.tolist()
    assert choice.redundancy is not None
    assert torch.equal(choice.redundancy.overlaps[:, among], gram[among][:, picked].t())
    assert torch.equal(choice.redundancy.squared_norms[among], norms)
    assert int(choice.redundancy.overlaps.isnan().sum()) == 16 * (64 - len(among))


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


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"redundancy": 0.5}, {"sampler": "boltzmann", "utilities": "raw"}])
def test_each_group_chooses_as_if_it_were_alone(settings: dict[str, Any]) -> None:
    """Four runs of 16 candidates with 4 picks each; redundancy at its own scale in each, here the same."""
    factors = torch.randn(64, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gram = factors / factors.norm(dim=1, keepdim=True)
    gram = gram @ gram.T

    def score(first: int) -> Any:
        def found(positions: Tensor) -> Scores:
            rows = positions + first
            return Scores(utilities=VALUES[rows], gram=gram[rows][:, rows] if "redundancy" in settings else None)

        return found

    raw = {"utilities": "raw", **settings}
    together = decide(evidence(score=score(0)), config(groups=4, **raw), Key(3, 8), 16)
    for group in range(4):
        first = 16 * group
        part = Evidence(ids=IDS[first : first + 16], score=score(first), exposures=torch.ones(16, dtype=torch.int64))
        alone = decide(part, config(**raw), Key(3, 8), 4)
        mine = together.positions[(together.positions >= first) & (together.positions < first + 16)]
        assert sorted(mine.tolist()) == sorted((alone.positions + first).tolist())


def test_a_group_that_has_too_few_leaves_the_rest_to_others() -> None:
    values = VALUES.clone()
    values[2:16] = torch.nan
    known = Evidence(ids=IDS, score=lambda rows: Scores(utilities=values[rows]), exposures=torch.ones(64).long())
    choice = decide(known, config(groups=4), Key(3, 8), 16)
    assert choice.method == "opus"
    counts = (choice.positions // 16).bincount()
    assert counts[0] == 2
    assert counts.sum() == 16
    assert counts[1:].min() >= 4


# -- what utilities did ------------------------------------------------------------------------------------------------


def test_picks_without_utilities_are_those_of_what_else_is_known() -> None:
    """A cascade scores half and picks by utilities; by the prior alone, among the same, others are picked."""
    prior = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    screening = config(prescreen=PrescreenConfig(mode="cascade", multiple=2, slice=4))
    choice = decide(evidence(prescreen_score=prior, prior=prior), screening, Key(3, 0), 8)
    scored = choice.scored.nonzero().flatten()
    others = scored[prior[scored].argsort(descending=True)[:8]]
    came = sorted(set(choice.positions.tolist()) - set(others.tolist()))
    went = sorted(set(others.tolist()) - set(choice.positions.tolist()))
    found = choice.influence
    assert found.changed == len(came) / 8 > 0
    assert found.utility == pytest.approx(float(VALUES[came].mean() - VALUES[went].mean()))
    assert found.importance == pytest.approx(float(prior[came].mean() - prior[went].mean()))
    assert (sorted(found.came), sorted(found.went)) == (came, went)
    assert found.spread == {"utility": pytest.approx(float(VALUES[scored].std(correction=0))), "importance": 0.0}
    served = choice.at(0, 0, IDS, 8, served=True)
    assert served.influence is None
    assert choice.at(0, 0, IDS, 8).influence == found


@pytest.mark.parametrize("sampler_name", ["top_k", "boltzmann"])
def test_what_was_learnt_changes_picks_by_as_much_as_it_says(sampler_name: str) -> None:
    prior = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    predicting = config(prescreen=PrescreenConfig(mode="predict", every=4, slice=4), sampler=sampler_name)
    predicting.utilities = "raw"
    blind = decide(evidence(prescreen_score=prior, prior=prior), predicting, Key(3, 1), 8)
    assert blind.influence == (
        0.0,
        None,
        None,
        None,
        {"utility": 0.0, "importance": blind.influence.spread["importance"]},
        (),
        (),
    )
    both = decide(evidence(prescreen_score=prior + VALUES, prior=prior), predicting, Key(3, 1), 8)
    common = set(both.positions.tolist()) & set(blind.positions.tolist())
    assert both.influence.changed == 1 - len(common) / 8 > 0
    assert both.influence.spread["utility"] == pytest.approx(float(VALUES.std(correction=0)))


def test_nothing_is_said_of_methods_without_utilities_nor_of_what_is_not_known() -> None:
    assert decide(evidence(), config(method="low_ppl"), Key(3, 0), 8).influence is None
    predicting = config(prescreen=PrescreenConfig(mode="predict", every=4, slice=4))
    assert decide(evidence(prescreen_score=VALUES), predicting, Key(3, 1), 8).influence is None  # a replay
    assert 0 < decide(evidence(), config(), Key(3, 0), 8).influence.changed <= 1
