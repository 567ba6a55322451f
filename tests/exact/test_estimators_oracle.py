"""Estimators against float64 per-sample gradients, on a small GPT trained for 150 steps on real text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megaopus.selection import (
    CountSketch,
    CountSketchEstimator,
    Gradient,
    KroneckerEstimator,
    ModuleBackend,
    Request,
    SelectionConfig,
    UpdateOperator,
    adjoint_utilities,
    directional_utilities,
    exact_utilities,
)
from megaopus.selection.estimators.exact import exact_estimate
from megaopus.selection.estimators.kronecker import rank_one
from megaopus.selection.estimators.layers import ghost_layers
from megaopus.selection.estimators.registry import ESTIMATORS, EVERY_LAYER
from tests.exact.estimators_toy import ALL_OPTIMIZERS, buffer, proxy, real_falls, slope, spearman, train

OPERATORS = [*((name, "paper") for name in ALL_OPTIMIZERS), *((name, "full") for name in ("muon", "namo", "namo_d"))]


class Trained(dict[str, ModuleBackend]):
    """Optimizer -> a model after 150 steps, trained when it is first asked for."""

    def __missing__(self, name: str) -> ModuleBackend:
        self[name] = train(name, steps=150)
        return self[name]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@contextmanager
def rate(backend: ModuleBackend, lr: float) -> Iterator[None]:
    """The first group's learning rate is ``lr`` inside, those of the others in proportion."""
    groups = [group for each in backend.optimizers for group in each.param_groups]
    before = [group["lr"] for group in groups]
    for group, own in zip(groups, before, strict=True):
        group["lr"] = own * lr / before[0]
    yield
    for group, own in zip(groups, before, strict=True):
        group["lr"] = own


@pytest.mark.parametrize(("optimizer", "muon_operator"), OPERATORS)
def test_directional_ranks_like_the_exact_full_alignment(trained, optimizer, muon_operator) -> None:
    """At a learning rate of 1e-6, in 16 bits too: utilities are linear in it, so that the oracle's order stays."""
    backend, candidates = trained[optimizer], buffer(12 if muon_operator == "full" else 48, seed=1)
    gradient = backend.gradient(proxy(0))
    operator = backend.operator(muon_operator).bounded(gradient)
    exact = exact_utilities(backend, candidates, operator, gradient)
    assert exact.std() > 1e-3  # worth ranking
    for low in (False, True)[: 1 + (muon_operator == "paper")]:
        with rate(backend, 1e-6), torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            slower = backend.operator(muon_operator).bounded(gradient)
            central = directional_utilities(backend, candidates, slower, gradient)
        assert spearman(central, exact) >= (0.99 if low else 0.999), low  # at 1e-3 too; measured: 0.992 and more
    one_sided = directional_utilities(backend, candidates, operator, gradient, sides="one", epsilon=0.1)
    assert spearman(one_sided, exact) >= 0.99


LONG_STEPS = ("adafactor", "sgd", "sgd_sai")
"""Of these the toy's steps are so long that the loss bends on the way; docs/optimizers.md has the figures."""


@pytest.mark.parametrize(("optimizer", "muon_operator"), OPERATORS)
def test_the_operator_ranks_like_the_optimizers_real_step_in_a_batch(trained, optimizer, muon_operator) -> None:
    backend, candidates, wanted = trained[optimizer], buffer(12, seed=1), proxy(0).take(torch.arange(12))
    gradient = backend.gradient(wanted)
    operator = backend.operator(muon_operator).bounded(gradient)
    utilities = directional_utilities(backend, candidates, operator, gradient)
    real, linear = real_falls(backend, optimizer, candidates, buffer(7, seed=70).batch(), wanted.batch())
    assert spearman(utilities, linear) > 0.75
    assert 0.6 < slope(linear, utilities) < (4 if optimizer == "lion" else 2)  # no utility is out of scale
    assert spearman(utilities, real) > (-1 if optimizer in LONG_STEPS else 0.6)


@pytest.mark.parametrize("name", ESTIMATORS.names())
@pytest.mark.parametrize("redundancy", [0.0, 0.5])
def test_every_estimator_ranks_like_the_exact_alignment_of_what_it_covers(trained, name, redundancy) -> None:
    """And its updates, or sketches of them, have the inner products of the exact ones, about."""
    backend, candidates = trained["adamw"], buffer(24, seed=4)
    gradient, operator = backend.gradient(proxy(0)), backend.operator()
    config = SelectionConfig(method="opus", estimator=name, redundancy=redundancy)
    estimator = ESTIMATORS.find(name).make(config)
    given = {"backend": backend, "candidates": candidates, "operator": operator, "proxy_gradient": gradient}
    passes = {"length": None, "micro_batch_size": 10}
    parts, rows = estimator.estimate(Request(**given, **passes, keep_updates=redundancy > 0))
    covered = list(dict.fromkeys(getattr(use, "parameter", use) for use in estimator.uses(backend, gradient)))
    assert spearman(parts, exact_utilities(*given.values(), parameters=covered)) > 0.8
    assert (rows is not None) == (redundancy > 0)
    if rows is not None:
        linear = covered if name == "exact" else {layer.parameter for layer in ghost_layers(backend, "linear")}
        _, updates = exact_estimate(*given.values(), parameters=linear, keep_updates=True)
        flat = torch.cat(list(rows.values()), 1).double()
        found, expected = ((values @ values.t()).flatten() for values in (flat, updates))
        assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.8


def test_directional_error_is_of_second_order_in_epsilon(trained) -> None:
    model64 = train("adamw", steps=20)
    model64.module.double()
    candidates, gradient, operator = buffer(6, seed=1), model64.gradient(proxy(0)), model64.operator()
    exact = exact_utilities(model64, candidates, operator, gradient)
    errors = [
        (directional_utilities(model64, candidates, operator, gradient, epsilon=e) - exact).abs().max()
        for e in (0.04, 0.02)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] < 1e-2 * exact.std()


@pytest.mark.parametrize(("optimizer", "muon_operator"), OPERATORS[: len(ALL_OPTIMIZERS) + 1])
def test_countsketch_ranks_like_the_exact_alignment_of_its_layers(trained, optimizer, muon_operator) -> None:
    backend, candidates = trained[optimizer], buffer(12 if muon_operator == "full" else 48, seed=1)
    gradient, operator = backend.gradient(proxy(0)), backend.operator(muon_operator)
    if optimizer in ("lion", "sophia_g"):  # frozen, a few entries with denominators near zero hold all of P g
        operator = operator.bounded(gradient)
    estimator = CountSketchEstimator(8192, seed=42)
    linear = {layer.parameter for layer in estimator.layers(backend)}
    exact = exact_utilities(backend, candidates, operator, gradient, parameters=linear)
    estimate, _ = estimator.estimate(backend, candidates, operator, gradient, micro_batch_size=10)
    assert spearman(estimate, exact) >= 0.95
    assert (estimate - exact).std() < (0.35 if optimizer == "sophia_g" else 0.2) * exact.std()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "namo_d", "conda"])
def test_countsketch_is_unbiased_over_seeds_in_alignment_and_gram(trained, optimizer) -> None:
    backend, candidates = trained[optimizer], buffer(6, seed=2)
    gradient, operator = backend.gradient(proxy(0)), backend.operator()
    estimators = [CountSketchEstimator(256, seed) for seed in range(48)]
    linear = [layer.parameter for layer in estimators[0].layers(backend)]
    exact, updates = exact_estimate(
        backend, candidates, operator, gradient, parameters=dict.fromkeys(linear), keep_updates=True
    )
    found = [e.estimate(backend, candidates, operator, gradient, keep_sketches=True) for e in estimators]
    apart, summed = [torch.cat(list(kept.values()), 1) for _, kept in found], [sum(kept.values()) for _, kept in found]
    grams = [torch.stack([rows.double() @ rows.double().t() for rows in kept]) for kept in (apart, summed)]
    truth = updates @ updates.t()
    for estimates, truth in ((torch.stack([u for u, _ in found]), exact), *((gram, truth) for gram in grams)):
        standard_error = estimates.std(0) / len(found) ** 0.5
        assert standard_error.max() > 0
        deviation = ((estimates.mean(0) - truth) / standard_error).abs()
        assert deviation.max() < 4  # the largest of 6 (or 21) numbers of standard normal size
        assert deviation.mean() < 1.5
        few = (estimates[:3].mean(0) - truth).abs().mean()
        assert (estimates.mean(0) - truth).abs().mean() < few
    gram, squares = updates @ updates.t(), updates.square()
    norms = gram.diagonal()
    stated = (
        torch.outer(norms, norms) + gram.square() - 2 * squares @ squares.t()
    ) / 256  # of one sketch of all layers
    noise = [(each.var(0) / stated).mean() for each in grams]
    assert noise[1] == pytest.approx(1, abs=0.3)
    assert 1 / len(linear) < noise[0] < 1  # a sketch of each layer is as many times the numbers


@pytest.mark.parametrize("make", [CountSketchEstimator, KroneckerEstimator])
def test_a_sketch_summed_over_layers_has_the_products_of_all_pairs_of_layers(trained, make) -> None:
    """In float64, micro-batch by micro-batch into one tensor; alignments are layer by layer all the same."""
    backend, candidates = copy.deepcopy(trained["adamw"]), buffer(9, seed=2)
    backend.module.double()
    given = (backend, candidates, backend.operator(), backend.gradient(proxy(0)))
    (parts, apart), (same, summed) = (
        make(128, 42, "linear", summed).estimate(*given, keep_sketches=True, micro_batch_size=4)
        for summed in (False, True)
    )
    assert len(apart) == 9
    (rows,) = summed.values()
    assert list(summed) == [EVERY_LAYER]
    assert (rows.shape, rows.dtype) == ((9, 128), torch.float64)
    pairs = sum(one @ other.t() for one in apart.values() for other in apart.values())
    torch.testing.assert_close(rows @ rows.t(), pairs, rtol=1e-12, atol=0)
    own = sum(one @ one.t() for one in apart.values())
    assert (pairs - own).norm() > 0.01 * own.norm()  # those of two different layers are noise
    assert torch.equal(parts, same)


def test_sketch_inner_products_have_the_stated_mean_and_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    y += 0.5 * x
    dim, seeds = 64, 2000
    products = []
    for seed in range(seeds):
        sketch = CountSketch("layer", torch.arange(300), dim, seed)
        products.append((sketch(x[None]) * sketch(y[None])).sum())
    products = torch.stack(products)
    variance = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x * x) @ (y * y)) / dim
    assert abs(products.mean() - x @ y) < 3 * (variance / seeds) ** 0.5
    assert products.var() == pytest.approx(float(variance), rel=0.1)


def test_sketches_of_shards_add_up_to_the_sketch_of_the_whole() -> None:
    x, factor = torch.randn(3, 40, 10), torch.rand(40, 10)
    indices = torch.arange(400).view(40, 10)
    whole = CountSketch("w", indices.flatten(), 32, 7)(x.flatten(1), factor.flatten())
    for axis in (0, 1):  # rows, then columns
        shards = zip(x.chunk(2, axis + 1), factor.chunk(2, axis), indices.chunk(2, axis), strict=True)
        parts = [CountSketch("w", i.flatten(), 32, 7)(part.flatten(1), f.flatten()) for part, f, i in shards]
        torch.testing.assert_close(parts[0] + parts[1], whole)
    assert not torch.equal(CountSketch("v", indices.flatten(), 32, 7)(x.flatten(1)), whole)


def test_the_sign_says_following_the_proxy_lowers_the_loss(trained) -> None:
    backend = trained["adamw"]
    operator, gradient = backend.operator(), backend.gradient(proxy(3))
    own = directional_utilities(backend, proxy(3), operator, gradient)
    assert own.mean() > 0
    uphill = directional_utilities(backend, proxy(3), operator, {name: -g for name, g in gradient.items()})
    torch.testing.assert_close(uphill, -own)


@pytest.mark.parametrize("optimizer", ALL_OPTIMIZERS)
@pytest.mark.parametrize("layers", ["linear", "all", "blocks.1"])
def test_adjoint_is_the_exact_alignment_of_its_layers(trained, optimizer, layers) -> None:
    backend, candidates = trained[optimizer], buffer(9, seed=3)
    gradient, operator = backend.gradient(proxy(0)), backend.operator()
    names = {layer.parameter for layer in ghost_layers(backend, layers)}
    exact = exact_utilities(backend, candidates, operator, gradient, parameters=names)
    found = adjoint_utilities(backend, candidates, operator, gradient, layers=layers, micro_batch_size=4)
    assert exact.std() > 0
    assert (found - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize(
    ("optimizer", "muon_operator"),
    [*((name, "paper") for name in ("adamw", "muon", "sgd", "sophia_g")), ("muon", "full")],
)
def test_kronecker_is_unbiased_but_for_the_fold_of_a_diagonal(trained, optimizer, muon_operator) -> None:
    backend, candidates = trained[optimizer], buffer(6, seed=2)
    gradient, operator = backend.gradient(proxy(0)), backend.operator(muon_operator)
    names = {layer.parameter for layer in ghost_layers(backend, "linear")}
    exact = exact_utilities(backend, candidates, folded(backend, operator), gradient, parameters=names)
    few = muon_operator == "full" or optimizer == "sophia_g"  # no factors to fold: every gradient is made; time
    seeds = 8 if few else 48
    found = torch.stack(
        [KroneckerEstimator(256, s).estimate(backend, candidates, operator, gradient)[0] for s in range(seeds)]
    )
    deviation = (found.mean(0) - exact) / (found.std(0) / seeds**0.5)
    assert found.std(0).max() > 0
    assert deviation.abs().max() < 4


def folded(backend: ModuleBackend, operator: UpdateOperator) -> UpdateOperator:
    """The operator with each full diagonal replaced by its rank-1 fit."""

    class Folded:
        def apply(self, gradient: Gradient) -> Gradient:
            applied = operator.apply(gradient)
            for name, value in gradient.items():
                factor = operator.diagonal(name)
                if factor is not None and factor.ndim == 2:
                    rows, columns = rank_one(backend, name, factor)
                    applied[name] = value * rows.unsqueeze(1) * columns
            return applied

    return Folded()


@pytest.mark.parametrize("zeros", [(0.3, 0), (0, 2), (1, 0)], ids=["some", "a row and a column", "all"])
def test_the_rank_one_fit_of_a_factor_with_zeros_has_its_row_and_column_sums(trained, zeros) -> None:
    """As Sophia's, which is 0 where the update is clipped: a weight that moves nowhere takes no other's step away."""
    share, line = zeros
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(5, 7, generator=generator, dtype=torch.float64) + 0.1
    factor *= torch.rand(5, 7, generator=generator) >= share
    if line:
        factor[line] = factor[:, line] = 0
    fit = torch.outer(*rank_one(trained["adamw"], "none", factor))
    torch.testing.assert_close(fit.sum(0), factor.sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(fit.sum(1), factor.sum(1), rtol=1e-12, atol=0)


def test_the_rank_one_fit_is_exact_for_a_product_and_ranks_like_the_oracle(trained) -> None:
    backend, candidates = trained["adamw"], buffer(24, seed=5)
    rows, columns = torch.rand(5) + 0.1, torch.rand(7) + 0.1
    fit = torch.outer(*rank_one(backend, "none", torch.outer(rows, columns)))
    torch.testing.assert_close(fit, torch.outer(rows, columns))
    gradient, operator = backend.gradient(proxy(0)), backend.operator()
    names = {layer.parameter for layer in ghost_layers(backend, "linear")}
    exact = exact_utilities(backend, candidates, operator, gradient, parameters=names)
    found, _ = KroneckerEstimator(8192, 42).estimate(backend, candidates, operator, gradient)
    assert spearman(found, exact) > 0.8


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "namo_d", "conda"])
def test_alignments_without_sketches_are_those_with_them(trained, optimizer) -> None:
    backend, candidates = trained[optimizer], buffer(9, seed=3)
    gradient, operator = backend.gradient(proxy(0)), backend.operator()
    estimator = CountSketchEstimator(512, 42, "all")
    carried, none = estimator.estimate(backend, candidates, operator, gradient)
    sketched, kept = estimator.estimate(backend, candidates, operator, gradient, keep_sketches=True)
    assert none is None
    assert kept is not None
    assert (carried - sketched).norm() < 5e-4 * sketched.norm()
