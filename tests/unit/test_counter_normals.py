"""Numbers that follow from their place: normal, apart from each other, the same at every layout and from now on."""

from __future__ import annotations

import pytest
import torch

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.models import counter_normals
from megaopus.models.counter_normals import fill_normal, normals
from megaopus.models.gpt import full_parameters
from tests.harness import MODELS, tiny_engine
from tests.pool import Pool

COUNT = 1 << 18


def splitmix64(state: int) -> int:
    """As its authors give it, in Python's own numbers."""
    mask = (1 << 64) - 1
    mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1, 0x123456789ABCDEF0])
def test_numbers_are_box_muller_of_splitmix64(key: int) -> None:
    places = [0, 1, 5, 1 << 40]
    expected = []
    for place in places:
        bits = splitmix64((key + (place + 1) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1))
        high, low = torch.tensor([bits >> 32, bits & 0xFFFFFFFF], dtype=torch.float64) * 2.0**-32
        expected.append((-2 * (high + 2.0**-32).log()).sqrt() * (2 * torch.pi * low).cos())
    torch.testing.assert_close(normals(key, torch.tensor(places)).double(), torch.stack(expected), rtol=0, atol=1e-5)


def test_numbers_are_normal_and_those_of_two_keys_independent() -> None:
    found = torch.stack([normals(key, torch.arange(COUNT)) for key in (3, 4)]).double()
    assert found.isfinite().all()
    error = COUNT**-0.5
    assert found.mean(1).abs().max() < 4 * error
    assert (found.var(1) - 1).abs().max() < 4 * error * 2**0.5
    assert (found**4).mean(1).sub(3).abs().max() < 4 * error * 96**0.5
    for first, second in ((found[0], found[1]), (found[0, 1:], found[0, :-1])):
        assert abs(float((first * second).mean())) < 4 * error
    ordered = found[0].sort().values
    steps = torch.arange(1, COUNT + 1) / COUNT
    assert (torch.special.ndtr(ordered) - steps).abs().max() < 2 * error  # Kolmogorov and Smirnov, p = .0007


def test_a_part_is_what_the_whole_has_there(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = torch.empty(12, 10), torch.empty(3, 4)
    rows, columns = torch.tensor([1, 7, 8]), torch.tensor([0, 3, 4, 9])
    fill_normal(whole, 0.5, 9, torch.arange(12), torch.arange(10), 10)
    monkeypatch.setattr(counter_normals, "_ROWS_OF", 8)  # two rows at a time
    fill_normal(part, 0.5, 9, rows, columns, 10)
    assert torch.equal(part, whole[rows][:, columns])


def drawn(parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """First weights of a small Llama."""
    mesh = Mesh(parallel, "cpu")
    try:
        kind = EngineConfig(device="cpu", precision="fp32", use_cpu_initialization=False)
        engine = tiny_engine(mesh, model=MODELS["llama"], parallel=parallel, engine=kind)
        return full_parameters(engine.module, mesh)
    finally:
        mesh.close()


def test_a_model_drawn_on_its_device_is_the_same_at_every_layout(pool: Pool) -> None:
    alone = drawn(ParallelConfig())
    for found in pool.run(4, drawn, ParallelConfig(tp=2, pp=2)):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], value) for name, value in alone.items())
    matrix = alone["decoder.layers.0.mlp.linear_fc1.weight"]
    assert matrix.std().item() == pytest.approx(MODELS["llama"].init_std, rel=0.1)
