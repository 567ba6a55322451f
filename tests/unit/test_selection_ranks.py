"""Two data-parallel ranks pick what one process picks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaopus.selection import ModuleBackend, SelectionConfig, Selector
from tests.pool import Pool

SETTINGS: dict[str, dict[str, Any]] = {
    "directional": {"proxy_half_life": 7.0},
    "boltzmann": {"sampler": "boltzmann"},
    "countsketch": {"estimator": "countsketch", "redundancy": 0.5, "sketch_dim": 512},
    "exact": {"estimator": "exact", "redundancy": 0.5},
    "high_ppl": {"method": "high_ppl"},
    "uniform": {"method": "uniform"},
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sin()).square().mean((1, 2))


def batch(seed: int, count: int) -> Tensor:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(seed))


def run(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Selections of three steps under every setting, and of one with a NaN candidate and a NaN proxy."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, batch(50 + step, 8)).mean().backward()
        optimizer.step()
    scored = model if group is None else DistributedDataParallel(model, process_group=group)
    backend = ModuleBackend(scored, optimizer, loss, group=group, micro_batch_size=2)
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        config = SelectionConfig(**{"method": "opus", "score_micro_batch_size": 3, **settings})
        selector = Selector(config, backend, num_selected=5, proxy=lambda step: batch(90 + step, 7), seed=3)
        found[name] = [selector.select(batch(step, 16), step) for step in range(3)]
    config = SelectionConfig(method="opus")
    bad = batch(0, 16)
    bad[11] = torch.nan  # on the second rank only
    found["bad candidate"] = [
        Selector(config, backend, num_selected=5, proxy=lambda _: batch(90, 7), seed=3).select(bad, 0)
    ]
    bad_proxy = batch(90, 7)
    bad_proxy[6] = torch.nan
    found["bad proxy"] = [Selector(config, backend, num_selected=5, proxy=lambda _: bad_proxy, seed=3).select(bad, 0)]
    for size, proxies in ((15, 5), (3, 1)):  # uneven shares; no proxy for the second rank
        few = Selector(config, backend, num_selected=2, proxy=lambda _, n=proxies: batch(90, n), seed=3)
        found[f"{size} candidates"] = [few.select(batch(0, size), 0)]
    results: dict[str, Any] = {
        name: [
            (s.method, s.picked_ids.tolist(), s.utilities, [str(event) for event in s.events], s.ess)
            for s in selections
        ]
        for name, selections in found.items()
    }
    sizes = (7, 1)  # uneven shares; none for the second rank
    proxies = [Selector(config, backend, num_selected=5, proxy=lambda step, n=n: batch(step, n), seed=3) for n in sizes]
    return results | {"proxy losses": [selector.proxy_loss(4) for selector in proxies]}


def worker() -> dict[str, Any]:
    dist.init_process_group("gloo")
    try:
        return run(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_two_ranks_select_what_one_process_selects(pool: Pool) -> None:
    ranks = pool.run(2, worker)
    one = run(None)
    expected_losses = one.pop("proxy losses")
    assert len(set(expected_losses)) == 2
    for rank in ranks:
        assert rank["proxy losses"] == pytest.approx(expected_losses, rel=1e-6)
    for name, expected in one.items():
        for index, (method, picked, utilities, events, ess) in enumerate(expected):
            both = [rank[name][index] for rank in ranks]
            for found in both:
                assert found[0] == method, name
                assert found[1] == picked, name
                assert found[3] == events, name
                assert found[4] == pytest.approx(ess, rel=1e-3)
                if utilities is not None:
                    spread = utilities[utilities.isfinite()].std()
                    torch.testing.assert_close(found[2], utilities, rtol=0, atol=1e-3 * float(spread), equal_nan=True)
            if utilities is not None:  # bitwise on both ranks
                assert torch.equal(both[0][2].nan_to_num(7.0), both[1][2].nan_to_num(7.0))
    assert one["bad candidate"][0][3] == ["utility not finite: candidates [11]"]
    assert one["bad proxy"][0][0] == "uniform"
