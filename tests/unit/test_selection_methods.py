"""Tests what candidates are scored by: each method, the part of them scored, and whether predictions come true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaopus.selection import ModuleBackend, SelectionConfig, Selector, TensorCandidates
from megaopus.selection.candidates import Windowed
from megaopus.selection.config import PrescreenConfig
from tests.unit.selection_net import UNGUARDED, K, N, Net, batch, loss, make, make_backend, proxy, train_step
from tests.unit.test_selection_prescreen import LinearTraits


def test_scored_length_cuts_candidates_not_the_proxy() -> None:
    seen: list[tuple[bool, int]] = []

    class Recording(ModuleBackend):
        def _losses(self, model, x):
            seen.append((torch.is_grad_enabled(), x.shape[1]))
            return super()._losses(model, x)

    selector = make(make_backend(cls=Recording), score_length=3, score_micro_batch_size=5)
    selector.select(batch(0), 0)
    assert set(seen[1:]) == {(False, 3)}
    seen.clear()
    selector.select(batch(1), 1)
    assert seen == [(True, 4)] + [(False, 3)] * 6  # the proxy once; 12 candidates in fives, on two sides


@pytest.mark.parametrize("method", ["high_ppl", "low_ppl", "mid_ppl"])
def test_picks_by_the_candidates_own_loss(method: str) -> None:
    selector = make(method=method)
    x = batch(3)
    losses = selector.backend.losses(TensorCandidates(x))
    order = {
        "high_ppl": losses.argsort(descending=True),
        "low_ppl": losses.argsort(),
        "mid_ppl": (losses - losses.median()).abs().argsort(),
    }[method]
    assert set(selector.select(x, 0).indices.tolist()) == set(order[:K].tolist())


def test_the_oracle_of_domains_takes_what_is_wanted_first_and_the_rest_by_chance() -> None:
    wanted = torch.zeros(N, dtype=torch.bool)
    wanted[[1, 4]] = True
    config = SelectionConfig(method="domain_oracle", guards=UNGUARDED)
    selector = Selector(config, make().backend, num_selected=K, proxy=None, seed=0, wanted=lambda candidates: wanted)
    picks = [set(selector.select(batch(0), step).indices.tolist()) for step in range(8)]
    assert all({1, 4} <= pick for pick in picks)
    assert len({frozenset(pick) for pick in picks}) > 1
    with pytest.raises(ValueError, match="pass wanted="):
        Selector(config, make().backend, num_selected=K, proxy=None, seed=0)


def test_greats_is_greedy_by_raw_gradients_less_their_overlap() -> None:
    greats = make(method="greats", estimator="exact", utilities="raw", redundancy=1.0)
    x = batch(2)
    backend = greats.backend
    rate = backend.optimizers[0].param_groups[0]["lr"]
    rows = torch.stack([torch.cat([g.flatten() for g in each.values()]) for each in backend.exact_gradients(x)])
    target = torch.cat([g.double().flatten() for g in backend.gradient(TensorCandidates(proxy(0))).values()])
    left, picked = rate * rows @ target, []
    for _ in range(K):
        best = int(left.argmax())
        picked.append(best)
        left = left - rate**2 * rows @ rows[best]
        left[picked] = -torch.inf
    assert set(greats.select(x, 0).indices.tolist()) == set(picked)


def test_windows_lie_where_they_should_and_only_scoring_sees_them() -> None:
    tokens = torch.arange(20).expand(N, 20) + 100 * torch.arange(N).unsqueeze(1)
    inner = TensorCandidates({"tokens": tokens, "weight": torch.ones(N)}, torch.arange(N) + 50)
    for window in ("random", "strided"):  # runs of neighbours, so that the label of each token is the next one
        found = Windowed(inner, window, 1, 0).batch(5)["tokens"]
        assert torch.equal(found - found[:, :1], torch.arange(5).expand(N, 5))
    starts = (found[:, 0] - tokens[:, 0]).sort().values  # strided: each of N equal stretches has about its share
    assert (starts - 16 * (torch.arange(N) + 0.5) / N).abs().max() < 2
    strided = Windowed(inner, "strided", 9, 3)
    assert torch.equal(strided.batch(5)["tokens"], found)  # whatever the step
    assert torch.equal(strided.take(torch.tensor([7, 2])).batch(5)["tokens"], found[[7, 2]])
    random = Windowed(inner, "random", 1, 0)
    found = random.batch(5)["tokens"]
    starts = found[:, 0] - tokens[:, 0]
    assert len(set(starts.tolist())) > 3
    assert starts.min() >= 0
    assert starts.max() <= 15
    assert torch.equal(random.take(torch.tensor([7, 2])).batch(5)["tokens"], found[[7, 2]])
    assert not torch.equal(Windowed(inner, "random", 1, 1).batch(5)["tokens"], found)
    assert torch.equal(random.batch()["tokens"], tokens)
    assert torch.equal(random.batch(5)["weight"], torch.ones(N))


@pytest.mark.parametrize("window", ["random", "strided"])
def test_utilities_of_a_window_are_those_of_candidates_cut_to_it(window: str) -> None:
    backend, x = make_backend(), batch(4)
    cut = Windowed(TensorCandidates(x, torch.arange(N)), window, 0, 0).batch(2)
    found = make(backend, score_length=2, score_window=window).select(x, 0).utilities
    expected = make(backend).select(cut, 0).utilities
    assert torch.equal(found, expected)


@pytest.mark.parametrize("gram", ["countsketch", "kronecker"])
def test_adjoint_and_the_sketches_of_its_gram_matrix_come_from_one_pass(gram: str) -> None:
    backend, x = make_backend(), batch(4)
    passes = []
    ghost_pass = backend.ghost_pass
    backend.ghost_pass = lambda *args, **kwargs: (passes.append(1), ghost_pass(*args, **kwargs))
    settings = {"estimator": "adjoint", "score_micro_batch_size": 16}
    diverse = make(backend, **settings, redundancy=0.5, gram=gram).select(x, 0)
    assert len(passes) == 1
    assert torch.equal(diverse.utilities, make(backend, **settings).select(x, 0).utilities)


# -- the check of predictions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", ["picks", "all"])
@pytest.mark.parametrize("estimator", ["exact", "directional", "adjoint"])
def test_plain_sgd_lowers_the_proxy_loss_as_predicted_to_first_order(estimator: str, drawn: str) -> None:
    """Ten times smaller steps are ten times nearer the prediction; "all": one update on the whole buffer."""
    errors = []
    for lr in (1e-3, 1e-4):
        torch.manual_seed(0)
        model = Net().double()
        backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=lr), loss)
        if estimator == "adjoint":  # which leaves biases out
            model.a.bias.requires_grad_(False)
            model.b.bias.requires_grad_(False)
        selector = make(backend, estimator=estimator, proxy_of=lambda step: proxy(step).double())
        x = batch(0).double()
        selection = selector.select(x, 7)
        predicted = selection.predicted_fall if drawn == "picks" else selection.uniform_fall
        before = selector.proxy_loss(7)
        train_step(backend, x[selection.indices] if drawn == "picks" else x)
        realised = before - selector.proxy_loss(7)
        errors.append(abs(realised / predicted - 1))
    assert selection.predicted_fall > selection.uniform_fall
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


def test_the_proxy_loss_is_the_mean_over_the_whole_batch() -> None:
    backend = make_backend()
    for size in (1, 3, 16):
        selector = make(backend, score_micro_batch_size=size, score_length=2)
        expected = loss(backend.module, proxy(3)).mean().item()
        assert selector.proxy_loss(3) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="method 'uniform' has no proxy"):
        make(backend, method="uniform", proxy_of=None).proxy_loss(0)


def test_a_check_is_due_only_where_the_proxy_chose() -> None:
    selector = make(check_every=3, warmup_steps=4)
    assert [selector.check_due(selector.select(batch(step), step)) for step in range(10)] == [
        step in (6, 9) for step in range(10)
    ]
    fresh = make(make_backend(0), check_every=3)  # falls back: the optimizer has no state
    assert not fresh.check_due(fresh.select(batch(6), 6))
    assert not selector.check_due(make(method="high_ppl").select(batch(6), 6))
    off = make()
    assert not any(off.check_due(off.select(batch(step), step)) for step in range(3))


@pytest.mark.parametrize("mode", ["predict", "cascade"])
def test_a_warm_up_with_a_prior_picks_by_it_and_scores_nothing(mode: str) -> None:
    prescreen = PrescreenConfig(mode=mode, slice=4, every=1)
    config = SelectionConfig(method="opus", warmup_steps=2, prescreen=prescreen, guards=UNGUARDED)
    read: list[int] = []

    def counted(step: int) -> Tensor:
        read.append(step)
        return proxy(step)

    traits: Any = LinearTraits()
    selector = Selector(config, make_backend(), num_selected=K, proxy=counted, seed=0, text_features=traits)
    for step in range(3):
        x = batch(step, 4 * N)
        selection = selector.select(TensorCandidates(x, torch.arange(4 * N) + 4 * N * step), step)
        best = traits.importance(selection.ids).topk(K).indices.sort().values
        if step < 2 or mode == "predict":
            assert torch.equal(selection.indices, best)
        assert (selection.utilities is not None) == (step == 2)
        assert selection.method == "opus"
    assert read == [2]
