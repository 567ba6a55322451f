"""Norms of gradients from their factors are those of float64 gradients, whichever way is less work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megaopus.config.run_config import RunConfig
from megaopus.config.validation import validate
from megaopus.selection import ModuleBackend, SelectionConfig, Selector, TensorCandidates
from tests.unit.selection_net import UNGUARDED

VOCAB, WIDTH = 23, 12


class Shared(nn.Module):
    """An embedding, a layer used twice, one used once; the output layer may be the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.twice, self.once = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = torch.tanh(self.twice(x)) + x
        return self.head(self.once(torch.tanh(self.twice(x))))


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).transpose(1, 2)
    return nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [3, 40])
def test_norms_are_those_of_float64_gradients(length: int, tied: bool) -> None:
    torch.manual_seed(0)
    model = Shared(tied)
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    tokens = torch.randint(0, VOCAB, (11, length + 1), generator=torch.Generator().manual_seed(1))
    names = ["twice.weight", "once.weight", *([] if tied else ["head.weight"])]
    expected = torch.stack(
        [sum(gradient[name].square().sum() for name in names).sqrt() for gradient in backend.exact_gradients(tokens)]
    )
    config = SelectionConfig(method="grad_norm", guards=UNGUARDED, score_micro_batch_size=4)
    selector = Selector(config, backend, num_selected=4, proxy=None, seed=0)
    selection = selector.select(TensorCandidates(tokens), 0)
    torch.testing.assert_close(selection.utilities, expected, rtol=1e-5, atol=0)
    assert selection.method == "grad_norm"
    assert selection.indices.tolist() == expected.topk(4).indices.sort().values.tolist()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_linear_layers_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, VOCAB))
    backend = ModuleBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    selector = Selector(SelectionConfig(method="grad_norm"), backend, num_selected=1, proxy=None, seed=0)
    with pytest.raises(ValueError, match="matches no trained matrix"):
        selector.select(torch.zeros(4, 5, dtype=torch.int64), 0)


def test_split_sequences_are_refused_before_a_run() -> None:
    config = RunConfig()
    config.selection = SelectionConfig(method="grad_norm", rho=0.5)
    config.parallel.cp = 2
    said = [problem for problem in validate(config, 2) if problem.key == "selection.method"]
    assert [problem.value for problem in said] == ["grad_norm"]
    assert "it needs cp = 1" in said[0].reason
    config.parallel.cp, config.parallel.tp = 1, 2
    assert not [problem for problem in validate(config, 2) if problem.key == "selection.method"]
