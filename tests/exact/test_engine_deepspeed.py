"""The DeepSpeed engine at every ZeRO stage equals one process of the megatron engine: training and picks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import ZERO_STAGES, EngineConfig
from megaopus.engine.deepspeed import DeepSpeedEngine
from megaopus.errors import EngineError
from megaopus.optim.config import OptimConfig
from tests.exact.scoring_runs import select_each, trained
from tests.exact.test_engine_layouts import assert_close, build, train
from tests.exact.test_scoring_layouts import assert_same_picks
from tests.harness import random_batch, run_ranks, tiny_engine

LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "dp2-tp2-sp": (4, ParallelConfig(tp=2, sequence_parallel=True)),
}
MODELS = ("gpt2", "llama")
CASE = ("llama", "adamw")
"""The model and optimizer that selections are made with."""
SOME_KEPT_WHOLE = 2000
"""Elements: between the norms and the matrices of the small models, so that stage 3 has parameters of both kinds."""


def zero(stage: int, **settings: Any) -> EngineConfig:
    return EngineConfig(name="deepspeed", zero_stage=stage, device="cpu", **{"precision": "fp32", **settings})


# -- training and picks ----------------------------------------------------------------------------------------------


def train_and_select(parallel: ParallelConfig) -> dict[tuple, Any]:
    """Everything at one layout: ('train', model, stage) and ('select', stage) -> results."""
    DeepSpeedEngine.persistence_threshold = SOME_KEPT_WHOLE
    mesh = Mesh(parallel, "cpu")
    try:
        both = mesh.shape.dp > 1 and parallel.tp > 1
        models, stages = (MODELS[1:], (3,)) if both else (MODELS, ZERO_STAGES)
        found: dict[tuple, Any] = {
            ("train", m, s): train(build(mesh, (m, "adamw"), parallel, zero(s))) for m in models for s in stages
        }
        stages = ZERO_STAGES if parallel.tp == 1 else (3,)
        return found | {("select", s): select_each(trained(mesh, CASE, parallel, zero(s))) for s in stages}
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def one_process() -> dict:
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        trained = {("train", m): train(build(mesh, (m, "adamw"), ParallelConfig())) for m in MODELS}
        return trained | {("select",): select_each(trained(mesh, CASE, ParallelConfig()))}
    finally:
        mesh.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_picks_are_those_of_one_megatron_process(layout: str, one_process: dict) -> None:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_ranks(world_size, train_and_select, parallel, timeout_s=300)
    for case in ranks[0]:
        if case[0] == "select":
            assert_same_picks([rank[case] for rank in ranks], one_process[case[:-1]], case)
        else:
            for found in ranks:
                assert_close(found[case], one_process[case[:-1]], case)


# -- checkpoints, bad gradients, recomputation -----------------------------------------------------------------------


def weights_of(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.optimizer.main_weights().items()}


def resumed(mesh: Mesh, stage: int, folder: Path) -> bool:
    """Whether two updates after a restored checkpoint are to the last bit those after its save."""
    first, second = (tiny_engine(mesh, engine=zero(stage)) for _ in range(2))
    for step in range(2):
        first.train_step(random_batch(8, step))
    average = {name: value + 1 for name, value in first.optimizer.main_weights().items()}
    first.save(folder, {"average": average})
    second.train_step(random_batch(8, 50))  # state that the checkpoint has to replace
    groups = second.load(folder, ["average"])
    second.step = first.step
    results = [[engine.train_step(random_batch(8, step)) for step in (2, 3)] for engine in (first, second)]
    same = [same_tensors(groups["average"], average), same_tensors(weights_of(first), weights_of(second))]
    return results[0] == results[1] and all(same)


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def survives_a_bad_gradient(mesh: Mesh, stage: int) -> bool:
    """Whether a gradient that is not finite on one rank leaves weights and moments of all ranks alone."""
    engine = tiny_engine(mesh, engine=zero(stage))
    engine.train_step(random_batch(8, 0))
    before = weights_of(engine) | {f"{each.name}.v": each.state["exp_avg_sq"] for each in engine.optimizer.states()}
    if mesh.rank == 1:
        parameter = next(engine.module.parameters())
        handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    applied = engine.train_step(random_batch(8, 1)).applied
    if mesh.rank == 1:
        handle.remove()
    after = weights_of(engine) | {f"{each.name}.v": each.state["exp_avg_sq"] for each in engine.optimizer.states()}
    return not applied and same_tensors(before, after) and engine.train_step(random_batch(8, 2)).applied


def recomputes_alike(mesh: Mesh, stage: int) -> bool:
    ends = []
    for recompute in (False, True):
        engine = tiny_engine(mesh, engine=zero(stage, recompute=recompute))
        ends.append([engine.train_step(random_batch(8, step)) for step in range(2)])
    return ends[0] == ends[1]


def scores_without_trace(mesh: Mesh, stage: int) -> bool:
    """Whether the next updates are to the last bit the same with and without every kind of scoring before them."""
    ends = []
    for scores in (False, True):
        engine = tiny_engine(mesh, engine=zero(stage))
        engine.train_step(random_batch(8, 0))
        if scores:
            backend = engine.scoring_backend()
            operator, gradient = backend.operator(), backend.gradient(random_batch(4, 9))
            with backend.perturbed(operator.apply(gradient), 0.37):
                moved = backend.losses(random_batch(4, 8))
            assert not torch.equal(moved, backend.losses(random_batch(4, 8)))
            backend.ghost_pass(random_batch(4, 8), backend.ghost_layers(), lambda *args: None)
        ends.append(([engine.train_step(random_batch(8, step)) for step in (1, 2)], weights_of(engine)))
    return ends[0][0] == ends[1][0] and same_tensors(ends[0][1], ends[1][1])


def learns_in_bf16(mesh: Mesh, stage: int) -> bool:
    """Whether the loss falls, weights are the main weights rounded, and moved ones come back to the last bit."""
    engine = tiny_engine(mesh, engine=zero(stage, precision="bf16"))
    losses = [engine.train_step(random_batch(8, 0)).loss for _ in range(8)]
    backend, main, batch = engine.scoring_backend(), weights_of(engine), random_batch(4, 1)
    before = backend.losses(batch)
    with backend.perturbed(backend.operator().apply(backend.gradient(batch)), -4.0):
        moved = backend.losses(batch)
    with backend.perturbed({name: torch.zeros_like(value) for name, value in main.items()}, 1.0):
        rounded = backend.losses(batch)
    same = torch.equal(rounded, before) and torch.equal(backend.losses(batch), before)
    return losses[-1] < losses[0] - 0.05 and moved.mean() < before.mean() and same and backend.coarse


def properties(folder: Path) -> dict[tuple[str, int], bool]:
    DeepSpeedEngine.persistence_threshold = SOME_KEPT_WHOLE
    mesh = Mesh(ParallelConfig(), "cpu")
    checks = (survives_a_bad_gradient, recomputes_alike, scores_without_trace, learns_in_bf16)
    try:
        found = {(check.__name__, stage): check(mesh, stage) for check in checks for stage in ZERO_STAGES}
        for stage in ZERO_STAGES:
            place = folder / str(stage)
            place.mkdir(exist_ok=True)
            found["resumed", stage] = resumed(mesh, stage, place)
        return found
    finally:
        mesh.close()


def restored(folder: Path) -> list[dict[str, Tensor]]:
    """Weights of stage-1 and stage-3 engines at this number of ranks after loading the other stage's checkpoint."""
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        found = []
        for stage in (1, 3):
            engine = tiny_engine(mesh, engine=zero(stage))
            average = engine.load(folder / str(4 - stage), ["average"])["average"]
            found.append({name: value - average[name] for name, value in weights_of(engine).items()})
        return found
    finally:
        mesh.close()


def test_resume_bad_gradients_recomputation_and_scoring(tmp_path: Path) -> None:
    for found in run_ranks(2, properties, tmp_path, timeout_s=300):
        assert [case for case, holds in found.items() if not holds] == []
    for difference in run_ranks(3, restored, tmp_path)[0]:  # at another number of ranks and another stage
        for name, value in difference.items():
            torch.testing.assert_close(value, torch.full_like(value, -1.0), rtol=0, atol=1e-6, msg=name)


def test_what_zero_cannot_serve_is_refused() -> None:
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        with pytest.raises(EngineError, match=r"optim\.name=muon: needs whole matrices"):
            tiny_engine(mesh, optim=OptimConfig(name="muon"), engine=zero(1))
    finally:
        mesh.close()
