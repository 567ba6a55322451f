"""Training at every layout equals one process; the engine's maths equals a plain PyTorch GPT's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks.reference_gpt import ReferenceGPT
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.models.config import ModelConfig
from megaopus.models.gpt import full_parameters
from megaopus.optim.config import OptimConfig
from tests.harness import TINY, random_batch, run_ranks, tiny_engine

LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tied=False,
    qk_norm=True,
)
MODELS = {
    "gpt2": TINY,
    "llama": LLAMA,
    "gpt2-4-layers": replace(TINY, num_layers=4),
    "llama-4-layers": replace(LLAMA, num_layers=4),
}
OPTIMIZERS = {
    # eps above rounding noise: at 1e-8, Adam's first steps turn the last bit of a tiny gradient into a full step
    "adamw": OptimConfig(name="adamw", lr=3e-3, eps=1e-4, warmup_steps=2),
    "muon": OptimConfig(name="muon", lr=3e-3, eps=1e-4, muon_lr=0.02, muon_weight_decay=0.1),
}


def train(
    mesh: Mesh, model: str, optimizer: str, parallel: ParallelConfig, engine: EngineConfig | None = None
) -> tuple:
    """(losses, gradient norms, whole parameters, validation losses) of four steps of eight sequences."""
    built = tiny_engine(mesh, model=MODELS[model], optim=OPTIMIZERS[optimizer], parallel=parallel, engine=engine)
    results = [built.train_step(random_batch(8, step)) for step in range(4)]
    evaluation = built.evaluate(random_batch(5, 99))
    weights = full_parameters(built.module, mesh, built.optimizer.main_weights())
    return [r.loss for r in results], [r.grad_norm for r in results], weights, evaluation


# (model, optimizer)
EVERY = [(m, o) for m in ("gpt2", "llama") for o in OPTIMIZERS]
TWO = [("gpt2", "muon"), ("llama", "adamw")]
ADAMW = [(m, "adamw") for m in ("gpt2", "llama")]
DEEP = [("gpt2-4-layers", "adamw"), ("llama-4-layers", "muon")]


def train_all(parallel: ParallelConfig, cases: Sequence[tuple[str, str]]) -> dict:
    """Every case at one layout."""
    mesh = Mesh(parallel, "cpu")
    try:
        return {case: train(mesh, *case, parallel) for case in cases}
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def one_process() -> dict:
    return train_all(ParallelConfig(), [*EVERY, *DEEP])


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    alone = Mesh(ParallelConfig(), "cpu")
    yield alone
    alone.close()


LAYOUTS = {
    "dp2": (2, ParallelConfig(), EVERY),
    "tp2": (2, ParallelConfig(tp=2), EVERY),
    "tp2-sequence-parallel": (2, ParallelConfig(tp=2, sequence_parallel=True), EVERY),
    "pp2": (2, ParallelConfig(pp=2), EVERY),
    "tp2-pp2": (4, ParallelConfig(tp=2, pp=2), EVERY),
    "cp2": (2, ParallelConfig(cp=2), EVERY),
    "cp2-tp2": (4, ParallelConfig(cp=2, tp=2, sequence_parallel=True), TWO),
    "dp2-cp2": (4, ParallelConfig(cp=2), TWO),
    "dp2-distributed-optimizer": (2, ParallelConfig(distributed_optimizer=True), ADAMW),
    "dp2-tp2-distributed-optimizer": (4, ParallelConfig(tp=2, distributed_optimizer=True), ADAMW),
    "pp2-vpp2": (2, ParallelConfig(pp=2, vpp=2), DEEP),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, one_process: dict) -> None:
    world_size, parallel, cases = LAYOUTS[layout]
    ranks = run_ranks(world_size, train_all, parallel, cases)
    for case in cases:
        assert_same_training([rank[case] for rank in ranks], one_process[case], case)


def assert_same_training(ranks: list[tuple], expected: tuple, case: tuple) -> None:
    """What ``train`` returned on each rank against what it returned on one process."""
    losses, norms, weights, evaluation = expected
    for found in ranks:
        assert_close(found[0], losses, case)
        assert_close(found[1], norms, case)
        assert found[2].keys() == weights.keys()
        for name, value in weights.items():
            error = (found[2][name] - value).norm() / value.norm()
            assert error < 1e-5, f"{case} {name}: relative error {error:.1e}"
        torch.testing.assert_close(found[3], evaluation, rtol=1e-5, atol=0)


def assert_close(found: list[float], expected: list[float], case: tuple) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0, msg=str(case))


def test_recompute_changes_nothing(one_process: dict, mesh: Mesh) -> None:
    engine = EngineConfig(device="cpu", precision="fp32", recompute=True)
    losses, norms, weights, _ = train(mesh, "gpt2", "adamw", ParallelConfig(), engine)
    assert (losses, norms) == one_process["gpt2", "adamw"][:2]
    assert all(torch.equal(value, weights[name]) for name, value in one_process["gpt2", "adamw"][2].items())


def test_gradient_equals_plain_pytorch(mesh: Mesh) -> None:
    engine = tiny_engine(mesh)
    plain = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=128, positions=16)
    plain.copy_weights(engine.module.named_parameters())
    batch = random_batch(8, 0)
    found = engine.mean_gradient(batch)
    loss = plain(batch.batch()).mean()
    loss.backward()
    torch.testing.assert_close(engine.evaluate(batch).mean().float(), loss.detach(), rtol=1e-6, atol=0)
    gradient = ReferenceGPT(layers=2, hidden=32, heads=4, vocab=128, positions=16)
    gradient.copy_weights(found.items())
    for (name, parameter), value in zip(plain.named_parameters(), gradient.parameters(), strict=True):
        error = (parameter.grad - value).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_bf16_keeps_fp32_main_weights(mesh: Mesh) -> None:
    engine = tiny_engine(mesh, engine=EngineConfig(device="cpu", precision="bf16"))
    losses = [engine.train_step(random_batch(8, 0)).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in engine.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.main_param.dtype == torch.float32, name
        assert torch.equal(parameter.main_param.to(torch.bfloat16), parameter), name


def test_a_non_finite_gradient_leaves_every_weight_alone(mesh: Mesh) -> None:
    engine = tiny_engine(mesh)
    engine.train_step(random_batch(8, 0))
    with torch.no_grad():
        engine.module.decoder.final_layernorm.bias[0] = torch.nan
    before = {name: p.clone() for name, p in engine.module.named_parameters()}
    assert not engine.train_step(random_batch(8, 1)).applied
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
