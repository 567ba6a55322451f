"""Ghost factors give exact per-sample gradients, or a clear error; never zeros."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaopus.selection import CountSketchEstimator, ModuleBackend, TensorCandidates, directional_utilities
from megaopus.selection.backend import GhostLayer
from megaopus.selection.estimators.ghost import GhostCapture, per_sample_gradient
from tests.exact.estimators_toy import ToyGPT, buffer, per_sequence_loss, proxy, train


def captured_gradients(backend: ModuleBackend, batch: object, count: int) -> dict[str, Tensor]:
    """Per-sample gradient of each captured weight, its uses added up."""
    shapes = {name: p.shape for name, p in backend.parameters().items()}
    total: dict[str, Tensor] = {}

    def consume(layer: GhostLayer, rows: slice, act_a: Tensor, grad_b: Tensor) -> None:
        gradient = per_sample_gradient(layer, shapes[layer.parameter], act_a, grad_b)
        if layer.parameter not in total:
            total[layer.parameter] = gradient.new_zeros(count, *gradient.shape[1:])
        total[layer.parameter][rows] += gradient

    backend.ghost_pass(TensorCandidates(batch), backend.ghost_layers(), consume, micro_batch_size=2)
    return total


def assert_exact(backend: ModuleBackend, batch: object, count: int) -> None:
    found = captured_gradients(backend, batch, count)
    assert set(found) == {layer.parameter for layer in backend.ghost_layers()}
    for index, expected in enumerate(backend.exact_gradients(batch)):
        for name, gradient in found.items():
            assert expected[name].abs().max() > 0
            torch.testing.assert_close(gradient[index], expected[name], rtol=1e-9, atol=1e-12)
    assert all(p.grad is None and p.requires_grad for p in backend.module.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_ghost_gradients_are_exact_for_every_matrix_and_embedding(tied: bool) -> None:
    torch.manual_seed(1)
    model = ToyGPT(width=16, tied=tied).double()
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=1.0), per_sequence_loss)
    assert len(backend.ghost_layers()) == 2 + 4 * 2
    assert_exact(backend, buffer(3, seed=0).batch(), 3)


def test_an_input_is_let_go_of_once_it_is_handed_out() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    seen = []
    ghost = GhostLayer("weight", layer, "linear")
    with GhostCapture([ghost], lambda layer, rows, act_a, grad_b: seen.append(act_a.shape)) as capture:
        capture.rows = slice(0, 2)
        act_a = torch.ones(2, 5, 4, requires_grad=True) * 2
        alive = weakref.ref(act_a.untyped_storage())
        loss = layer(act_a).sum()
        del act_a
        assert alive() is not None
        loss.backward()
    assert seen == [(2, 5, 4)]
    assert alive() is None  # although the loss is there still, as a schedule keeps it through the next forward pass
    assert loss.requires_grad


class Unusual(nn.Module):
    """Sequence-first layout, a layer that returns a tuple, padding, a layer called by keyword and one called twice."""

    class Tupled(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(x), None

    def __init__(self, recompute: bool | None = None):
        super().__init__()
        self.embedding = nn.Embedding(12, 6, padding_idx=0)
        self.tupled, self.twice, self.head = self.Tupled(6, 6), nn.Linear(6, 6), nn.Linear(6, 12)
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens.t())  # (T, n, 6)
        x = x.mul_(2.0)
        x = torch.tanh(self.tupled(x)[0])
        x = self.body(x) if self.recompute is None else checkpoint(self.body, x, use_reentrant=self.recompute)
        return self.head(input=x).transpose(0, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.twice(x)))


class SequenceFirstBackend(ModuleBackend):
    def ghost_layers(self) -> list[GhostLayer]:
        return [GhostLayer(x.parameter, x.module, x.kind, sequence_first=True) for x in super().ghost_layers()]


@pytest.mark.parametrize("recompute", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_ghost_gradients_are_exact_for_unusual_modules_and_under_recomputation(recompute: bool | None) -> None:
    torch.manual_seed(1)
    model = Unusual(recompute).double()
    backend = SequenceFirstBackend(model, torch.optim.SGD(model.parameters(), lr=1.0), per_sequence_loss)
    tokens = torch.randint(0, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    found = captured_gradients(backend, tokens, 4)
    model.recompute = None
    for index, expected in enumerate(backend.exact_gradients(tokens)):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[index], expected[name], rtol=1e-9, atol=1e-12)


def test_compiled_scores_equal_eager_scores() -> None:
    backend = train("adamw", steps=3, make=lambda: ToyGPT(width=16, layers=1))
    candidates, gradient, operator = buffer(6, seed=0), backend.gradient(proxy(0)), backend.operator()

    def scores(scored: ModuleBackend) -> tuple[Tensor, Tensor]:
        scored.losses(candidates)  # compiled once without hooks
        sketch, _ = CountSketchEstimator(1024, 0).estimate(scored, candidates, operator, gradient, micro_batch_size=3)
        return sketch, directional_utilities(scored, candidates, operator, gradient)

    eager = scores(backend)
    compiled = torch.compile(backend.module, backend="eager")
    found = {"model": scores(ModuleBackend(compiled, backend.optimizers, per_sequence_loss))}
    compiled_loss = torch.compile(per_sequence_loss, backend="eager")
    found["loss"] = scores(ModuleBackend(backend.module, backend.optimizers, compiled_loss))
    backend.module.blocks[0].compile(backend="eager")  # in place
    found["block"] = scores(backend)
    for what, values in found.items():
        for value, expected in zip(values, eager, strict=True):
            assert expected.abs().min() > 0
            torch.testing.assert_close(
                value, expected, rtol=1e-3, atol=1e-3 * float(expected.std()), msg=lambda m, w=what: f"{w}: {m}"
            )


class HalfHooked(nn.Module):
    """Two matrices; ``how`` says what happens to the second."""

    def __init__(self, how: str):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "bypassed":
            return y + F.linear(y, self.second.weight)
        if self.how == "detached":
            return y + self.second(y).detach()
        z = self.second(y)
        y += 1  # the input of ``second`` changes after its use
        return y + z


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("bypassed", r"second.weight \(linear\) was not called"),
        ("detached", r"second.weight \(linear\) got no gradient"),
        ("in place", "the input of second.weight was changed in place"),
    ],
)
def test_a_layer_that_cannot_be_captured_is_named(how: str, message: str) -> None:
    model = HalfHooked(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backend = ModuleBackend(model, optimizer, lambda model, x: model(x).square().mean((1, 2)))
    candidates = TensorCandidates(torch.randn(4, 3, 4))
    operator = backend.operator()
    gradient = {name: torch.ones_like(p) for name, p in backend.parameters().items()}
    with pytest.raises(RuntimeError, match=message):
        CountSketchEstimator(64, 0).estimate(backend, candidates, operator, gradient)
    assert not model.first._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_positions_of_all_sequences_count_for_each_as_if_they_were_expanded() -> None:
    class Positions(nn.Module):
        expanded = False

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            ids = torch.arange(tokens.shape[1])
            return self.head(self.tokens(tokens) + self.positions(ids.expand(tokens.shape) if self.expanded else ids))

    model = Positions()
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), per_sequence_loss)
    candidates, operator = TensorCandidates(torch.randint(0, 9, (3, 6))), backend.operator()
    gradient = backend.gradient(candidates)
    found = []
    for model.expanded in (False, True):
        utilities, _ = CountSketchEstimator(64, 0, "all").estimate(backend, candidates, operator, gradient)
        found.append(utilities)
    assert found[0].abs().min() > 0
    torch.testing.assert_close(*found)


def test_sketching_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = train("muon", steps=2)
    candidates, gradient, operator = buffer(6, seed=0), backend.gradient(proxy(0)), backend.operator()
    whole, _ = CountSketchEstimator(512, 0, "all").estimate(backend, candidates, operator, gradient)
    monkeypatch.setattr("megaopus.selection.estimators.ghost._GRADIENT_ELEMENTS", 5000)
    chunked, _ = CountSketchEstimator(512, 0, "all").estimate(backend, candidates, operator, gradient)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4 * float(whole.std()))
