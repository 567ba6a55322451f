"""``ModuleBackend`` and ``TensorCandidates``: what scoring returns, and that it leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaopus.selection import (
    ModuleBackend,
    SelectionConfig,
    Selector,
    TensorCandidates,
    directional_utilities,
)
from megaopus.selection.estimators.step_size import step_size
from tests.exact.estimators_toy import as_accelerate_prepares


class Net(nn.Module):
    """Features (n, T, 6) -> predictions (n, T, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.down = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)
        return self.down(self.drop(torch.tanh(y)))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean((1, 2))


def data(count: int, seed: int = 0) -> TensorCandidates:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, 6, generator=generator)
    return TensorCandidates({"x": x, "y": x[..., :2].sin()})


def ready(make=lambda p: torch.optim.AdamW(p, lr=1e-2)) -> ModuleBackend:
    """A backend whose optimizer has taken three steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss(model, data(8, step).batch()).mean().backward()
        optimizer.step()
    return ModuleBackend(model, optimizer, loss)


@pytest.mark.parametrize("estimator", ["directional", "countsketch", "exact"])
def test_scoring_changes_nothing(estimator: str) -> None:
    backend = ready()
    model = backend.module
    model.norm.eval()  # a module frozen on purpose stays so
    config = SelectionConfig(method="opus", estimator=estimator, sketch_dim=64, proxy_half_life=0.0)
    before = {
        "weights": copy.deepcopy(model.state_dict()),
        "gradients": [p.grad.clone() for p in model.parameters()],
        "optimizer": copy.deepcopy(backend.optimizers[0].state_dict()),
        "modes": [m.training for m in model.modules()],
        "rng": torch.get_rng_state(),
    }
    selection = Selector(config, backend, num_selected=4, proxy=lambda step: data(6, 9), seed=0).select(data(8, 4), 0)
    assert selection.method == "opus"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before["weights"][name]), name
    for p, gradient in zip(model.parameters(), before["gradients"], strict=True):
        assert torch.equal(p.grad, gradient)
        assert p.requires_grad
    for index, state in backend.optimizers[0].state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before["optimizer"]["state"][index][key])
    assert [m.training for m in model.modules()] == before["modes"]
    assert model.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), before["rng"])
    assert not any(m._forward_hooks for m in model.modules())


def test_an_error_while_scoring_restores_weights_and_modes() -> None:
    backend = ready()
    before = copy.deepcopy(backend.module.state_dict())
    direction = {name: torch.ones_like(p) for name, p in backend.parameters().items()}

    def fail() -> None:
        with backend.perturbed(direction) as move:
            move(0.5)
            moved = backend.module.up.weight.clone()
            assert torch.equal(moved, before["up.weight"] + 0.5)
            move(torch.tensor(0.5, dtype=torch.float64))  # as where it is on a device
            assert torch.equal(backend.module.up.weight, moved)
            backend.losses(TensorCandidates({"x": torch.zeros(2, 5, 6)}))  # no labels

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backend.module.state_dict().items())
    assert backend.module.training


def test_gradient_is_the_gradient_of_the_mean_at_any_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ready()
    proxy = data(7, 5)
    backend.module.eval()
    expected = torch.autograd.grad(loss(backend.module, proxy.batch()).mean(), list(backend.module.parameters()))
    passes: list[int] = []
    backend.gradient(proxy)  # the first looks what the model computes in
    monkeypatch.setattr(backend, "loss", lambda model, batch: passes.append(1) or loss(model, batch))
    for micro_batch_size, told, count in ((7, None, 1), (3, None, 3), (1, None, 7), (1, 4, 2), (7, 2, 4)):
        backend.micro_batch_size = micro_batch_size
        passes.clear()
        found = backend.gradient(proxy) if told is None else backend.gradient(proxy, micro_batch_size=told)
        assert len(passes) == count
        assert list(found) == [name for name, _ in backend.module.named_parameters()]
        for gradient, reference in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_only_trained_weights_are_parameters() -> None:
    model = Net()
    model.up.bias.requires_grad_(False)
    backend = ModuleBackend(model, torch.optim.SGD([*model.up.parameters(), model.down.weight], lr=0.1), loss)
    assert list(backend.parameters()) == ["up.weight", "down.weight"]
    assert [layer.parameter for layer in backend.ghost_layers()] == ["up.weight", "down.weight"]


def autocast_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss(model, batch).float()


@pytest.mark.parametrize("where", ["inside the forward", "inside the loss"])
@pytest.mark.parametrize("first", ["losses", "gradient", "directional"])
def test_autocast_inside_is_seen_by_the_first_pass(where: str, first: str) -> None:
    """It is not on where the backend is asked."""
    fp32, backend = ready(), ready()
    if where == "inside the forward":
        as_accelerate_prepares(backend.module)
    else:
        backend.loss = autocast_loss
    assert backend.unobserved
    if first == "losses":
        backend.losses(data(4))
    elif first == "gradient":
        backend.gradient(data(4))
    else:  # with a gradient from before, as after a resume
        gradient = fp32.gradient(data(8, 7))
        operator = backend.operator()
        found = directional_utilities(backend, data(12, 3), operator, gradient)
        epsilon = step_size(backend, operator.apply(gradient), gradient)
        assert epsilon > 2 * step_size(fp32, operator.apply(gradient), gradient)
        assert torch.equal(found, directional_utilities(backend, data(12, 3), operator, gradient, epsilon=epsilon))
    assert backend.computes_in_16_bits
    assert not backend.unobserved
    fp32.losses(data(4))
    assert not fp32.computes_in_16_bits


@pytest.mark.parametrize("where", ["around the loop", "inside the loss", "inside the forward", "both"])
def test_autocast_does_not_score_with_stale_weight_casts(where: str) -> None:
    backend = ready()
    candidates, gradient, operator = data(12, 3), backend.gradient(data(8, 7)), backend.operator()
    fp32 = directional_utilities(backend, candidates, operator, gradient, epsilon=1)
    backend.loss = loss if where in ("around the loop", "inside the forward") else autocast_loss
    if where == "inside the forward":
        as_accelerate_prepares(backend.module)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where in ("around the loop", "both")):
        # casts without a graph, and casts of the weights as they are, are now in the cache
        loss(backend.module, candidates.batch())
        scores = directional_utilities(backend, candidates, operator, gradient, epsilon=1)
        loss(backend.module, candidates.batch()).mean().backward()
    assert (scores - fp32).abs().max() < 0.1 * fp32.std()
    for p in backend.module.parameters():
        assert p.grad is not None
        assert p.grad.abs().max() > 0


def test_scoring_inside_autocast_leaves_training_its_gradients() -> None:
    backend = ready()
    for p in backend.module.parameters():
        p.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backend.losses(data(4))
        loss(backend.module, data(4).batch()).mean().backward()
    assert all(p.grad is not None for p in backend.module.parameters())


def test_16_bit_weights_are_refused_by_directional_scoring() -> None:
    backend = ready()
    backend.module.bfloat16()
    direction = {name: torch.ones_like(p) for name, p in backend.parameters().items()}
    with pytest.raises(ValueError, match=r"too little for torch.bfloat16 \(parameter up.weight\)"):
        backend.perturbed(direction).__enter__()


def test_a_loss_that_is_not_per_sequence_is_refused() -> None:
    backend = ready()
    backend.loss = lambda model, batch: loss(model, batch).mean()
    with pytest.raises(ValueError, match=r"returned shape \(\) for 4 sequences: it must return \(4,\)"):
        backend.losses(data(4))


def test_labels_are_the_next_token_at_any_score_length() -> None:
    class Successor(nn.Module):
        """Predicts token + 1, surely."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(20.0))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.scale * F.one_hot((tokens + 1) % 32, 32)

    def token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    model = Successor()
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), token_loss)
    by_one = torch.arange(12) % 32
    by_two = (2 * torch.arange(12)) % 32
    candidates = TensorCandidates(torch.stack([by_one, by_two, by_one + 3, by_two + 5]))
    for length in (None, 6):
        losses = backend.losses(candidates, length=length)
        assert losses[[0, 2]].max() < 1e-4  # the text the model predicts costs nothing
        assert losses[[1, 3]].min() > 19
    gradient, operator = backend.gradient(candidates.take(torch.tensor([1]))), backend.operator()
    utilities = directional_utilities(backend, candidates, operator, gradient)
    assert utilities[[1, 3]].min() > 0.05  # a smaller scale helps what the model gets wrong
    assert utilities[[0, 2]].abs().max() < 1e-3


def test_tensor_candidates_cut_take_and_name_their_sequences() -> None:
    tokens, weight = torch.arange(24).view(4, 6), torch.rand(4)
    candidates = TensorCandidates((tokens, {"weight": weight, "name": "x"}), torch.tensor([5, 3, 9, 1]))
    assert len(candidates) == 4
    taken = candidates.take(torch.tensor([2, 0]))
    assert taken.ids.tolist() == [9, 5]
    cut, rest = taken.batch(3)
    assert torch.equal(cut, tokens[[2, 0], :3])
    assert torch.equal(rest["weight"], weight[[2, 0]])
    assert rest["name"] == "x"
    assert taken.batch()[0].shape == (2, 6)


@pytest.mark.parametrize(
    ("batch", "ids", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(3, 2)), None, "one common leading axis"),
        ({}, None, "no tensor"),
        (torch.tensor(1.0), None, "one common leading axis"),
        (torch.zeros(3, 2), torch.tensor([1, 1, 2]), "3 different integers"),
        (torch.zeros(3, 2), torch.tensor([1, 2]), "3 different integers"),
    ],
)
def test_unusable_tensor_candidates_are_refused(batch, ids, message) -> None:
    with pytest.raises(ValueError, match=message):
        TensorCandidates(batch, ids)


@pytest.mark.parametrize(
    ("estimator", "layers"), [("countsketch", "auto"), ("adjoint", "all"), ("directional", "no such name")]
)
def test_layers_that_match_nothing_are_refused(estimator: str, layers: str) -> None:
    model = nn.Sequential(nn.LayerNorm(6))
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).mean((1, 2)))
    config = SelectionConfig(method="opus", estimator=estimator, layers=layers)
    selector = Selector(config, backend, num_selected=2, proxy=lambda step: torch.randn(4, 5, 6), seed=0)
    with pytest.raises(ValueError, match="matches no trained matrix"):
        selector.select(torch.randn(4, 5, 6), 0)
