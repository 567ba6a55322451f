"""Every optimizer: its update is its published formula in float64, its P_t the derivative of its own step."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaopus.optim.base import CurvatureOptimizer, LayoutOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import OPTIMIZERS, spec_of
from megaopus.optim.sgd_sai import SGDSaI
from megaopus.optim.sophia import SophiaG
from megaopus.selection import build_operator
from tests.unit.optim_references import REFERENCES, Reference

LR, WD, TOKENS = 0.05, 0.1, 40_000
CASES = {name: (name, LR) for name in OPTIMIZERS} | {
    f"{name}_at_{cls.also_at:g}": (name, cls.also_at) for name, cls in REFERENCES.items() if cls.also_at is not None
}
"""Every optimizer that is registered; case -> (name, learning rate)."""
STEPS = 7


def test_every_optimizer_has_a_reference() -> None:
    assert set(OPTIMIZERS) == set(REFERENCES)


def make(case: str, weights: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer as a run makes it."""
    name, lr = CASES[case]
    config = OptimConfig(name=name, lr=lr, matrix_lr=lr, **REFERENCES[name].optim)
    return spec_of(name).make([{"params": weights, "weight_decay": WD}], config, config.own_settings(), None)


def reference_of(case: str) -> type[Reference]:
    return REFERENCES[CASES[case][0]]


def trained(case: str) -> tuple[list[Tensor], torch.optim.Optimizer, list[Any]]:
    """Weights, their optimizer and references after STEPS updates, and a curvature estimate every third."""
    reference, lr = reference_of(case), CASES[case][1]
    shapes = reference.shapes
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=shape) for shape in shapes]
    expected = [reference(w=start, lr=lr, wd=WD) for start in starts]
    weights = [torch.nn.Parameter(torch.tensor(start)) for start in starts]
    optimizer = make(case, weights)
    for step in range(STEPS):
        if isinstance(optimizer, CurvatureOptimizer) and step % 3 == 0:
            gradients = [rng.normal(size=shape) for shape in shapes]
            set_gradients(weights, gradients)
            optimizer.estimate(TOKENS)
            for each, gradient in zip(expected, gradients, strict=True):
                each.estimate(gradient, TOKENS)
        gradients = [rng.normal(size=shape) * 10 ** rng.uniform(-3, 3) for shape in shapes]
        set_gradients(weights, gradients)
        optimizer.step()
        for each, gradient in zip(expected, gradients, strict=True):
            each.update(gradient)
    return weights, optimizer, expected


def set_gradients(weights: list[Tensor], gradients: list[np.ndarray]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = torch.tensor(gradient)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_the_formula_in_float64(case: str) -> None:
    weights, _, expected = trained(case)
    for weight, reference in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), reference.w, rtol=1e-9, atol=1e-9)


SCALED = [
    case for case, (name, _) in CASES.items() if "momentum_buffer" in spec_of(name).shaped and spec_of(name).matrices
]
OPERATORS = [*((case, "paper") for case in CASES), *((case, "full") for case in SCALED)]
"""(case, ``muon_operator``): every operator there is."""


def operator_of(case: str, muon_operator: str) -> tuple[dict[str, Tensor], torch.optim.Optimizer, Any, list[Reference]]:
    """(weights by name, their optimizer, its operator, references), after ``trained``."""
    weights, optimizer, references = trained(case)
    named = {str(index): weight for index, weight in enumerate(weights)}
    return named, optimizer, build_operator(named, [optimizer], muon_operator), references


def moved(optimizer: torch.optim.Optimizer, hold: Any, named: dict[str, Tensor], gradients: dict[str, Tensor]) -> Any:
    """Return what the optimizer's own step takes off each weight; weights and state are as before it then."""
    before, state = {n: w.detach().clone() for n, w in named.items()}, copy.deepcopy(optimizer.state_dict())
    for name, weight in named.items():
        weight.grad = gradients[name].clone()
        optimizer.param_groups[0]["weight_decay"] = 0.0  # no part of P_t
        hold(optimizer.state[weight], optimizer.param_groups[0], gradients[name])
    optimizer.step()
    found = {name: before[name] - weight.detach() for name, weight in named.items()}
    with torch.no_grad():
        for name, weight in named.items():
            weight.copy_(before[name])
    optimizer.load_state_dict(state)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_operator_is_the_derivative_of_the_optimizers_own_step(case: str) -> None:
    """By central differences in float64, its state held; Lion's sign has none but 0."""
    named, optimizer, operator, _ = operator_of(case, "full")
    reference, generator = reference_of(case), torch.Generator().manual_seed(1)
    plus, minus, given, counted = {}, {}, {}, 0
    for name, weight in named.items():
        at, size = reference.near(optimizer.state[weight])
        given[name] = size * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        plus[name], minus[name] = at + given[name], at - given[name]
    applied = operator.apply(given)
    ahead, back = (moved(optimizer, reference.hold, named, gradients) for gradients in (plus, minus))
    for name in named:
        derivative = (ahead[name] - back[name]) / 2
        counted += int(derivative.count_nonzero())
        if case != "lion":
            assert (applied[name] - derivative).norm() <= 1e-6 * derivative.norm()
    assert (counted == 0) if case == "lion" else (counted > 20)


@pytest.mark.parametrize("case", [case for case in CASES if reference_of(case).stated is not Reference.stated])
def test_an_operator_that_is_no_derivative_is_its_formula(case: str) -> None:
    named, _, operator, references = operator_of(case, "paper")
    for (name, weight), reference in zip(named.items(), references, strict=True):
        gradient = np.random.default_rng(1).normal(size=tuple(weight.shape))
        applied = operator.apply({name: torch.tensor(gradient)})[name].numpy()
        np.testing.assert_allclose(applied, reference.stated(gradient), rtol=1e-6, atol=1e-6 * np.abs(applied).max())


@pytest.mark.parametrize(("case", "muon_operator"), OPERATORS)
def test_transposed_is_the_adjoint(case: str, muon_operator: str) -> None:
    """And the same map, but for a derivative through a norm, and a tall NAMO-D."""
    named, _, operator, _ = operator_of(case, muon_operator)
    generator = torch.Generator().manual_seed(2)
    g, h = ({n: torch.randn(w.shape, generator=generator).double() for n, w in named.items()} for _ in range(2))
    pg, pth, ph = operator.apply(g), operator.transposed().apply(h), operator.apply(h)
    for name, weight in named.items():
        inner = float((pg[name] * h[name]).sum())
        assert inner == pytest.approx(float((g[name] * pth[name]).sum()), rel=1e-5, abs=1e-9)
        if muon_operator == "full":
            lopsided = case == "namo_d" or min(weight.shape) > 1
        else:
            lopsided = case == "namo_d" and weight.shape[0] > weight.shape[1]
        assert torch.allclose(ph[name], pth[name], rtol=1e-6) != lopsided


@pytest.mark.parametrize(("case", "muon_operator"), OPERATORS)
def test_factors_and_batches_say_what_apply_says(case: str, muon_operator: str) -> None:
    named, _, operator, _ = operator_of(case, muon_operator)
    for turned in (operator, operator.transposed()):
        g = {name: torch.randn(3, *weight.shape).double() for name, weight in named.items()}
        applied = turned.apply(g)
        for name in named:
            for row in range(3):
                torch.testing.assert_close(applied[name][row], turned.apply({name: g[name][row]})[name])
            if (factor := turned.diagonal(name)) is not None:
                torch.testing.assert_close(applied[name], g[name] * factor)
            elif (sides := turned.sides(name)) is not None:
                left, right = (None if side is None else side.double() for side in sides)
                found = g[name] if left is None else left @ g[name]
                torch.testing.assert_close(found if right is None else found @ right, applied[name])


BOUNDED = [name for name, cls in REFERENCES.items() if cls.longest_step is not Reference.longest_step]


@pytest.mark.parametrize("case", BOUNDED)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_bounded_operator_takes_no_step_that_the_optimizer_could_not(case: str, size: float) -> None:
    """State near zero, as of an embedding's row hardly ever seen; the gradient of any size."""
    weights, optimizer, references = trained(case)
    for weight in weights:
        for key in ("exp_avg", "exp_avg_sq", "hessian"):
            if key in optimizer.state[weight]:
                optimizer.state[weight][key][0] = 1e-30
    named = {str(index): weight for index, weight in enumerate(weights)}
    gradient = {name: size * torch.randn_like(weight) for name, weight in named.items()}
    applied = build_operator(named, [optimizer]).bounded(gradient).apply(gradient)
    for value, reference in zip(applied.values(), references, strict=True):
        assert value.isfinite().all()
        assert float(value.abs().max()) <= LR * reference.longest_step() * (1 + 1e-6)  # operators are fp32 inside


@pytest.mark.parametrize("case", CASES)
def test_no_step_is_known_before_the_first(case: str) -> None:
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in reference_of(case).shapes]
    optimizer = make(case, weights)
    named = {str(index): weight for index, weight in enumerate(weights)}
    operator = build_operator(named, [optimizer])
    if case == "sgd":  # its step needs no state
        assert operator is not None
        return
    assert operator is None
    if isinstance(optimizer, LayoutOptimizer):  # zeros, as a checkpoint's reader allocates them
        for weight in weights:
            optimizer.state_of(weight)
        operator = build_operator(named, [optimizer])
        ones = {name: torch.ones_like(weight) for name, weight in named.items()}
        assert operator is None or not any(value.any() for value in operator.apply(ones).values())


def test_sophia_knows_no_step_where_it_has_no_curvature() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = SophiaG([weight], lr=LR)
    weight.grad = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]])
    optimizer.estimate(TOKENS)
    optimizer.step()
    assert torch.equal(weight.detach()[0].sign(), -weight.grad[0].sign())  # a clipped step is one of lr
    assert not weight.detach()[1].any()
    for bounded in (False, True):
        operator = build_operator({"w": weight}, [optimizer])
        ones = {"w": torch.ones(2, 3)}
        applied = (operator.bounded(ones) if bounded else operator).apply(ones)["w"]
        assert applied.isfinite().all()
        assert not applied[1].any()


def test_sgd_sai_is_set_by_the_first_gradient_that_is_one() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    optimizer = SGDSaI(weights, lr=LR, weight_decay=0.0)
    for weight, gradient in zip(weights, (torch.zeros(2, 2), torch.ones(2, 2), torch.eye(2)), strict=True):
        weight.grad = gradient
    optimizer.step()
    first, second, third = (float(optimizer.state[weight]["gsnr"]) for weight in weights)
    assert (first, second) == (0.0, 1.0)  # not set; no spread
    assert third == pytest.approx(2**0.5 / 3**-0.5)
    assert torch.equal(weights[0].detach(), torch.ones(2, 2))
    operator = build_operator(dict(zip("abc", weights, strict=True)), [optimizer])
    assert not operator.apply({"a": torch.ones(2, 2)})["a"].any()
    weights[0].grad = torch.eye(2)
    optimizer.step()
    assert float(optimizer.state[weights[0]]["gsnr"]) == pytest.approx(third)
    weights[2].grad = torch.ones(2, 2)
    optimizer.step()
    assert float(optimizer.state[weights[2]]["gsnr"]) == pytest.approx(third)  # once and for all


@pytest.mark.parametrize("case", CASES)
def test_state_is_tensors_that_come_back_from_a_file(case: str) -> None:
    weights, optimizer, _ = trained(case)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    other = make(case, copies)
    other.load_state_dict(torch.load(file, weights_only=True))
    for index, shape in enumerate(reference_of(case).shapes):
        state = optimizer.state[weights[index]]
        assert all(isinstance(value, Tensor) for value in state.values())
        gradient = torch.randn(shape, dtype=torch.float64)
        weights[index].grad, copies[index].grad = gradient, gradient.clone()
    optimizer.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
