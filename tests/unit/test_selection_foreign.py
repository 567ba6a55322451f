"""Models and optimizers of other packages: every matrix counts, or it is said; no optimizer is taken for another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaopus.selection import (
    CountSketchEstimator,
    KroneckerEstimator,
    ModuleBackend,
    Selection,
    SelectionConfig,
    Selector,
    TensorCandidates,
    adjoint_utilities,
    exact_utilities,
)
from megaopus.selection.methods.by_gradient_norm import squared_norms
from tests.exact.estimators_toy import spearman
from tests.unit.selection_net import UNGUARDED, Net, batch, loss, proxy

VOCAB, LENGTH = 50, 12
PASSES: dict[str, Any] = {"length": None, "micro_batch_size": 5}  # does not divide the candidates


def token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def tokens(count: int, seed: int) -> TensorCandidates:
    generator = torch.Generator().manual_seed(seed)
    return TensorCandidates(torch.randint(VOCAB, (count, LENGTH + 1), generator=generator))


@pytest.fixture(scope="module")
def gpt2() -> ModuleBackend:
    """The real class after three updates."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCAB}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        token_loss(model, tokens(8, step).batch()).mean().backward()
        optimizer.step()
    return ModuleBackend(model, optimizer, token_loss)


MATRICES = [
    f"transformer.h.{block}.{name}.weight"
    for block in (0, 1)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def test_every_matrix_of_gpt2_is_captured(gpt2: ModuleBackend) -> None:
    layers = gpt2.ghost_layers()
    assert {layer.parameter for layer in layers if layer.transposed} == set(MATRICES)
    assert {layer.parameter for layer in layers} == {*MATRICES, "transformer.wte.weight", "transformer.wpe.weight"}


def test_estimators_score_gpt2_as_the_oracle_does(gpt2: ModuleBackend) -> None:
    """Positions, of shape (1, T), included: they are the same for every sequence, their gradients are not."""
    gradient, candidates = gpt2.gradient(tokens(8, 40)), tokens(12, 50)
    given = (gpt2, candidates, gpt2.operator(), gradient)
    names = [name for name, value in gradient.items() if value.ndim == 2]
    exact = exact_utilities(*given, parameters=names)
    torch.testing.assert_close(adjoint_utilities(*given, layers="all", **PASSES), exact, rtol=1e-3, atol=1e-6)
    found, sketches = CountSketchEstimator(2048, 1, "all").estimate(*given, keep_sketches=True, **PASSES)
    assert sketches is not None
    assert sketches.keys() == set(names)
    assert spearman(found, exact) > 0.9
    assert spearman(KroneckerEstimator(16384, 1, "all").estimate(*given, **PASSES)[0], exact) > 0.9
    uses = [layer for layer in gpt2.ghost_layers() if layer.transposed]
    norms = [
        sum(float(one[name].square().sum()) for name in MATRICES) for one in gpt2.exact_gradients(candidates.batch())
    ]
    assert squared_norms(gpt2, candidates, uses, PASSES).tolist() == pytest.approx(norms, rel=1e-3)


class Positions(nn.Module):
    """Adds an embedding of positions as nanoGPT does, of ids (T,), to one of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_positions_without_an_axis_of_sequences(micro_batch_size: int) -> None:
    """As many of them as sequences, too."""
    torch.manual_seed(0)
    model = Positions()
    backend = ModuleBackend(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda module, ids: F.cross_entropy(module(ids).transpose(1, 2), ids, reduction="none").mean(1),
    )
    candidates = TensorCandidates(torch.randint(7, (10, 5)))
    given = (backend, candidates, backend.operator(), backend.gradient(TensorCandidates(torch.randint(7, (6, 5)))))
    exact = exact_utilities(*given, parameters=["tokens.weight", "positions.weight", "head.weight"])
    found = adjoint_utilities(*given, layers="all", micro_batch_size=micro_batch_size)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)


# -- what is not captured ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A linear layer, then experts whose weights are one parameter of three axes."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up = nn.Linear(5, 16)
        self.experts = nn.Parameter(torch.randn(experts, 16, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,eio->nto", torch.tanh(self.up(x)), self.experts)


def pick(model: nn.Module, steps: int = 1, **settings: Any) -> list[Selection]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = SelectionConfig(**{"method": "opus", "proxy_ema": 0.0, "guards": UNGUARDED, **settings})
    selector = Selector(config, ModuleBackend(model, optimizer, loss), num_selected=4, proxy=proxy, seed=0)
    return [selector.select(batch(step), step) for step in range(steps)]


CAPTURING = [{"estimator": "adjoint"}, {"estimator": "countsketch"}, {"redundancy": 0.5}, {"method": "grad_norm"}]


@pytest.mark.parametrize("settings", CAPTURING, ids=str)
def test_matrices_that_are_not_captured_are_told_or_refused(settings: dict[str, Any]) -> None:
    """Of Experts(1) 80 of 128 weights are captured, of Experts(2) 80 of 176."""
    first, second = pick(Experts(1), 2, **settings)
    (event,) = (event for event in first.events if event.kind != "selection.imprecise")
    assert event.kind == "selection.partly_captured"
    assert event.facts == {"share": 80 / 128, "missing": ["experts"]}
    assert str(event).startswith(
        "activations are captured of layers with 62% of the trained matrices' weights alone (selection.layers=linear);"
        " not of experts, which"
    )
    assert not any(event.kind == "selection.partly_captured" for event in second.events)
    with pytest.raises(ValueError, match=r"45% of the trained.*not of experts.*estimator=directional scores by all"):
        pick(Experts(2), **settings)


@pytest.mark.parametrize("settings", [{"layers": "up"}, {"estimator": "directional", "redundancy": 0.0}], ids=str)
def test_nothing_is_told_where_the_settings_leave_them_out_or_nothing_is_captured(settings: dict[str, Any]) -> None:
    (found,) = pick(Experts(2), **{"estimator": "adjoint", **settings})
    assert found.events == []
    assert pick(Net(), estimator="adjoint")[0].events == []


# -- optimizers --------------------------------------------------------------------------------------------------------


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by class, whose state and groups are those of the one inside."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups


class LightningOptimizer:
    """As Lightning's: no Optimizer by class, with its attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer


def trained(make: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    loss(model, batch(0)).mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("prepare", [AcceleratedOptimizer, LightningOptimizer])
@pytest.mark.parametrize("many", [False, True])
def test_prepared_optimizers_are_what_they_hold(prepare: Any, many: bool) -> None:
    model, optimizer = trained(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    prepared = prepare(prepare(optimizer)) if many else prepare(optimizer)
    backend = ModuleBackend(model, [prepared] if many else prepared, loss)
    assert backend.optimizers == [optimizer]
    gradient = backend.gradient(TensorCandidates(proxy(0)))
    expected = ModuleBackend(model, optimizer, loss).operator().apply(gradient)
    for name, value in backend.operator().apply(gradient).items():
        assert torch.equal(value, expected[name])


class _Other(torch.optim.Optimizer):
    """Keeps its moments under other keys, as bitsandbytes does."""

    def __init__(self, parameters: Iterator[nn.Parameter]):
        super().__init__(parameters, {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "momentum": 0.9})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] |= {"step": torch.tensor(1.0), "state1": p.grad, "state2": p.grad.square()}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion", "SGD", "Adafactor", "Muon"])
def test_a_class_of_a_known_name_with_other_state_is_refused(name: str) -> None:
    """It was taken for one without state, or without momentum, in every step."""
    model, optimizer = trained(type(name, (_Other,), {"__module__": "elsewhere"}))
    backend = ModuleBackend(model, optimizer, loss)
    refused = rf"elsewhere\.{name} has the name of .* state of a.weight has state1, state2 where .*register_operator"
    with pytest.raises(TypeError, match=refused):
        backend.operator()


def test_an_optimizer_that_was_not_stepped_has_no_state_yet() -> None:
    model = Net()
    for cls in (torch.optim.Adam, type("Adam", (_Other,), {})):
        assert ModuleBackend(model, cls(model.parameters()), loss).operator() is None
