"""A small net, its training, and selectors over it, for the tests of the selector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaopus.selection import ModuleBackend, Selection, SelectionConfig, Selector
from megaopus.selection.config import GuardConfig

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
    config = SelectionConfig(
        **{"method": "opus", "sketch_dim": 256, "proxy_half_life": 0.0, "guards": UNGUARDED, **settings}
    )
    return Selector(config, backend or make_backend(), num_selected=K, proxy=proxy_of, seed=seed)


def sentences(selection: Selection) -> list[str]:
    """Return what happened, in words."""
    return [str(event) for event in selection.events]
