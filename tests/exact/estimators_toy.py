"""A small GPT trained on real text, for the tests of the estimators."""

from __future__ import annotations

import copy
import functools
import inspect
import pydoc_data.topics
import statistics
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaopus.optim.base import CurvatureOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import OPTIMIZERS, spec_of
from megaopus.selection import ModuleBackend, TensorCandidates

SEQ_LEN = 48
VOCAB = 128


class Block(nn.Module):
    """Pre-norm attention and MLP; attention written out, so that every matrix is an nn.Linear that is called."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(n, t, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class ToyGPT(nn.Module):
    """Tokens (n, T) -> logits (n, T, VOCAB)."""

    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4, tied: bool = True, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.position = nn.Parameter(torch.zeros(SEQ_LEN, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.05)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def per_sequence_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of each sequence; the label of position t is token t + 1."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


@functools.cache
def text(kind: str) -> Tensor:
    """Character codes of documentation ('docs') or of program code ('code')."""
    if kind == "docs":
        characters = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    else:
        characters = "\n".join(inspect.getsource(module) for module in (statistics, inspect))
    return torch.tensor([ord(c) for c in characters if ord(c) < VOCAB])


def windows(tokens: Tensor, count: int, seed: int) -> Tensor:
    """(count, SEQ_LEN + 1) random stretches of a text."""
    start = torch.randint(len(tokens) - SEQ_LEN - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return tokens[start.unsqueeze(1) + torch.arange(SEQ_LEN + 1)]


def buffer(count: int, seed: int) -> TensorCandidates:
    """A third each of documentation, code, and documentation with its characters shuffled."""
    third = count // 3
    docs, code = windows(text("docs"), count - 2 * third, seed), windows(text("code"), third, seed + 1)
    noise = windows(text("docs"), third, seed + 2)
    noise = noise[:, torch.randperm(noise.shape[1], generator=torch.Generator().manual_seed(seed))]
    return TensorCandidates(torch.cat([docs, code, noise]))


ALL_OPTIMIZERS = tuple(OPTIMIZERS)
GENTLER: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3, "eps": 1e-8},
    "adafactor": {"lr": 3e-3},
    "lion": {"lr": 3e-4},
    "sgd": {"lr": 0.1},
    "sgd_sai": {"lr": 3e-3},
    "conda": {"settings": {"projection_every": 40}},
    "sophia_g": {"lr": 3e-3, "betas": [0.965, 0.99], "settings": {"rho": 0.5}},
}
"""Settings for 150 steps where those of the registry's example, which are for a few, lead where nothing is learnt."""


def make_optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """One for all parameters; or one for the matrices of the blocks, with AdamW for the rest."""
    spec, rest = spec_of(name), list(model.parameters())
    if spec.matrices:
        matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        return [*_made(name, matrices), *_made("adamw", [p for p in rest if id(p) not in inside])]
    return _made(name, rest)


def _made(name: str, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    spec, config = spec_of(name), OptimConfig(name=name, **{**spec_of(name).example, **GENTLER.get(name, {})})
    return [spec.make([{"params": parameters, "weight_decay": 0.0}], config, config.own_settings(), None)]


def estimate_curvature(model: nn.Module, optimizer: CurvatureOptimizer, step: int) -> None:
    """From gradients of labels drawn from the model's own distribution."""
    tokens = buffer(12, 10_000 + 7 * step).batch()
    logits = model(tokens[:, :-1])
    labels = torch.distributions.Categorical(logits=logits.detach()).sample()
    F.cross_entropy(logits.transpose(1, 2), labels).backward()
    optimizer.estimate(labels.numel())
    optimizer.zero_grad()


def train(name: str, steps: int, batch_size: int = 12, make: Callable[[], ToyGPT] = ToyGPT) -> ModuleBackend:
    """A toy GPT after ``steps`` steps on all three kinds of text, ready to score."""
    torch.manual_seed(0)
    model = make()
    optimizers = make_optimizers(model, name)
    for step in range(steps):
        for optimizer in optimizers:
            if isinstance(optimizer, CurvatureOptimizer) and step % 10 == 0:
                estimate_curvature(model, optimizer, step)
        loss = per_sequence_loss(model, buffer(batch_size, 10_000 + 7 * step).batch()).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return ModuleBackend(model, optimizers, per_sequence_loss)


def as_accelerate_prepares(model: nn.Module) -> nn.Module:
    """Mixed precision as ``Accelerator.prepare`` sets it: autocast inside forward, whose outputs come out in fp32."""
    forward = torch.autocast("cpu", dtype=torch.bfloat16)(type(model).forward)

    def in_fp32(self: nn.Module, *args: Tensor) -> Tensor:
        return forward(self, *args).float()

    model.forward = MethodType(in_fp32, model)
    return model


def proxy(step: int) -> TensorCandidates:
    """32 sequences of documentation."""
    return TensorCandidates(windows(text("docs"), 32, 5_000 + step))


def real_falls(
    backend: ModuleBackend, name: str, candidates: TensorCandidates, others: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,) float64 twice: K times the fall of the mean loss of ``wanted`` (m, T) in the step that optimizer ``name``
    itself takes, in float64, on a batch of each candidate and ``others`` (K - 1, T); and the fall's linear part."""
    model, count = copy.deepcopy(backend.module).double(), 1 + len(others)
    weights, optimizers = list(model.parameters()), make_optimizers(model, name)
    start = [weight.detach().clone() for weight in weights]
    before = per_sequence_loss(model, wanted).mean()
    slopes = torch.autograd.grad(before, weights)
    shared = torch.autograd.grad(per_sequence_loss(model, others).sum() / count, weights)
    falls = []
    for sequence in candidates.batch():
        own = torch.autograd.grad(per_sequence_loss(model, sequence[None]).sum() / count, weights)
        for weight, first, rest in zip(weights, own, shared, strict=True):
            weight.grad = first + rest
        with torch.no_grad():
            for optimizer, trained in zip(optimizers, backend.optimizers, strict=True):
                optimizer.load_state_dict(trained.state_dict())
                optimizer.step()
            linear = sum((s * (old - new)).sum() for s, old, new in zip(slopes, start, weights, strict=True))
            falls.append(torch.stack([before.detach() - per_sequence_loss(model, wanted).mean(), linear]))
            torch._foreach_copy_(weights, start)
    real, linear = torch.stack(falls, 1) * count
    return real, linear


def slope(x: Tensor, y: Tensor) -> float:
    """Of the least-squares line through (N,) ``y`` over ``x``."""
    return float((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum())


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two (N,) tensors without ties."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])
