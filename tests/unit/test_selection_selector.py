"""The selector's rules: what is picked, when it falls back, what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaopus.selection import ModuleBackend, Selection, SelectionConfig, Selector, TensorCandidates
from megaopus.selection.candidates import Windowed
from megaopus.selection.config import GuardConfig, PrescreenConfig
from tests.unit.test_selection_prescreen import LinearTraits

N, K = 12, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[..., :3].cos()).square().mean((1, 2))


def batch(seed: int, count: int = N) -> Tensor:
    return torch.randn(count, 4, 5, generator=torch.Generator().manual_seed(seed))


def proxy(step: int) -> Tensor:
    return batch(1000 + step, 6)


def train_step(backend: ModuleBackend, x: Tensor) -> None:
    for optimizer in backend.optimizers:
        optimizer.zero_grad()
    loss(backend.module, x).mean().backward()
    for optimizer in backend.optimizers:
        optimizer.step()


def make_backend(steps: int = 3, cls: type[ModuleBackend] = ModuleBackend) -> ModuleBackend:
    torch.manual_seed(0)
    model = Net()
    backend = cls(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loss)
    for step in range(steps):
        train_step(backend, batch(2000 + step))
    return backend


UNGUARDED = GuardConfig(exposure_cap=0, min_ess=0, min_distinct=0, min_unique=0)


def make(backend: ModuleBackend | None = None, *, seed: int = 0, proxy_of=proxy, **settings) -> Selector:
    config = SelectionConfig(**{"method": "opus", "sketch_dim": 256, "proxy_ema": 0.0, "guards": UNGUARDED, **settings})
    return Selector(config, backend or make_backend(), num_selected=K, proxy=proxy_of, seed=seed)


def test_top_k_picks_the_largest_utilities_and_reports_them() -> None:
    selection = make().select(batch(0), 7)
    assert selection.method == "opus"
    assert selection.step == 7
    assert selection.indices.tolist() == selection.utilities.topk(K).indices.sort().values.tolist()
    assert selection.ids.tolist() == list(range(7 * N, 8 * N))
    assert selection.picked_ids.tolist() == [7 * N + i for i in selection.indices.tolist()]
    assert selection.utilities.dtype == torch.float64
    assert selection.indices.dtype == torch.int64
    z = (selection.utilities - selection.utilities.mean()) / selection.utilities.std(correction=0)
    p = torch.softmax(z / 0.9, 0)
    assert selection.ess == pytest.approx(float(1 / (p * p).sum()))
    assert selection.max_p_ratio == pytest.approx(float(p.max()) * N)
    assert selection.events == []
    assert selection.seconds > 0


@pytest.mark.parametrize("estimator", ["directional", "countsketch"])
def test_estimators_agree_with_the_oracle(estimator: str) -> None:
    backend = make_backend()
    x = batch(0)
    oracle = make(backend, estimator="exact").select(x, 0).utilities
    found = make(backend, estimator=estimator, sketch_dim=8192).select(x, 0).utilities
    assert torch.corrcoef(torch.stack([oracle, found]))[0, 1] > 0.95


@pytest.mark.parametrize("estimator", ["directional", "adjoint", "exact"])
def test_contrast_takes_off_what_helps_any_text(estimator: str) -> None:
    """The utility against the proxy less that against the batch of the pool, for a P_t that is a number."""
    torch.manual_seed(0)
    model = Net().double()
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=1e-2), loss)
    config = {"method": "opus", "estimator": estimator, "layers": "linear", "epsilon": 1e-4, "proxy_ema": 0.0}
    x, parts = batch(0).double(), {"proxy": proxy(0).double(), "pool": batch(5, 6).double()}

    def utilities(contrast: bool, **batches: Tensor) -> Tensor:
        given = {name: lambda step, value=value: value for name, value in batches.items()}
        selector = Selector(SelectionConfig(contrast=contrast, **config), backend, num_selected=K, seed=0, **given)
        return selector.select(x, 0).utilities

    expected = utilities(False, proxy=parts["proxy"]) - utilities(False, proxy=parts["pool"])
    torch.testing.assert_close(utilities(True, **parts), expected, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="pass pool="):
        utilities(True, proxy=parts["proxy"])


def test_uniform_needs_no_proxy_and_depends_on_seed_and_step_only() -> None:
    config = SelectionConfig()

    def picks(seed: int, step: int, ids: Tensor) -> list[int]:
        selector = Selector(config, make_backend(0), num_selected=K, proxy=None, seed=seed)
        selection = selector.select(TensorCandidates(batch(0), ids), step)
        assert (selection.method, selection.utilities, selection.ess) == ("uniform", None, pytest.approx(N))
        assert selection.max_p_ratio == pytest.approx(1)
        return selection.picked_ids.tolist()

    ids = torch.arange(N) + 50
    assert picks(0, 0, ids) == picks(0, 0, ids)
    assert picks(0, 0, ids) != picks(1, 0, ids) != picks(0, 1, ids)
    assert sorted(picks(0, 0, ids)) == sorted(picks(0, 0, ids.flip(0)))


def test_warm_up_is_uniform_and_does_not_read_the_proxy() -> None:
    def no_proxy(step: int) -> Tensor:
        raise AssertionError("read in warm-up")

    backend = make_backend()
    selector = make(backend, warmup_steps=5, proxy_of=no_proxy)
    uniform = make(backend, method="uniform")
    for step in range(5):
        selection = selector.select(batch(step), step)
        assert selection.method == "uniform"
        assert selection.indices.tolist() == uniform.select(batch(step), step).indices.tolist()
        assert selection.events == []
    with pytest.raises(AssertionError, match="read in warm-up"):
        selector.select(batch(5), 5)


def test_before_the_first_optimizer_step_picks_are_uniform_with_an_event() -> None:
    selection = make(make_backend(steps=0)).select(batch(0), 0)
    assert selection.method == "uniform"
    assert "no state yet" in selection.events[0]


def test_high_ppl_picks_the_largest_losses() -> None:
    backend = make_backend()
    selector = Selector(SelectionConfig(method="high_ppl"), backend, num_selected=K, proxy=None, seed=0)
    selection = selector.select(batch(0), 0)
    losses = loss(backend.module, batch(0)).detach()
    assert selection.method == "high_ppl"
    assert selection.indices.tolist() == losses.topk(K).indices.sort().values.tolist()
    torch.testing.assert_close(selection.utilities, losses.double())


@pytest.mark.parametrize("estimator", ["directional", "countsketch", "exact"])
@pytest.mark.parametrize("sampler", ["top_k", "boltzmann"])
def test_a_nan_candidate_is_never_picked(estimator: str, sampler: str) -> None:
    x = batch(0)
    x[3, 1, 2] = torch.nan
    x[8] = torch.inf
    backend = make_backend()
    for step in range(3):
        selection = make(backend, estimator=estimator, sampler=sampler).select(x, step)
        assert selection.method == "opus"
        assert not {3, 8} & set(selection.indices.tolist())
        assert selection.events == [f"utility not finite: candidates [{step * N + 3}, {step * N + 8}]"]
        assert selection.utilities[[3, 8]].isfinite().sum() == 0
        assert selection.utilities.isfinite().sum() == N - 2


def test_too_few_finite_utilities_fall_back_to_the_whole_buffer() -> None:
    x = batch(0)
    x[: N - K + 1] = torch.nan
    selection = make().select(x, 0)
    assert selection.method == "uniform"
    assert selection.utilities.isfinite().sum() == K - 1
    assert len(selection.indices) == K
    assert any(f"only {K - 1} candidates have a finite utility" in event for event in selection.events)


def test_equal_utilities_are_drawn_uniformly_from_the_good_ones() -> None:
    backend = make_backend()
    backend.optimizers[0].param_groups[0]["lr"] = 0.0
    x = batch(0)
    x[:6] = torch.nan
    seen: set[int] = set()
    for step in range(12):
        selection = make(backend).select(x, step)
        assert selection.method == "uniform"
        assert "all utilities are equal" in selection.events[-1]
        assert selection.ess == pytest.approx(6)
        seen |= set(selection.indices.tolist())
    assert seen == set(range(6, N))


def test_a_bad_proxy_gradient_is_not_averaged_in() -> None:
    backend = make_backend()

    def sometimes_bad(step: int) -> Tensor:
        return proxy(step) * torch.nan if step == 1 else proxy(step)

    selector, clean = make(backend, proxy_ema=0.9, proxy_of=sometimes_bad), make(backend, proxy_ema=0.9)
    selector.select(batch(0), 0)
    clean.select(batch(0), 0)
    bad = selector.select(batch(1), 1)
    assert bad.method == "uniform"
    assert "proxy gradient is not finite" in bad.events[0]
    assert torch.equal(selector.select(batch(2), 2).utilities, clean.select(batch(2), 2).utilities)
    assert selector.state_dict()["count"] == 2


def test_the_running_proxy_gradient_is_a_weighted_mean() -> None:
    backend = make_backend()
    selector = make(backend, proxy_ema=0.75)
    for step in range(3):
        selector.select(batch(step), step)
    gradients = [backend.gradient(TensorCandidates(proxy(step)))["b.weight"] for step in range(3)]
    expected = sum(g * 0.25 * 0.75 ** (2 - i) for i, g in enumerate(gradients))
    torch.testing.assert_close(selector.state_dict()["average"]["b.weight"], expected)
    first = make(backend, proxy_ema=0.75).select(batch(0), 0).utilities  # one gradient: no bias towards zero
    torch.testing.assert_close(first, make(backend).select(batch(0), 0).utilities, rtol=1e-3, atol=1e-6)


def run(selector: Selector, steps: range) -> list[Selection]:
    found = []
    for step in steps:
        selection = selector.select(batch(step), step)
        train_step(selector.backend, batch(step)[selection.indices])
        found.append(selection)
    return found


def test_resume_is_bitwise() -> None:
    settings = {"proxy_ema": 0.9, "sampler": "boltzmann", "warmup_steps": 2}
    straight = make(make_backend(), **settings)
    expected = run(straight, range(8))

    first = make(make_backend(), **settings)
    assert first.state_dict() == {}
    run(first, range(5))
    saved = {"selector": first.state_dict(), "model": first.backend.module.state_dict()}
    saved |= {"optimizer": first.backend.optimizers[0].state_dict()}
    kept = {name: value.clone() for name, value in saved["selector"]["average"].items()}
    second = make(make_backend(), **settings)
    second.backend.module.load_state_dict(saved["model"])
    second.backend.optimizers[0].load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["selector"])
    for found, wanted in zip(run(second, range(5, 8)), expected[5:], strict=True):
        assert torch.equal(found.utilities, wanted.utilities)
        assert found.picked_ids.tolist() == wanted.picked_ids.tolist()
    assert all(torch.equal(saved["selector"]["average"][name], value) for name, value in kept.items())  # a copy


def test_no_average_means_no_state() -> None:
    selector = make(proxy_ema=0.0, score_micro_batch_size=4)
    selector.select(batch(0), 0)
    assert selector.state_dict() == {}


def test_a_state_of_another_model_is_refused() -> None:
    selector = make(proxy_ema=0.5)
    selector.load_state_dict({"count": 1, "average": {"c.weight": torch.ones(2)}})
    with pytest.raises(ValueError, match=r"other parameters than the model's.*c\.weight"):
        selector.select(batch(0), 0)


def test_raw_utilities_at_the_papers_temperature_are_practically_uniform() -> None:
    backend = make_backend()
    backend.optimizers[0].param_groups[0]["lr"] = 1e-4  # utilities of a real run are of this order
    raw = make(backend, utilities="raw", sampler="boltzmann", temperature=0.9)
    first, second = raw.select(batch(0), 0), raw.select(batch(1), 1)
    assert first.method == "opus"
    assert first.max_p_ratio < 1.01
    assert first.ess > 0.999 * N
    assert "practically uniform" in first.events[0]
    assert second.events == []  # said once
    standardised = make(backend, sampler="boltzmann", temperature=0.9).select(batch(0), 0)
    assert standardised.max_p_ratio > 2
    assert standardised.ess < 0.7 * N
    assert standardised.events == []
    torch.testing.assert_close(standardised.utilities, first.utilities)  # reported as estimated


@pytest.mark.parametrize("estimator", ["countsketch", "exact"])
@pytest.mark.parametrize("utilities", ["standardised", "raw"])
def test_redundancy_avoids_duplicates(estimator: str, utilities: str) -> None:
    backend = make_backend()
    plain = make(backend, estimator=estimator).select(batch(0), 0)
    best = int(plain.utilities.argmax())
    x = batch(0)
    others = [i for i in range(N) if i != best][:3]
    x[others] = x[best].clone()  # four copies of the best candidate
    without = make(backend, estimator=estimator).select(x, 0)
    assert {best, *others} == set(without.indices.tolist())
    coefficient = 50.0 if utilities == "standardised" else 1e4
    selector = make(backend, estimator=estimator, utilities=utilities, redundancy=coefficient)
    picked = set(selector.select(x, 0).indices.tolist())
    assert len(picked) == K
    assert len(picked & {best, *others}) < 4
    torch.testing.assert_close(selector.select(x, 0).utilities, without.utilities)


def test_exact_redundancy_follows_the_formula() -> None:
    backend = make_backend()
    x = batch(0)
    gradients = list(backend.exact_gradients(x))
    operator = backend.operator().bounded(backend.gradient(TensorCandidates(proxy(0))))
    rows = torch.stack([torch.cat([u.flatten() for u in operator.apply(g).values()]) for g in gradients])
    gram = rows @ rows.t()
    selection = make(backend, estimator="exact", redundancy=2.0).select(x, 0)
    z = (selection.utilities - selection.utilities.mean()) / selection.utilities.std(correction=0)
    picked: list[int] = []
    for _ in range(K):
        score = z - 2.0 / K * gram[:, picked].sum(1) / gram.diagonal().mean()
        score[picked] = -torch.inf
        picked.append(int(score.argmax()))
    assert selection.indices.tolist() == sorted(picked)


@pytest.mark.parametrize("redundancy", [0.0, 0.5])
def test_boltzmann_draws_differ_by_step_and_seed_and_repeat(redundancy: float) -> None:
    backend = make_backend()

    def picks(seed: int, step: int) -> list[int]:
        candidates = TensorCandidates(batch(0), torch.arange(N))
        settings = {"sampler": "boltzmann", "estimator": "countsketch", "redundancy": redundancy}
        return (
            make(backend, seed=seed, proxy_of=lambda _: proxy(0), **settings).select(candidates, step).indices.tolist()
        )

    assert picks(0, 0) == picks(0, 0)
    draws = {tuple(picks(seed, step)) for seed in range(3) for step in range(3)}
    assert len(draws) > 4


def test_scored_length_cuts_candidates_not_the_proxy() -> None:
    seen: list[tuple[bool, int]] = []

    class Recording(ModuleBackend):
        def _losses(self, model, x):
            seen.append((torch.is_grad_enabled(), x.shape[1]))
            return super()._losses(model, x)

    make(make_backend(cls=Recording), score_length=3, score_micro_batch_size=5).select(batch(0), 0)
    assert seen == [(True, 4)] + [(False, 3)] * 6  # the proxy once; 12 candidates in fives, on two sides


@pytest.mark.parametrize(
    ("settings", "num_selected", "message"),
    [
        ({"temperature": 0.0}, K, "temperature=0.0: must be positive"),
        ({"layers": "("}, K, "is no regular expression"),
        ({"score_micro_batch_size": 0}, K, "null finds it from the free memory"),
        ({"method": "high_ppl", "redundancy": 0.5}, K, "no Gram matrix"),
        ({}, 0, "num_selected=0"),
    ],
)
def test_unusable_settings_are_refused(settings, num_selected, message) -> None:
    config = SelectionConfig(**{"method": "opus", **settings})
    with pytest.raises(ValueError, match=message):
        Selector(config, make_backend(0), num_selected=num_selected, proxy=proxy, seed=0)


def test_opus_without_a_proxy_and_a_small_buffer_are_refused() -> None:
    with pytest.raises(ValueError, match="pass proxy="):
        make(proxy_of=None)
    with pytest.raises(ValueError, match=r"step 3: the buffer has 2 candidates, 4 are to be picked"):
        make().select(batch(0, 2), 3)


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
    strided = Windowed(inner, "strided", 1, 0).batch(5)["tokens"]
    assert torch.equal(strided, tokens[:, ::4])
    random = Windowed(inner, "random", 1, 0)
    found = random.batch(5)["tokens"]
    assert torch.equal(found - found[:, :1], torch.arange(5).expand(N, 5))
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
