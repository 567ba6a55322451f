"""The selector's rules: what is picked, when it falls back, what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megaopus.selection import ModuleBackend, Selection, SelectionConfig, Selector, TensorCandidates
from megaopus.selection.decide import Evidence, Key, decide
from megaopus.selection.scoring import Scores
from tests.unit.selection_net import UNGUARDED, K, N, Net, batch, loss, make, make_backend, proxy, sentences, train_step


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
    assert not selection.events
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
    config = {"method": "opus", "estimator": estimator, "layers": "linear", "epsilon": 1e-4, "proxy_half_life": 0.0}
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
        assert not selection.events
    with pytest.raises(AssertionError, match="read in warm-up"):
        selector.select(batch(5), 5)


def test_before_the_first_optimizer_step_picks_are_uniform_with_an_event() -> None:
    selection = make(make_backend(steps=0)).select(batch(0), 0)
    assert selection.method == "uniform"
    assert "no state yet" in sentences(selection)[0]


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
        assert sentences(selection) == [f"utility not finite: candidates [{step * N + 3}, {step * N + 8}]"]
        assert selection.utilities[[3, 8]].isfinite().sum() == 0
        assert selection.utilities.isfinite().sum() == N - 2


def test_too_few_finite_utilities_fall_back_to_the_whole_buffer() -> None:
    x = batch(0)
    x[: N - K + 1] = torch.nan
    selection = make().select(x, 0)
    assert selection.method == "uniform"
    assert selection.utilities.isfinite().sum() == K - 1
    assert len(selection.indices) == K
    assert any(f"only {K - 1} candidates have a finite utility" in event for event in sentences(selection))


def test_equal_utilities_are_drawn_uniformly_from_the_good_ones() -> None:
    backend = make_backend()
    backend.optimizers[0].param_groups[0]["lr"] = 0.0
    x = batch(0)
    x[:6] = torch.nan
    seen: set[int] = set()
    for step in range(12):
        selection = make(backend).select(x, step)
        assert selection.method == "uniform"
        assert "selection.fallback.learning_rate_zero" in [event.kind for event in selection.events]
        assert selection.ess == pytest.approx(6)
        seen |= set(selection.indices.tolist())
    assert seen == set(range(6, N))


def masked(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose first two positions carry no label: of nothing it is 0."""
    return (model(x) - x[..., :3].cos()).square().mean(2)[:, 2:].sum(1) / 2


def no_momentum(backend: ModuleBackend) -> None:
    muon = torch.optim.Muon([backend.module.a.weight, backend.module.b.weight], lr=0.1)
    for weight in muon.param_groups[0]["params"]:
        muon.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    backend.optimizers = [muon]


def no_rate(backend: ModuleBackend) -> None:
    backend.optimizers[0].param_groups[0]["lr"] = 0.0


CAUSES = {
    "learning_rate_zero": (no_rate, {}, "learning rate is 0"),
    "step_zero": (no_momentum, {"layers": "weight"}, "a step of 0 of the proxy gradient"),
    "proxy_gradient_zero": (None, {"proxy_of": lambda step: torch.zeros(6, 4, 5)}, "the proxy gradient is 0"),
    "no_scored_label": (None, {"score_length": 2}, "selection.score_length=2 too short"),
}


@pytest.mark.parametrize("estimator", ["directional", "adjoint"])
@pytest.mark.parametrize("cause", CAUSES)
def test_each_reason_for_equal_utilities_is_told_in_the_first_step(cause: str, estimator: str) -> None:
    spoil, settings, said = CAUSES[cause]
    backend = make_backend()
    if cause == "no_scored_label":
        backend.loss = masked
    if cause == "proxy_gradient_zero":
        backend.loss = lambda model, x: loss(model, x) * (x != 0).any(2).any(1)
    if spoil is not None:
        spoil(backend)
    selection = make(backend, estimator=estimator, **settings).select(batch(0), 0)
    assert selection.method == "uniform"
    assert [event.kind for event in selection.events] == [f"selection.fallback.{cause}"]
    assert said in sentences(selection)[0]


def test_a_loss_of_no_label_is_told_where_it_is_nan_and_by_methods_of_loss() -> None:
    def of_nothing(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x[..., :3].cos()).square().mean(2)[:, 2:].mean(1)

    for method in ("opus", "high_ppl"):
        for function in (masked, of_nothing):
            backend = make_backend()
            backend.loss = function
            selection = make(backend, method=method, score_length=2).select(batch(0), 0)
            assert selection.method == "uniform"
            assert "selection.fallback.no_scored_label" in [event.kind for event in selection.events]
            assert make(backend, method=method, score_length=3).select(batch(0), 0).method == method


@pytest.mark.parametrize("method", ["opus", "high_ppl"])
def test_losses_that_are_nan_for_another_cause_are_not_taken_for_masked_labels(method: str) -> None:
    """The weights, the inputs, or what the model makes of ordinary ones; a mask is a mask whatever they are."""

    def weights_of(value: float) -> ModuleBackend:
        backend = make_backend()
        with torch.no_grad():
            backend.module.b.bias.fill_(value)
        backend.gradient = lambda *args: {name: torch.ones_like(p) for name, p in backend.parameters().items()}
        return backend

    cases = {"weights": (weights_of(torch.nan), batch(0)), "inputs": (make_backend(), batch(0) * torch.nan)}
    cases["too large"] = (weights_of(1e30), batch(0))
    for backend, x in cases.values():
        selection = make(backend, method=method).select(x, 0)
        assert selection.method == "uniform"
        kinds = [event.kind for event in selection.events if event.kind != "selection.utility_not_finite"]
        assert kinds == ["selection.fallback.losses_not_finite"]
        backend.loss = lambda model, x: loss(model, x[:, 4:])  # the mean of no position
        selection = make(backend, method=method).select(x, 0)
        kinds = [event.kind for event in selection.events if event.kind != "selection.utility_not_finite"]
        assert kinds == ["selection.fallback.no_scored_label"]


def test_an_optimizer_that_never_steps_is_told_from_one_that_has_not_yet() -> None:
    backend = make_backend(steps=0)
    selector = make(backend)
    kinds = [selector.select(batch(step), step).events[0].kind for step in range(3)]
    assert [kind.rpartition(".")[2] for kind in kinds] == ["no_optimizer_state", *["optimizer_never_steps"] * 2]
    assert "is it the one that trains" in sentences(selector.select(batch(3), 3))[0]
    train_step(backend, batch(0))
    assert selector.select(batch(4), 4).method == "opus"


def test_a_bad_proxy_gradient_is_not_averaged_in() -> None:
    backend = make_backend()

    def sometimes_bad(step: int) -> Tensor:
        return proxy(step) * torch.nan if step == 1 else proxy(step)

    selector, clean = make(backend, proxy_half_life=7.0, proxy_of=sometimes_bad), make(backend, proxy_half_life=7.0)
    selector.select(batch(0), 0)
    clean.select(batch(0), 0)
    bad = selector.select(batch(1), 1)
    assert bad.method == "uniform"
    assert "proxy gradient is not finite" in sentences(bad)[0]
    assert torch.equal(selector.select(batch(2), 2).utilities, clean.select(batch(2), 2).utilities)
    assert selector.state_dict()["count"] == 2


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_proxy_gradient_s_weight_halves_in_training_steps(every: int) -> None:
    backend, half_life = make_backend(), 2.5
    selector = make(backend, proxy_half_life=half_life, proxy_every=every)
    for step in range(7):
        selector.select(batch(step), step)
    taken = range(0, 7, every)
    gradients = torch.stack([backend.gradient(TensorCandidates(proxy(step)))["b.weight"] for step in taken])
    weights = torch.tensor([0.5 ** ((taken[-1] - step) / half_life) for step in taken])
    expected = torch.einsum("n...,n->...", gradients, weights / weights.sum())
    torch.testing.assert_close(selector._scorer._average.last()["b.weight"], expected)
    first = make(backend, proxy_half_life=0.5).select(batch(0), 0).utilities  # one gradient: no bias towards zero
    torch.testing.assert_close(first, make(backend).select(batch(0), 0).utilities, rtol=1e-3, atol=1e-6)


def run(selector: Selector, steps: range) -> list[Selection]:
    found = []
    for step in steps:
        selection = selector.select(batch(step), step)
        train_step(selector.backend, batch(step)[selection.indices])
        found.append(selection)
    return found


def test_resume_is_bitwise() -> None:
    settings = {"proxy_half_life": 7.0, "sampler": "boltzmann", "warmup_steps": 2}
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
    selector = make(proxy_half_life=0.0, score_micro_batch_size=4)
    selector.select(batch(0), 0)
    assert selector.state_dict().keys() == {"estimator"}


def test_a_state_of_fewer_weights_than_the_models_is_refused() -> None:
    selector = make(proxy_half_life=1.0)
    name, weight = next(iter(selector.backend.parameters().items()))
    selector.load_state_dict({"count": 1, "average": {name: weight}})
    with pytest.raises(ValueError, match="other parameters than the model's"):
        selector.select(batch(0), 0)


@pytest.mark.parametrize(("spread", "told"), [(0.05, True), (0.9, False)])
def test_the_event_of_uniform_draws_goes_by_the_picks_and_not_by_the_largest_probability(
    spread: float, told: bool
) -> None:
    """Two raw utilities lie apart in 64, as in real runs; the share of picks against draws of another generator."""
    utilities = spread * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    utilities[:2] = torch.tensor([0.7, -0.7])
    config = SelectionConfig(method="high_ppl", sampler="boltzmann", utilities="raw", temperature=0.9, guards=UNGUARDED)
    evidence = Evidence(ids=torch.arange(64), score=lambda positions: Scores(utilities=utilities))
    choices = [decide(evidence, config, Key(0, step), 32) for step in range(40)]
    assert choices[0].max_p_ratio > 1.8
    shares = [event.facts["share"] for choice in choices for event in choice.events]
    assert (len(shares) == 40) if told else not shares
    torch.manual_seed(1)
    noise = torch.distributions.Gumbel(0.0, 1.0).sample((4000, 64)).double()
    pairs = zip((noise + utilities / 0.9).topk(32)[1].tolist(), noise.topk(32)[1].tolist(), strict=True)
    changed = [len(set(picked) - set(blind)) for picked, blind in pairs]
    assert (sum(changed) / 4000 / 32 < 0.1) == told
    if told:
        assert sum(shares) / 40 == pytest.approx(sum(changed) / 4000 / 32, abs=0.01)


def test_raw_utilities_at_the_papers_temperature_are_practically_uniform() -> None:
    backend = make_backend()
    backend.optimizers[0].param_groups[0]["lr"] = 1e-4  # utilities of a real run are of this order
    raw = make(backend, utilities="raw", sampler="boltzmann", temperature=0.9)
    first, second = raw.select(batch(0), 0), raw.select(batch(1), 1)
    assert first.method == "opus"
    assert first.max_p_ratio < 1.01
    assert first.ess > 0.999 * N
    assert "they decide 0% of the picks, so sampling is practically uniform" in sentences(first)[0]
    assert not second.events  # said once
    standardised = make(backend, sampler="boltzmann", temperature=0.9).select(batch(0), 0)
    assert standardised.max_p_ratio > 2
    assert standardised.ess < 0.7 * N
    assert not standardised.events
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


@pytest.mark.parametrize(
    ("settings", "num_selected", "message"),
    [
        ({"temperature": 0.0}, K, "temperature=0.0: must be positive"),
        ({"layers": "("}, K, "is no regular expression"),
        ({"score_length": 1}, K, "one token predicts no other"),
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
