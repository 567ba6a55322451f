"""What goes through a gradient piece by piece is, to the bit, what goes through it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaopus.selection import CountSketch, ModuleBackend, TensorCandidates
from megaopus.selection import pieces as of_pieces
from megaopus.selection.estimators.countsketch import Places
from megaopus.selection.operators.build import OptimizerOperator, held_by, operator_of
from megaopus.selection.operators.lion import lion
from megaopus.selection.operators.sophia import sophia_g
from megaopus.selection.pieces import OnDemand, Scaled, chunks, finite, side_by_side
from megaopus.selection.proxy import ProxyGradient

SHAPES = {"matrix": (6, 5), "vector": (7,), "number": (), "wide": (3, 40)}


def numbers(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_pieces, "CHUNK", 32)


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_chunks_hold_every_number_once() -> None:
    first, second = list(numbers(0).values()), list(numbers(1).values())
    across = torch.randn(8, 9).t()  # not contiguous: whole, as it is
    found = list(chunks([[*first, across], [*second, across]]))
    sizes = [sum(view.numel() for view in views) for views, _ in found]
    assert set(sizes[:-1]) == {32}  # and the last holds what is not contiguous as well
    for side, given in enumerate(([*first, across], [*second, across])):
        seen = torch.cat([view.flatten() for parts in found for view in parts[side]])
        assert torch.equal(seen, torch.cat([tensor.flatten() for tensor in given]))


def test_tensors_lie_side_by_side_in_few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_pieces, "_BUFFER", 128)
    like = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 5), (), (64, 4), (0,), (70,), (2,))]
    found, buffers = side_by_side(like)
    assert [len(buffer) for buffer in buffers] == [128, 256, 128, 64]
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in like]
    assert all(tensor.storage_offset() % 64 == 0 for tensor in found)
    for buffer in buffers:
        buffer.zero_()
    for number, tensor in enumerate(found):
        tensor.fill_(number)
    for number, tensor in enumerate(found):  # none lies in another
        assert bool((tensor == number).all())
    assert sum(float(buffer.sum()) for buffer in buffers) == 1 + 2 * 256 + 4 * 70 + 5 * 2


def test_finite_sees_one_bad_number() -> None:
    good = numbers(0) | {"nothing": torch.empty(0)}
    assert finite(good, torch.device("cpu"))
    assert finite({"nothing": torch.empty(0)}, torch.device("cpu"))
    for bad in (torch.nan, torch.inf, -torch.inf):
        wrong = {name: value.clone() for name, value in good.items()}
        wrong["wide"][1, 7] = bad
        assert not finite(wrong, torch.device("cpu"))


# -- the direction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_directions_made_together_are_those_made_one_by_one(bounded: bool, amsgrad: bool, factor: float) -> None:
    parameters = {name: nn.Parameter(value) for name, value in numbers(0).items()}
    groups: list[dict[str, Any]] = [
        {"params": [parameters["matrix"], parameters["wide"]], "lr": 0.1},
        {"params": [parameters["vector"], parameters["number"]], "lr": 0.01, "eps": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, amsgrad=amsgrad)
    for seed in (1, 2):
        for name, value in numbers(seed).items():
            parameters[name].grad = value
        optimizer.step()
    operator, gradient = operator_of(held_by([optimizer], parameters)), Scaled(numbers(3), factor)
    assert operator is not None
    operator = operator.bounded(gradient) if bounded else operator
    found = operator.direction(gradient, gradient)
    assert list(found) == list(gradient)
    for each in (gradient, OnDemand(gradient, lambda name: gradient[name])):
        alone = operator.transposed().apply({name: each[name] for name in each})
        for name in gradient:
            torch.testing.assert_close(found[name], alone[name], rtol=0 if factor == 1 else 1e-6, atol=0)
    one = operator.direction(gradient, ["vector"])
    assert list(one) == ["vector"]
    assert torch.equal(one["vector"], found["vector"])


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("rule", [lion, sophia_g])
def test_a_direction_made_by_chunks_is_that_of_whole_parameters(rule: Any, bounded: bool) -> None:
    gradient, momentum, hessian = Scaled(numbers(3), 1.7), numbers(1), numbers(2)
    group = {"lr": 0.1, "betas": (0.9, 0.99), "rho": 0.04, "eps": 0.01}
    maps = {}
    for name, value in momentum.items():
        state = {"exp_avg": value.where(value > -1, 0), "hessian": hessian[name], "step": torch.tensor(2.0)}
        maps[name] = rule(group, state, value)
    operator = OptimizerOperator(maps)
    operator = operator.bounded(gradient) if bounded else operator
    found, alone = operator.direction(gradient, gradient), operator.apply(dict(gradient))
    assert all(torch.equal(found[name], alone[name]) for name in gradient)
    assert any(value.any() for value in found.values())


def test_what_is_kept_inside_whole_is_worked_out_once() -> None:
    class Counted:
        asked = 0

        def bounded(self, gradient: Tensor) -> Counted:
            self.asked += 1
            return self

        def diagonal(self) -> Tensor:
            return torch.ones(())

    one = Counted()
    operator = OptimizerOperator({"matrix": one}).bounded(numbers(0))  # type: ignore[dict-item]
    assert one.asked == 0
    for _ in range(2):
        operator.diagonal("matrix")
    assert one.asked == 2
    with operator.whole() as whole:
        for _ in range(2):
            whole.diagonal("matrix")
    assert one.asked == 3


# -- the average -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lent", [False, True])
def test_an_average_made_in_place_is_the_one_made_apart(lent: bool) -> None:
    apart, within, buffer = ProxyGradient(0.7), ProxyGradient(0.7), numbers(9)
    for seed, kept in ((1, True), (2, False), (3, True), (4, True)):
        for name, value in numbers(seed).items():
            buffer[name].copy_(value)
        given = buffer if lent else {name: value.clone() for name, value in buffer.items()}
        expected = apart.offer(numbers(seed))
        found = within.offer(given, in_place=True, lent=lent)
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
        if kept:
            apart.keep()
            within.keep()
    last, before = within.last(), apart.last()
    assert last is not None
    assert before is not None
    for value in buffer.values():
        value.fill_(torch.nan)  # the next gradient, where the last one lay
    assert all(torch.equal(last[name], before[name]) for name in SHAPES)


# -- sketches ----------------------------------------------------------------------------------------------------------


def test_hashes_worked_out_anew_are_those_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from megaopus.selection.estimators import countsketch

    monkeypatch.setattr(countsketch, "AT_ONCE", 16)
    rows, columns = torch.tensor([0, 2, 5, 7]), torch.arange(3, 9)
    places = Places(rows, columns, width=12, start=5, count=17)
    indices = (rows.unsqueeze(1) * 12 + columns).flatten()[5:22]
    assert torch.equal(places[0:17], indices)
    values, factor = torch.randn(3, 17), torch.rand(17)
    plain = CountSketch("w", indices, 8, 42)
    for kept in (False, True):
        sketch = CountSketch("w", places, 8, 42, kept)
        assert torch.equal(sketch(values, factor), plain(values, factor))
        assert torch.equal(sketch.transpose(torch.arange(8.0)), plain.transpose(torch.arange(8.0)))


# -- the signed pass ---------------------------------------------------------------------------------------------------


def test_a_gradient_against_another_batch_is_their_difference() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backend = ModuleBackend(model, optimizer, lambda model, x: model(x).square().mean(1), micro_batch_size=2)
    first, second = (TensorCandidates(torch.randn(count, 4, dtype=torch.float64)) for count in (5, 3))
    found, one, other = backend.gradient(first, against=second), backend.gradient(first), backend.gradient(second)
    for name, value in found.items():
        torch.testing.assert_close(value, one[name] - other[name], rtol=1e-12, atol=1e-15)
