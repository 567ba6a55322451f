"""One log-odds weighs what tells the proxy from the candidates, by proxy sequences that no gradient is made of."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from megaopus.logistic import fit_logistic
from megaopus.selection import Scores, SelectionConfig, Selector, TensorCandidates
from megaopus.selection import odds as odds_module
from megaopus.selection.candidates import Together
from megaopus.selection.config import PrescreenConfig
from megaopus.selection.decide import Evidence, Key, decide
from megaopus.selection.foresight import foresee
from megaopus.selection.odds import EXPECTED, KEPT, PROVEN, Odds, Signals, design, parts_of, standing
from tests.unit.selection_net import UNGUARDED, K, N, batch, make_backend, proxy

ODDS: dict[str, Any] = {
    "method": "opus",
    "utilities": "odds",
    "prescreen": PrescreenConfig(mode="importance", multiple=2),
    "guards": UNGUARDED,
    "proxy_half_life": 0.0,
}


def drawn(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_a_regression_is_the_one_of_least_loss() -> None:
    x = torch.stack([drawn(60, 1), drawn(60, 2), torch.ones(60, dtype=torch.float64)], 1)
    y, weight = (drawn(60, 3) + x[:, 0] > 0).double(), drawn(60, 4).square()
    expected = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)

    def loss(weights: Any) -> float:
        odds = x @ torch.as_tensor(weights)
        of_rows = weight @ (torch.nn.functional.softplus(odds) - y * odds)
        return float(of_rows + (torch.as_tensor(weights) - expected)[:-1].square().sum() / 2)

    by_search = minimize(loss, [0.0, 0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13})
    torch.testing.assert_close(fit_logistic(x, y, weight, expected), torch.as_tensor(by_search.x), rtol=1e-4, atol=1e-5)


def test_standings_are_normal_scores_of_ranks() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, torch.nan, 2.0], dtype=torch.float64)
    quantiles = torch.tensor([3.5 / 4, 0.5 / 4, 2 / 4, torch.nan, 2 / 4], dtype=torch.float64)
    torch.testing.assert_close(standing(values), torch.special.ndtri(quantiles), equal_nan=True)
    others = torch.tensor([0.0, 2.0, 2.0, torch.inf, 5.0], dtype=torch.float64)
    quantiles = torch.tensor([3.5 / 5, 1.5 / 5, 2.5 / 5, torch.nan, 2.5 / 5], dtype=torch.float64)
    torch.testing.assert_close(standing(values, others), torch.special.ndtri(quantiles), equal_nan=True)
    # whatever the scale, and alike for both sides where they are alike
    torch.testing.assert_close(standing(1e9 * values, 1e9 * others), standing(values, others), equal_nan=True)
    both = drawn(4000, 1)
    assert abs(float(standing(both[:2000], both[2000:]).std() / standing(both).std()) - 1) < 0.05


def taught(steps: int, utility: float, loss: float, size: int = 32) -> Odds:
    """Of judges whose utilities and losses lie so far above those of candidates."""
    odds = Odds()
    for step in range(steps):
        seed = 100 * step
        pool = Signals(*(drawn(size, seed + i) for i in range(3)))
        importance = drawn(8, seed + 3).clamp_min(float(pool.importance.min()))
        odds.learn(pool, Signals(importance, drawn(8, seed + 4, utility), drawn(8, seed + 5, loss)))
    return odds


def test_what_tells_the_proxy_gets_the_weight() -> None:
    assert Odds().weights.tolist() == list(EXPECTED)
    blind, seeing, knowing = taught(30, 0, 0), taught(30, 1, 0), taught(30, 0, -1)
    assert blind.weights[1:].abs().max() < 0.25
    # normal distributions one standard deviation apart: the log-odds is 1 a standard deviation
    assert 0.7 < float(seeing.weights[1]) < 1.3
    assert seeing.weights[2:].abs().max() < 0.3
    assert -1.3 < float(knowing.weights[2]) < -0.7
    assert seeing.every <= 2 < blind.every
    assert taught(2, 0, 0).every == 1  # too few judges to score less by


def test_the_fit_is_to_design_rows_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(odds_module, "WINDOW", 6)
    odds, rows = Odds(), []
    for step in range(9):
        pool = Signals(drawn(KEPT + 7, step), drawn(KEPT + 7, step + 900), None)
        judges = Signals(drawn(3, step + 1800), drawn(3, step + 2700, 0.5), None)
        odds.learn(pool, judges)
        spaced = torch.linspace(0, KEPT + 6, KEPT, dtype=torch.float64).round().long()
        of_judges = design(judges, pool)
        rows.append((design(pool)[spaced], of_judges[judges.importance >= pool.importance.min()]))
    pool_rows, judge_rows = (torch.cat(each) for each in zip(*rows[-6:], strict=True))
    x = torch.cat([torch.cat([pool_rows, judge_rows]), torch.ones(len(pool_rows) + len(judge_rows), 1)], 1).double()
    y = torch.cat([torch.zeros(len(pool_rows)), torch.ones(len(judge_rows))]).double()
    weight = torch.where(y > 0, 1.0, len(judge_rows) / len(pool_rows)).double()
    expected = torch.tensor([*EXPECTED, 0.0], dtype=torch.float64)
    torch.testing.assert_close(odds.weights, fit_logistic(x, y, weight, expected)[:-1])
    assert odds.weights[2:].tolist() == [0.0, 0.0]  # no losses are seen


def test_a_state_goes_on_to_the_last_bit() -> None:
    straight, resumed = taught(5, 1, 1), Odds()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert torch.equal(straight.weights, resumed.weights)
    for odds in (straight, resumed):
        odds.learn(Signals(drawn(9, 1), drawn(9, 2), drawn(9, 3)), Signals(drawn(2, 4), drawn(2, 5), drawn(2, 6)))
    assert torch.equal(straight.weights, resumed.weights)
    assert straight.state_dict() == resumed.state_dict()


def test_numbers_that_are_none_teach_nothing() -> None:
    odds, bad = taught(3, 1, 0), torch.full((4,), torch.nan, dtype=torch.float64)
    before = odds.weights
    odds.learn(Signals(drawn(8, 1), drawn(8, 2), drawn(8, 3)), Signals(drawn(4, 4), bad, bad))
    assert torch.equal(odds.weights, before)
    odds.learn(Signals(drawn(4, 1), bad, bad), Signals(drawn(4, 4), drawn(4, 5), drawn(4, 6)))
    assert bool(odds.weights.isfinite().all())


# -- decisions ---------------------------------------------------------------------------------------------------------


def evidence(weights: list[float], **known: Any) -> Evidence:
    """Of 32 candidates, of which the first 16 are the more important ones."""
    prior = torch.linspace(1, -1, 32, dtype=torch.float64)
    utilities, losses = drawn(32, 1), drawn(32, 2)

    def parts(positions: Tensor, scores: Scores) -> dict[str, Tensor]:
        assert scores.utilities is not None
        signals = Signals(prior[positions], scores.utilities, scores.losses)
        return parts_of(signals, torch.tensor(weights, dtype=torch.float64))

    given = {"score": lambda at: Scores(utilities=utilities[at], losses=losses[at]), "parts": parts}
    return Evidence(**{"ids": torch.arange(32) + 7, "prior": prior, "prescreen_score": prior, **given, **known})


def test_importance_narrows_and_the_log_odds_pick() -> None:
    config = SelectionConfig(**ODDS)
    choice = decide(evidence([0.5, 2.0, -1.0, 0.0]), config, Key(0, 0), 4)
    assert choice.scored is not None
    assert choice.scored.nonzero().flatten().tolist() == list(range(16))
    prior, utilities, losses = torch.linspace(1, -1, 32, dtype=torch.float64)[:16], drawn(32, 1)[:16], drawn(32, 2)[:16]
    values = 0.5 * prior + 2 * standing(utilities) - standing(losses)
    assert sorted(choice.positions.tolist()) == sorted(values.topk(4).indices.tolist())
    torch.testing.assert_close(choice.more["odds"].values[:16], values)
    assert torch.equal(choice.more["loss"].values[:16], losses)
    assert choice.influence is not None
    assert set(choice.influence.spread) == {"importance", "utility", "loss"}
    assert choice.influence.changed == len(set(choice.positions.tolist()) - {0, 1, 2, 3}) / 4
    blind = decide(evidence([1, 0, 0, 0]), config, Key(0, 0), 4)
    assert blind.positions.tolist() == [0, 1, 2, 3]
    assert blind.influence is not None
    assert blind.influence.changed == 0


def test_where_nothing_can_be_scored_importance_picks() -> None:
    config = SelectionConfig(**ODDS)
    choice = decide(evidence([0.5, 2, 0, 0], score=lambda at: Scores(utilities=None)), config, Key(0, 0), 4)
    assert choice.positions.tolist() == [0, 1, 2, 3]
    assert choice.method == "opus"
    assert choice.utilities is None
    # what is not finite is not picked
    utilities = drawn(32, 1)
    utilities[3] = torch.nan
    choice = decide(evidence([9, 0, 0, 0], score=lambda at: Scores(utilities=utilities[at])), config, Key(0, 0), 4)
    assert choice.positions.tolist() == [0, 1, 2, 4]


def test_a_buffer_that_is_not_worth_scoring_is_foreseen() -> None:
    config = SelectionConfig(**{**ODDS, "cadence": "auto"})
    scored, seldom = evidence([0.5, 2, 0, 0]), evidence([0.5, 2, 0, 0], scores_now=False)
    assert decide(seldom, config, Key(0, 0), 4).positions.tolist() == [0, 1, 2, 3]
    assert foresee(seldom, config, Key(0, 0), 4).picked.tolist() == [0, 1, 2, 3]
    assert foresee(seldom, config, Key(0, 0), 4).scored.tolist() == []
    assert foresee(scored, config, Key(0, 0), 4).scored.tolist() == list(range(16))
    assert foresee(scored, config, Key(0, 0), 4).picked.tolist() == []


# -- a selector --------------------------------------------------------------------------------------------------------


class Features:
    """Importance is a function of the id; proxy sequences with odd ids judge."""

    def importance(self, ids: Tensor) -> Tensor:
        return torch.sin(ids.double())

    def proxy_importance(self, ids: Tensor) -> Tensor:
        return torch.cos(ids.double()).abs()

    def judges(self, ids: Tensor) -> Tensor:
        return ids % 2 == 1

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        return ids


def test_no_gradient_is_made_of_judges_and_they_are_scored_beside_the_candidates(monkeypatch: Any) -> None:
    backend = make_backend()
    selector = Selector(SelectionConfig(**ODDS), backend, num_selected=K, proxy=proxy, seed=0, text_features=Features())
    seen: list[list[int]] = []
    gradient, scored = backend.gradient, backend.losses
    monkeypatch.setattr(backend, "gradient", lambda proxy, **passes: seen.append(proxy.ids.tolist()) or gradient(proxy))
    lengths: list[int] = []
    monkeypatch.setattr(
        backend, "losses", lambda candidates, **passes: lengths.append(len(candidates)) or scored(candidates, **passes)
    )
    first = selector.select(TensorCandidates(batch(0, 2 * N), torch.arange(2 * N)), 1)
    assert seen
    assert all(each % 2 == 0 for each in seen[0])
    assert first.utilities is not None
    assert len(first.utilities) == 2 * N
    assert max(lengths) > N  # candidates and judges
    assert first.weights == dict(zip(("importance", "utility", "loss", "loss squared"), EXPECTED, strict=True))
    second = selector.select(TensorCandidates(batch(0, 2 * N), torch.arange(2 * N)), 2)
    assert second.weights != first.weights
    assert len(second.picked_ids) == K
    state = json.loads(json.dumps({key: value for key, value in selector.state_dict().items() if key == "odds"}))
    assert state["odds"]["weights"] != list(EXPECTED)


@pytest.mark.parametrize(("spread", "every"), [(1.1, 1), (0.8, 2), (0.3, 16), (0.2, 32), (0.0, 32)])
def test_the_more_the_model_tells_the_more_often_it_is_asked(spread: float, every: int) -> None:
    odds = Odds()
    odds.weights = torch.tensor([3.0, spread, 0.0, 0.0], dtype=torch.float64)  # whatever importance tells
    candidates = drawn(64, 4).view(16, 4)
    candidates[:, 1] /= candidates[:, 1].std()
    odds._rows = [(candidates, drawn(PROVEN * 4, 5).view(PROVEN, 4))]
    assert odds._cadence(candidates) == every
    odds._rows = [(candidates, drawn(4 * PROVEN - 4, 5).view(-1, 4))]
    assert odds._cadence(candidates) == 1  # too few judges to know


def test_a_selector_scores_as_often_as_it_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odds, "_cadence", lambda self, candidates: 3)
    selector = Selector(
        SelectionConfig(**ODDS, cadence="auto"),
        make_backend(),
        num_selected=K,
        proxy=proxy,
        seed=0,
        text_features=Features(),
    )
    candidates = TensorCandidates(batch(0, 2 * N), torch.arange(2 * N))
    found = [selector.select(candidates, step) for step in range(1, 8)]
    assert [selection.step for selection in found if selection.utilities is not None] == [1, 3, 6]
    unscored = found[1]
    most = torch.sin(torch.arange(2 * N).double()).topk(K).indices
    assert unscored.indices.tolist() == most.sort().values.tolist()  # by importance
    assert unscored.influence is not None
    assert unscored.influence.changed == 0


def test_two_sets_together_are_one() -> None:
    first, second = (TensorCandidates(batch(n, n), torch.arange(n) + at) for n, at in ((5, 0), (3, 100)))
    both = Together(first, second)
    assert len(both) == 8
    assert both.ids.tolist() == [0, 1, 2, 3, 4, 100, 101, 102]
    taken = both.take(torch.tensor([3, 4, 5, 7, 7]))
    assert taken.ids.tolist() == [3, 4, 100, 102, 102]
    whole = torch.cat([first.batch(), second.batch()])
    assert torch.equal(taken.batch(), whole[[3, 4, 5, 7, 7]])
    assert torch.equal(both.take(torch.tensor([1])).batch(), whole[[1]])
    assert torch.equal(both.take(torch.tensor([6])).batch(), whole[[6]])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prescreen": PrescreenConfig()}, "set selection.prescreen.mode=importance"),
        ({"prescreen": PrescreenConfig(mode="importance", prior=0)}, "selection.prescreen.prior=1"),
        ({"method": "high_ppl"}, "set selection.method=opus"),
        ({"utilities": "raw", "cadence": "auto"}, "set selection.utilities=odds"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SelectionConfig(**ODDS), **settings).refuse()
