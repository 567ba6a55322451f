"""Each optimizer's state goes through a checkpoint to the last bit: an engine that reads one goes on as its writer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopus.checkpoint.checkpointer import split_groups
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import OPTIMIZERS
from megaopus.selection import SelectionConfig, Selector
from tests.exact.resume_runs import plain, tensors
from tests.harness import random_batch, save_engine, tiny_engine

STEPS = 9
DIRECTIONAL: dict[str, Any] = {"proxy_half_life": 7.0}
COUNTSKETCH: dict[str, Any] = {"estimator": "countsketch", "sketch_dim": 512, "redundancy": 0.5, "sampler": "boltzmann"}
ELSEWHERE = ("adamw", "muon", "sgd")
"""Their state goes through a run's checkpoints in test_resume.py."""
SELECTED_BY = {
    "namo_d": COUNTSKETCH,
    "conda": COUNTSKETCH,
    "sgd-without-momentum": {"method": "high_ppl"},
}
MORE_STATE = {
    "namo": ("v_squared.", "exp_avg."),
    "namo_d": ("state.V.", "exp_avg."),
    "conda": ("projection.",),
    "sgd_sai": ("gsnr.",),
}
"""Parts of the state beyond those of the parameters' shape."""
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: dict(spec.example) for name, spec in OPTIMIZERS.items() if name not in ELSEWHERE},
    "conda-bf16": dict(OPTIMIZERS["conda"].example),
    "sgd-without-momentum": {"settings": {"momentum": 0.0}},
}
SAVED_AT = {
    "lion": 5,
    "sgd_sai": 5,
    "sgd-without-momentum": 5,
    "namo": 6,
    "conda": 6,
}  # between two of what is periodic
CASES = tuple(SETTINGS)


def state_parts(case: str) -> tuple[str, ...]:
    """Return what the names of the optimizer's state have in them."""
    spec = OPTIMIZERS[optimizer_of(case)]
    shaped = spec.state_under({**spec.defaults(), **SETTINGS[case].get("settings", {})})
    return (*(f"{name}." for name in shaped), *MORE_STATE.get(optimizer_of(case), ()))


def optimizer_of(case: str) -> str:
    return case.split("-")[0]


def build(case: str, mesh: Mesh) -> tuple[Any, Selector]:
    """A new engine of the case, and what selects for it."""
    selection, precision = SELECTED_BY.get(case, DIRECTIONAL), "bf16" if case.endswith("bf16") else "fp32"
    engine = tiny_engine(
        mesh,
        optim=OptimConfig(**{"name": optimizer_of(case), "warmup_steps": 3, **SETTINGS[case]}),
        engine=EngineConfig(device="cpu", precision=precision),
    )
    config = SelectionConfig(**{"method": "opus", "proxy_batch_size": 4, "score_micro_batch_size": 8, **selection})
    proxy = functools.partial(random_batch, 4)
    return engine, Selector(
        config, engine.scoring_backend(), num_selected=4, proxy=lambda step: proxy(700 + step), seed=7
    )


def train(engine: Any, selector: Selector, last: int) -> list[Any]:
    """Return what is picked by which utilities, and what comes of each update, until ``last`` are done."""
    found = []
    while engine.step < last:
        candidates = random_batch(8, engine.step)
        selection = selector.select(candidates, engine.step)
        result = engine.train_step(candidates.take(selection.indices))
        found.append((selection.method, selection.picked_ids.tolist(), plain(selection.utilities), result))
    return found


def written(engine: Any, folder: Path, groups: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything that a checkpoint of the engine holds, by name."""
    folder.mkdir()
    save_engine(engine, folder, groups or {})
    return {"common": torch.load(folder / "common.pt", weights_only=False), **tensors(folder)}


def same(found: Any, expected: Any) -> bool:
    """Return whether equal to the last bit."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    return plain(found) == plain(expected)


@pytest.mark.parametrize("case", CASES)
def test_an_engine_restored_goes_on_as_the_one_that_saved(case: str, tmp_path: Path) -> None:
    saved, method = SAVED_AT.get(case, 7), SELECTED_BY.get(case, DIRECTIONAL).get("method", "opus")
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        engine, selector = build(case, mesh)
        train(engine, selector, saved)
        groups, rest = split_groups(selector.state_dict())
        first = written(engine, tmp_path / "first", groups)
        expected = train(engine, selector, STEPS)
        again, chooser = build(case, mesh)
        restored = again.load(tmp_path / "first", sorted(groups))
        again.step = saved
        chooser.load_state_dict({**rest, **restored})
        assert train(again, chooser, STEPS) == expected
        ends = [written(each, tmp_path / name) for each, name in ((again, "again"), (engine, "straight"))]
    finally:
        mesh.close()
    assert [name for name, *_ in expected] == [method] * (STEPS - saved)
    assert all(len(set(utilities)) > 1 for _, _, utilities, _ in expected)
    assert all(result.applied for *_, result in expected)
    assert ends[0].keys() == ends[1].keys()
    assert [name for name, value in ends[1].items() if not same(ends[0][name], value)] == []
    assert bool(groups) == (method == "opus")
    for part in state_parts(case):
        found = [value for name, value in first.items() if part in name]
        assert found
        assert all(value.abs().max() > 0 for value in found if value.dim() > 1 or len(value) == 1)
