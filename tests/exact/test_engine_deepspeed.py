"""The DeepSpeed engine at every ZeRO stage equals one process of the megatron engine: training and picks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import ZERO_STAGES, EngineConfig
from megaopus.engine.deepspeed.engine import DeepSpeedEngine
from megaopus.engine.deepspeed.flat_matrices import Matrix, over_flat_parts
from megaopus.errors import EngineError
from megaopus.optim.build import state_names
from megaopus.optim.config import OptimConfig
from megaopus.optim.muon import Muon
from megaopus.optim.registry import OPTIMIZERS
from tests.exact.scoring_runs import SETTINGS, select_each, select_uneven, trained
from tests.exact.test_engine_layouts import assert_close, assert_sums_up, build, train
from tests.exact.test_scoring_layouts import assert_same_picks
from tests.harness import example, random_batch, save_engine, tiny_engine, wholes
from tests.pool import Jobs, Pool

LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "dp2-tp2-sp": (4, ParallelConfig(tp=2, sequence_parallel=True)),
}
SERVED = tuple(name for name, spec in OPTIMIZERS.items() if spec.refusal_of_pieces() is None)
SCORED = ("adamw", "muon", "sgd")
EVERY_SETTING = [("adamw", 1), ("adamw", 3), ("muon", 3)]
"""(optimizer, stage) at which every estimator and method is compared."""
SOME_SETTINGS = [("adamw", 2), ("muon", 1), ("sgd", 3)]
THREE = ("directional", "adjoint", "countsketch")
"""Estimators that are compared at those."""
UNEVEN = [("adamw", 1), ("adamw", 3), ("muon", 3)]
"""(optimizer, stage) of candidates that do not divide over the ranks."""
STAGES = {
    ("gpt2", "adamw"): ZERO_STAGES,
    ("llama", "adamw"): (3,),
    ("llama", "muon"): ZERO_STAGES,
    ("gpt2", "sgd"): (1, 3),
    ("llama", "lion"): (2, 3),
}
TRAINED = [(case, stage) for case, stages in STAGES.items() for stage in stages]
BOTH = [(("llama", "adamw"), 3), (("llama", "muon"), 1), (("llama", "muon"), 3)]
"""(case, stage): what is trained at the layout that is data- and tensor-parallel at once."""
SOME_KEPT_WHOLE = 2000
"""Elements: between the norms and the matrices of the small models, so that stage 3 has parameters of both kinds."""


def zero(stage: int, **settings: Any) -> EngineConfig:
    return EngineConfig(name="deepspeed", zero_stage=stage, device="cpu", **{"precision": "fp32", **settings})


# -- training and picks ----------------------------------------------------------------------------------------------


def train_and_select(layout: str) -> dict[tuple, Any]:
    """Everything at one layout: ('train', (model, optimizer), stage) and ('select', optimizer, stage) -> results."""
    parallel = LAYOUTS[layout][1]
    DeepSpeedEngine.persistence_threshold = SOME_KEPT_WHOLE
    mesh = Mesh(parallel, "cpu")
    try:
        both = mesh.shape.dp > 1 and parallel.tp > 1
        found: dict[tuple, Any] = {
            ("train", case, stage): train(build(mesh, case, parallel, zero(stage)))
            for case, stage in (BOTH if both else TRAINED)
        }
        for optimizer, stage in EVERY_SETTING[1:] if both else [*EVERY_SETTING, *SOME_SETTINGS]:
            engine = trained(mesh, ("llama", optimizer), parallel, zero(stage))
            names = SETTINGS if (optimizer, stage) in EVERY_SETTING else THREE
            found["select", optimizer, stage] = select_each(engine, names)
            if (optimizer, stage) in UNEVEN:
                found["select", "uneven", optimizer, stage] = select_uneven(engine)
        return found
    finally:
        mesh.close()


def megatron_alone(layout: str) -> dict[tuple, Any]:
    """The same on one process of the megatron engine, without stages."""
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        one = ParallelConfig()
        found: dict[tuple, Any] = {("train", case): train(build(mesh, case, one)) for case in STAGES}
        for optimizer in SCORED:
            engine = trained(mesh, ("llama", optimizer), one)
            found["select", optimizer] = select_each(engine)
            found["select", "uneven", optimizer] = select_uneven(engine)
        return found
    finally:
        mesh.close()


@pytest.fixture(scope="module")
def one_process(pool: Pool) -> Jobs[str]:
    return pool.jobs({"one": 1}, megatron_alone).begin(["one"])


@pytest.fixture(scope="module")
def each_rank(pool: Pool, one_process: Jobs[str], selected: Callable[..., list[str]]) -> Jobs[str]:
    """Layout -> what each rank found."""
    sizes = {layout: size for layout, (size, _) in LAYOUTS.items()}
    return pool.jobs(sizes, train_and_select).begin(selected("layout"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_picks_are_those_of_one_megatron_process(
    layout: str, one_process: Jobs[str], each_rank: Jobs[str]
) -> None:
    (alone,), ranks = one_process["one"], each_rank[layout]
    for case in ranks[0]:
        if case[0] == "select":
            assert_same_picks([rank[case] for rank in ranks], alone[case[:-1]], case)
        else:
            for found in ranks:
                assert_close(found[case], alone[case[:-1]], case)
                assert_sums_up(found[case], case[1][0])


# -- checkpoints, bad gradients, recomputation -----------------------------------------------------------------------


def weights_of(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.optimizer.main_weights().items()}


def states_of(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """This rank's fragments of second moments or momentum."""
    return {each.name: each.state[state_names(each.optimizer)[-1]].clone() for each in engine.optimizer.states()}


def resumed(mesh: Mesh, optimizer: str, stage: int, folder: Path) -> bool:
    """Return whether two updates after a restored checkpoint are to the last bit those after its save."""
    first, second = (tiny_engine(mesh, optim=example(optimizer), engine=zero(stage)) for _ in range(2))
    for step in range(2):
        first.train_step(random_batch(8, step))
    fragments = first.optimizer.fragments
    average = {name: fragments[name].cut(value) + 1 for name, value in first.optimizer.main_weights().items()}
    folder.mkdir(exist_ok=True)
    save_engine(first, folder, {"average": average, "states": states_of(first)})
    second.train_step(random_batch(8, 50))  # state that the checkpoint has to replace
    groups = second.load(folder, ["average"])
    second.step = first.step
    results = [[engine.train_step(random_batch(8, step)) for step in (2, 3)] for engine in (first, second)]
    same = [same_tensors(groups["average"], average), same_tensors(weights_of(first), weights_of(second))]
    return results[0] == results[1] and all(same)


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def survives_a_bad_gradient(mesh: Mesh, stage: int) -> bool:
    """Return whether a gradient that is not finite on one rank leaves weights and state of all ranks alone."""
    engine = tiny_engine(mesh, optim=example("muon"), engine=zero(stage))
    engine.train_step(random_batch(8, 0))
    before = weights_of(engine), states_of(engine)
    if mesh.rank == 1:
        parameter = next(engine.module.parameters())
        handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    applied = engine.train_step(random_batch(8, 1)).applied
    if mesh.rank == 1:
        handle.remove()
    same = all(map(same_tensors, before, (weights_of(engine), states_of(engine))))
    return not applied and same and engine.train_step(random_batch(8, 2)).applied


def recomputes_alike(mesh: Mesh, stage: int) -> bool:
    ends = []
    for recompute in (False, True):
        engine = tiny_engine(mesh, engine=zero(stage, recompute=recompute))
        ends.append([engine.train_step(random_batch(8, step)) for step in range(2)])
    return ends[0] == ends[1]


def scores_without_trace(mesh: Mesh, stage: int) -> bool:
    """Return whether the next updates are to the last bit the same with and without scoring of every kind first."""
    ends = []
    for scores in (False, True):
        engine = tiny_engine(mesh, engine=zero(stage))
        engine.train_step(random_batch(8, 0))
        if scores:
            backend = engine.scoring_backend()
            operator, gradient = backend.operator(), backend.gradient(random_batch(4, 9))
            with backend.perturbed(operator.apply(gradient)) as move:
                move(0.37)
                moved = backend.losses(random_batch(4, 8))
            assert not torch.equal(moved, backend.losses(random_batch(4, 8)))
            backend.ghost_pass(random_batch(4, 8), backend.ghost_layers(), lambda *args: None)
        ends.append(([engine.train_step(random_batch(8, step)) for step in (1, 2)], weights_of(engine)))
    return ends[0][0] == ends[1][0] and same_tensors(ends[0][1], ends[1][1])


def learns_in_bf16(mesh: Mesh, stage: int) -> bool:
    """Return whether the loss falls, weights are the main weights rounded, and moved ones come back to the last bit."""
    engine = tiny_engine(mesh, engine=zero(stage, precision="bf16"))
    losses = [engine.train_step(random_batch(8, 0)).loss for _ in range(8)]
    backend, batch = engine.scoring_backend(), random_batch(4, 1)
    before = backend.losses(batch)
    with backend.perturbed(backend.operator().apply(backend.gradient(batch))) as move:
        move(4.0)
        move(-4.0)
        moved = backend.losses(batch)
        move(0.0)
        rounded = backend.losses(batch)
    same = torch.equal(rounded, before) and torch.equal(backend.losses(batch), before)
    return losses[-1] < losses[0] - 0.05 and moved.mean() < before.mean() and same and backend.computes_in_16_bits


def compare_bf16(mesh: Mesh) -> None:
    """Losses, gradient norms by layer and fp32 main weights of three updates at every stage against the megatron
    engine's on the same ranks.
    """
    ends = []
    for kind in (EngineConfig(device="cpu", precision="bf16"), *(zero(s, precision="bf16") for s in ZERO_STAGES)):
        engine = build(mesh, ("llama", "muon"), ParallelConfig(), kind)
        results = [engine.train_step(random_batch(8, step), layer_grad_norms=True) for step in range(3)]
        layers = {f"layers {r}": torch.tensor(list(results[r].layer_grad_norms.values())) for r in range(3)}
        numbers = {"losses": torch.tensor([result.loss for result in results]), **layers}
        ends.append({"numbers": numbers, "weights": weights_of(engine)})
        assert_close(ends[-1], ends[0], ("bf16", kind.zero_stage))


def properties(folder: Path) -> dict[tuple, bool]:
    DeepSpeedEngine.persistence_threshold = SOME_KEPT_WHOLE
    mesh = Mesh(ParallelConfig(), "cpu")
    checks = (survives_a_bad_gradient, recomputes_alike, scores_without_trace, learns_in_bf16)
    try:
        found = {(check.__name__, stage): check(mesh, stage) for check in checks for stage in ZERO_STAGES}
        for optimizer, stage in product(SERVED, ZERO_STAGES):
            found["resumed", optimizer, stage] = resumed(mesh, optimizer, stage, folder / f"{optimizer}{stage}")
        compare_bf16(mesh)
        return found
    finally:
        mesh.close()


def restored(mesh: Mesh, optimizer: str, stage: int, folder: Path, saved_by: str | None = None) -> bool:
    """Return whether weights and state are those of another stage's checkpoint at another number of ranks."""
    engine = tiny_engine(mesh, optim=example(optimizer), engine=zero(stage))
    groups = engine.load(folder / f"{saved_by or optimizer}{4 - stage}", ["average", "states"])
    found = {name: value + 1 for name, value in weights_of(engine).items()}
    return same_tensors(wholes(engine, groups["average"]), found) and same_tensors(groups["states"], states_of(engine))


def shares_matrices(mesh: Mesh, nesterov: bool) -> bool:
    """Return whether flat parts, empty and padded ones too, are updated as the whole matrices they are parts of."""
    shapes = [torch.Size(shape) for shape in ((8, 12), (12, 8), (6, 6), (3, 40), (40, 3))]
    cuts = [0, 100, 100, 472]  # 468 elements over three ranks
    generator = torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    padding = torch.zeros(cuts[-1] - sum(p.numel() for p in whole))
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "nesterov": nesterov}
    plain, shared = Muon(whole, **settings), over_flat_parts(Muon)(whole, **settings)

    def part() -> Tensor:
        """This rank's, of the weights."""
        return torch.cat([*(p.detach().flatten() for p in whole), padding])[cuts[mesh.rank] : cuts[mesh.rank + 1]]

    flat, matrices, start = nn.Parameter(part()), [], 0
    shared.param_groups[0]["params"] = [flat]
    for p in whole:
        spans = [(max(start, first), min(start + p.numel(), last)) for first, last in pairwise(cuts)]
        counts = [max(0, last - first) for first, last in spans]
        offset = spans[mesh.rank][0] - cuts[mesh.rank] if counts[mesh.rank] else 0
        matrices.append(Matrix("", p, p.shape, flat, offset, counts))
        start += p.numel()
    shared.place(matrices, mesh.dp_group)
    for _ in range(3):
        for p in whole:
            p.grad = torch.randn(p.shape, generator=generator)
        gradient = torch.cat([*(p.grad.flatten() for p in whole), padding])
        flat.grad = gradient[cuts[mesh.rank] : cuts[mesh.rank + 1]]
        plain.step()
        shared.step()
    return torch.allclose(flat, part(), rtol=1e-6, atol=1e-6)


def on_three_ranks(folder: Path) -> dict[tuple, bool]:
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        with pytest.raises(EngineError, match="the checkpoint is of another optimizer: no momentum_buffer of decoder"):
            restored(mesh, "muon", 1, folder, saved_by="adamw")
        cases = product(SERVED, (1, 3))
        found: dict[tuple, bool] = {("restored", *case): restored(mesh, *case, folder) for case in cases}
        return found | {("shares", nesterov): shares_matrices(mesh, nesterov) for nesterov in (True, False)}
    finally:
        mesh.close()


def test_resume_bad_gradients_recomputation_bf16_and_scoring(pool: Pool, tmp_path: Path) -> None:
    for world_size, cases in ((2, properties), (3, on_three_ranks)):
        for found in pool.run(world_size, cases, tmp_path):
            assert [case for case, holds in found.items() if not holds] == []


def test_what_zero_cannot_serve_is_refused() -> None:
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        with pytest.raises(EngineError, match=r"optim\.name=conda: needs whole tensors"):
            tiny_engine(mesh, optim=OptimConfig(name="conda"), engine=zero(1))
    finally:
        mesh.close()
