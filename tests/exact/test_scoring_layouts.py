"""Scoring at every layout equals one process: the same utilities, the same picks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.optim.config import OptimConfig
from megaopus.selection import Selection, SelectionConfig, Selector
from tests.exact.test_engine_layouts import MODELS
from tests.harness import random_batch, run_layouts, tiny_engine

OPTIMIZERS = {
    # eps above rounding noise: at 1e-8, an embedding row hardly ever seen turns the last bit into a large step
    "adamw": OptimConfig(name="adamw", lr=1e-2, eps=1e-4),
    "muon": OptimConfig(name="muon", lr=1e-2, eps=1e-4, muon_lr=0.02),
}
CASES = (("gpt2-4-layers", "adamw"), ("llama-4-layers", "muon"))
COMMON: dict[str, Any] = {"method": "opus", "proxy_batch_size": 4, "score_micro_batch_size": 4, "sketch_dim": 256}
SETTINGS: dict[str, dict[str, Any]] = {
    # a whole step: the difference of two fp32 losses is then well above their rounding
    "directional": {"redundancy": 0.5, "epsilon": 1.0},
    "directional-blocks": {"layers": r"layers\.[13]\.", "epsilon": 4.0, "score_length": 8},
    "adjoint": {"estimator": "adjoint", "layers": "all", "proxy_ema": 0.0},
    "countsketch": {"estimator": "countsketch", "sampler": "boltzmann"},
    "kronecker": {"estimator": "kronecker", "redundancy": 0.5},
    "high_ppl": {"method": "high_ppl"},
}
LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "dp4": (4, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2-sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2-vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
    "tp2-sp-pp2": (4, ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
    "dp2-tp2-sp": (4, ParallelConfig(tp=2, sequence_parallel=True)),
    "dp2-pp2": (4, ParallelConfig(pp=2)),
    "dp2-distributed-optimizer": (2, ParallelConfig(distributed_optimizer=True)),
}


def select(
    mesh: Mesh, model: str, optimizer: str, parallel: ParallelConfig, kind: EngineConfig | None = None
) -> dict[str, Any]:
    """(picked ids, utilities, proxy loss) of each setting's steps 2 and 3, after two updates; ``kind`` of engine."""
    engine = tiny_engine(mesh, model=MODELS[model], optim=OPTIMIZERS[optimizer], parallel=parallel, engine=kind)
    for step in range(2):
        engine.train_step(random_batch(8, step))
    found = {}
    for name, settings in SETTINGS.items():
        config = SelectionConfig(**{**COMMON, **settings})
        selector = Selector(
            config, engine.scoring_backend(), num_selected=6, proxy=lambda step: random_batch(4, 700 + step), seed=7
        )
        picks = [selector.select(random_batch(16, step), step) for step in (2, 3)]
        assert all(pick.method == config.method and not pick.events for pick in picks)
        found[name] = [(pick.picked_ids.tolist(), pick.utilities, selector.proxy_loss(pick.step)) for pick in picks]
    return found


def select_with_faults(mesh: Mesh, parallel: ParallelConfig) -> dict[str, Selection]:
    """Selections in which the last rank alone sees a fault: in the proxy gradient, in one candidate's loss, in all."""
    engine = tiny_engine(mesh, model=MODELS["gpt2-4-layers"], optim=OPTIMIZERS["adamw"], parallel=parallel)
    engine.train_step(random_batch(8, 0))
    real = engine.scoring_backend()
    gradient, losses = real.gradient, real.losses
    last = mesh.rank == mesh.shape.world_size - 1

    def bad_gradient(*args: Any) -> dict[str, torch.Tensor]:
        return {name: value * torch.nan if last else value for name, value in gradient(*args).items()}

    def bad_losses(rows: slice) -> Any:
        def found(*args: Any, **kwargs: Any) -> torch.Tensor:
            parts = losses(*args, **kwargs)
            if last:
                parts[rows] = torch.nan
            return parts

        return found

    results = {}
    patches = {
        "gradient": {"gradient": bad_gradient},
        "candidate": {"losses": bad_losses(slice(-1, None))},
        "all": {"losses": bad_losses(slice(None))},
    }
    for fault, patch in patches.items():
        backend = engine.scoring_backend()
        for name, function in patch.items():
            setattr(backend, name, function)
        config = SelectionConfig(**COMMON, proxy_ema=0.9)
        selector = Selector(config, backend, num_selected=6, proxy=lambda step: random_batch(4, 700 + step), seed=7)
        results[fault] = selector.select(random_batch(16, 2), 2)
        assert bool(selector.state_dict()) == (fault != "gradient")  # kept out of the average
    return results


def select_layout(layout: str) -> dict[Any, Any]:
    """Every case at one layout, and faults under "faults"; "one": on one process."""
    parallel = ParallelConfig() if layout == "one" else LAYOUTS[layout][1]
    mesh = Mesh(parallel, "cpu")
    try:
        cases = CASES[:1] if parallel.distributed_optimizer else CASES
        found: dict[Any, Any] = {case: select(mesh, *case, parallel) for case in cases}
        return found | {"faults": select_with_faults(mesh, parallel)}
    finally:
        mesh.close()


def every_layout() -> dict[str, list[dict]]:
    """Layout -> what each rank found."""
    return run_layouts({layout: size for layout, (size, _) in LAYOUTS.items()}, select_layout)


@pytest.fixture(scope="module")
def one_process() -> dict:
    return select_layout("one")


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[dict]]:
    return every_layout()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_picks_and_utilities_are_those_of_one_process(layout: str, ranks: dict, one_process: dict) -> None:
    for case in ranks[layout][0].keys() - {"faults"}:
        assert_same_picks([found[case] for found in ranks[layout]], one_process[case], case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_on_one_rank_is_every_rank_s(layout: str, ranks: dict) -> None:
    share = 16 // (LAYOUTS[layout][0] // LAYOUTS[layout][1].model_ranks)
    for fault in ("gradient", "candidate", "all"):
        each = [found["faults"][fault] for found in ranks[layout]]
        assert len({tuple(selection.picked_ids.tolist()) for selection in each}) == 1
        assert len({tuple(selection.events) for selection in each}) == 1
        selection = each[0]
        if fault == "gradient":
            assert selection.method == "uniform"
            assert "the proxy gradient is not finite" in selection.events[0]
        elif fault == "candidate":  # the last of the buffer
            assert selection.method == "opus"
            assert selection.events == [f"utility not finite: candidates [{int(selection.ids[-1])}]"]
            assert int(selection.ids[-1]) not in selection.picked_ids
        elif share < 16:  # other ranks' candidates are left
            assert selection.method == "opus"
            assert not set(selection.ids[-share:].tolist()) & set(selection.picked_ids.tolist())
        else:
            assert selection.method == "uniform"
            assert "only 0 candidates have a finite utility" in selection.events[1]


def assert_same_picks(ranks: list[dict[str, Any]], expected: dict[str, Any], case: tuple) -> None:
    """What ``select`` returned on each rank against what it returned on one process."""
    for name, steps in expected.items():
        for index, (picked, utilities, loss) in enumerate(steps):
            for found in ranks:
                ids, values, found_loss = found[name][index]
                assert found_loss == pytest.approx(loss, rel=1e-6)
                error = float((values - utilities).norm() / utilities.norm())
                assert error < 1e-5, f"{case} {name}: relative error {error:.1e}"
                assert ids == picked, f"{case} {name}"
                assert torch.equal(values, ranks[0][name][index][1])  # to the last bit on every rank
