"""Muon against its published formula and torch's own, and the learning-rate schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.gpt_forward import SampledLabels
from megaopus.newton_schulz import orthogonalise
from megaopus.optim import muon as muon_module
from megaopus.optim.config import OptimConfig
from megaopus.optim.muon import NS_COEFFICIENTS, Muon
from megaopus.optim.schedule import lr_factor
from megaopus.settings import problems
from tests.harness import random_batch, save_engine, tiny_engine

SHAPES = [(7, 5), (5, 7), (6, 6), (33, 4)]


def reference_muon(w: np.ndarray, gradients: list[np.ndarray], lr: float, mu: float, decay: float) -> np.ndarray:
    """Muon in float64, written from the formula: M, U, X, five Newton-Schulz steps on the short side, W."""
    momentum = np.zeros_like(w)
    m, n = w.shape
    for g in gradients:
        momentum = mu * momentum + (1 - mu) * g
        u = (1 - mu) * g + mu * momentum
        x = (u.T if m > n else u) / np.linalg.norm(u)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        w = (1 - lr * decay) * w - lr * math.sqrt(max(1, m / n)) * (x.T if m > n else x)
    return w


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_its_formula_in_float64(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=shape)
    gradients = [rng.normal(size=shape) for _ in range(4)]
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.2, eps=0.0)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    expected = reference_muon(start, gradients, 0.1, 0.9, 0.2)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_torchs_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, momentum=0.9)
    torchs = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    assert (ours - theirs).norm() / (ours - start).norm() < 0.05
    assert mine.param_groups[0].keys() <= torchs.param_groups[0].keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_are_orthogonalised_together_as_alone(shape: tuple[int, int]) -> None:
    several = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = orthogonalise(several, 5, NS_COEFFICIENTS, 1e-7)
    for matrix, found in zip(several, together, strict=True):
        torch.testing.assert_close(found, orthogonalise(matrix, 5, NS_COEFFICIENTS, 1e-7))
    # what a GPU works in
    coarse = orthogonalise(several.bfloat16(), 5, NS_COEFFICIENTS, 1e-7).double()
    assert (coarse - together).norm() / together.norm() < 0.03


def test_muon_updates_in_turns_as_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA matrices of a shape are stacked; here as many as on CUDA, in turns of two and of one."""
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in [*SHAPES, *SHAPES, *SHAPES[:2]]]

    def updated() -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(start.clone()) for start in starts]
        for weight in weights:
            weight.grad = weight.detach().cos()
        optimizer = Muon(weights, lr=0.1)
        for _ in range(2):
            optimizer.step()
        return [weight.detach() for weight in weights]

    alone = updated()
    asked: list[int] = []
    real = Muon.orthogonal
    monkeypatch.setattr(
        Muon, "orthogonal", lambda self, whole, group: asked.append(whole.ndim) or real(self, whole, group)
    )
    monkeypatch.setattr(muon_module, "together", lambda shape, device: 2)
    torch.testing.assert_close(updated(), alone)
    # of 7 x 5 and 5 x 7 three each, of the others two
    assert asked == [3, 2, 3, 2, 3, 3] * 2


def test_muon_refuses_what_is_not_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"matrices only, not a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def factors(total: int, **settings: object) -> list[float]:
    config = OptimConfig(**settings)
    return [lr_factor(config, step, total) for step in range(total)]


def test_schedules() -> None:
    assert factors(4, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    cosine = factors(11, schedule="cosine", min_lr_ratio=0.1)
    assert cosine[0] == 1.0
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[5] == pytest.approx(0.55)
    assert all(a >= b for a, b in itertools.pairwise(cosine))
    wsd = factors(10, schedule="wsd", decay_steps=4, min_lr_ratio=0.2)
    assert wsd == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("schedule", "decay_steps"), [("cosine", 0), ("wsd", 4)])
def test_a_last_learning_rate_of_its_own(schedule: str, decay_steps: int) -> None:
    settings = {"schedule": schedule, "decay_steps": decay_steps, "lr": 6e-4}
    assert 6e-4 * factors(11, min_lr=6e-5, **settings)[-1] == pytest.approx(6e-5)
    assert factors(11, min_lr=6e-5, **settings) == pytest.approx(factors(11, min_lr_ratio=0.1, **settings))
    (problem,) = problems(OptimConfig(lr=1e-4, min_lr=2e-4))
    assert (problem.key, problem.reason) == ("min_lr", "above the peak, optim.lr = 0.0001")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    alone = Mesh(ParallelConfig(), "cpu")
    yield alone
    alone.close()


def test_groups_of_the_engine(mesh: Mesh) -> None:
    """Muon has the blocks' matrices, AdamW the rest; norms and biases are not decayed; the peak is scaled."""
    engine = tiny_engine(
        mesh, optim=OptimConfig(name="muon", lr=0.01, matrix_lr=0.1, weight_decay=0.3, matrix_weight_decay=0.2)
    )
    names = {id(p): name for name, p in engine.module.named_parameters()}
    muon, adamw = engine.optimizer.torch_optimizers
    held = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert all("decoder.layers" in name and name.endswith("weight") and "norm" not in name for name in held)
    assert len(held) == 2 * 4
    for group in adamw.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() == 2 else 0.0)
    everything = [id(p) for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(names)
    engine.optimizer.set_step(0, 0.5)
    assert {group["lr"] for group in muon.param_groups} == {0.05}
    assert {group["lr"] for group in adamw.param_groups} == {0.005}


def test_muons_momentum_warms_up_and_its_operator_with_it(mesh: Mesh) -> None:
    settings = {"momentum": 0.95, "momentum_start": 0.85, "momentum_warmup_steps": 300}
    engine = tiny_engine(mesh, optim=OptimConfig(name="muon", schedule="constant", settings=settings))
    muon, _ = engine.optimizer.torch_optimizers
    for step, expected in ((0, 0.85), (150, 0.9), (300, 0.95), (5000, 0.95)):
        engine.optimizer.set_step(step, 1.0)
        assert muon.param_groups[0]["momentum"] == pytest.approx(expected)
    engine.train_step(random_batch(8, 0))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    factors = {}
    for step in (0, 300):
        engine.step = step
        sides = engine.scoring_backend().operator().sides(name)
        factors[step] = next(side for side in sides if side is not None)
    torch.testing.assert_close(factors[300] / (1 - 0.95**2), factors[0] / (1 - 0.85**2))


def test_a_resumed_run_has_the_momentum_of_its_step(mesh: Mesh, tmp_path: Path) -> None:
    settings = {"momentum_start": 0.5, "momentum_warmup_steps": 4}
    first, second = (tiny_engine(mesh, optim=OptimConfig(name="muon", settings=settings)) for _ in range(2))
    for step in range(2):
        first.train_step(random_batch(8, step))
    save_engine(first, tmp_path, {})
    second.load(tmp_path, [])
    second.step = 2
    for engine in (first, second):
        engine.train_step(random_batch(8, 2))
        assert engine.optimizer.torch_optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.725)
    for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sampled_labels_follow_the_models_distribution(mesh: Mesh) -> None:
    positions, vocab = 20_000, 7
    logits = torch.tensor([3.0, 1.0, 0.0, -2.0, 2.0, -9.0, 0.5])
    sampled = SampledLabels(mesh, 1, 5)
    chances = sampled.uniforms(torch.arange(2), positions)
    labels = sampled._draw(logits.expand(2, positions, vocab), chances)
    assert labels.shape == (2, positions)
    expected = logits.softmax(0).double()
    found = torch.bincount(labels.flatten(), minlength=vocab) / labels.numel()
    deviation = (expected * (1 - expected) / labels.numel()).sqrt()
    assert ((found - expected).abs() <= 4 * deviation + 1e-6).all()
    assert not torch.equal(labels[0], labels[1])
    again = SampledLabels(mesh, 1, 5).uniforms(torch.tensor([1]), positions)
    assert torch.equal(again[0], chances[1])  # of the sequence, whoever works on it
    assert not torch.equal(SampledLabels(mesh, 1, 6).uniforms(torch.tensor([1]), positions), again)


def test_curvature_is_estimated_when_it_is_due_and_left_alone_when_it_is_not_finite(mesh: Mesh) -> None:
    engine = tiny_engine(mesh, optim=OptimConfig(name="sophia_g", lr=1e-4, settings={"curvature_every": 3}))
    (sophia,) = engine.optimizer.torch_optimizers
    seen = []
    for step in range(5):
        engine.train_step(random_batch(8, step))
        seen.append(torch.cat([state["hessian"].flatten().clone() for state in sophia.state.values()]))
    assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [True, True, False, True]
    assert seen[0].max() > 0
    with torch.no_grad():
        engine.module.decoder.final_layernorm.bias[0] = torch.nan
    engine.step = 6
    assert not engine.train_step(random_batch(8, 6)).applied
    assert torch.equal(torch.cat([state["hessian"].flatten() for state in sophia.state.values()]), seen[-1])


def test_clipping_by_the_global_norm(mesh: Mesh) -> None:
    """SGD without momentum moves the weights by lr * gradient, scaled down to the largest allowed norm."""
    optim = OptimConfig(
        name="sgd", lr=1.0, settings={"momentum": 0.0}, weight_decay=0.0, clip_grad=0.01, schedule="constant"
    )
    engine = tiny_engine(mesh, optim=optim)
    before = torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])
    result = engine.train_step(random_batch(8, 0))
    after = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    assert result.grad_norm > 0.1
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)
