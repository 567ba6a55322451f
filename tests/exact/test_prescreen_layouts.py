"""A predictor that screens or picks gives every layout the picks of one process, guards included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig
from megaopus.selection import SelectionConfig, Selector
from megaopus.selection.config import GuardConfig, PrescreenConfig
from tests.harness import TokenCandidates, random_batch, tiny_engine
from tests.pool import Jobs, Pool

STEPS = 8
GUARDS = GuardConfig(domain_floor=0.4, exposure_window=4)
COMMON: dict[str, Any] = {"method": "opus", "epsilon": 1.0, "score_micro_batch_size": 4, "guards": GUARDS}
SETTINGS = {
    # a slice of 18 does not divide over 4 ranks
    "predict": {
        "proxy_every": 3,
        "contrast": True,
        "prescreen": PrescreenConfig(mode="predict", multiple=3, slice=18, every=1, refit=16),
    },
    # judges come and go with the step, so that shares of what is scored are never the same
    "odds": {"utilities": "odds", "proxy_every": 2, "prescreen": PrescreenConfig(mode="importance", multiple=2)},
    "cascade": {"score_every": 2, "prescreen": PrescreenConfig(mode="cascade", multiple=2, slice=5, refit=16)},
}
LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "dp4": (4, ParallelConfig()),
    "tp2-sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2-vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
}


class TokenTraits:
    """Counts of the tokens of ``random_batch`` by id: what a utility can be predicted from."""

    def __init__(self, size: int):
        self._size = size

    def features(self, ids: Tensor) -> Tensor:
        rows = torch.cat(
            [random_batch(self._size, int(i) // self._size).tokens[int(i) % self._size][None] for i in ids]
        )
        return torch.nn.functional.one_hot(rows % 16, 16).float().sum(dim=1) / 4

    def importance(self, ids: Tensor) -> Tensor:
        return self.features(ids)[:, 0].double()

    def proxy_importance(self, ids: Tensor) -> Tensor:
        return torch.cos(ids.double())

    def judges(self, ids: Tensor) -> Tensor:
        return ids * 7 % 5 > 2

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        return ids

    def domains(self, ids: Tensor) -> Tensor:
        return ids % 3


def select_layout(layout: str) -> dict[str, Any]:
    """Setting -> (picked ids, utilities, predictions) of each step, one update after each; "one": on one process."""
    parallel = ParallelConfig() if layout == "one" else LAYOUTS[layout][1]
    mesh = Mesh(parallel, "cpu")
    try:
        return {name: select(mesh, parallel, name) for name in SETTINGS}
    finally:
        mesh.close()


def select(mesh: Mesh, parallel: ParallelConfig, name: str) -> list[tuple[list[int], Tensor | None, Tensor | None]]:
    model = ModelConfig(num_layers=4, hidden_size=32, num_heads=4)
    engine = tiny_engine(mesh, model=model, optim=OptimConfig(lr=1e-2, eps=1e-4), parallel=parallel)
    config = SelectionConfig(**COMMON, **SETTINGS[name])
    size = 8 * 2 * config.screened * config.score_every
    selector = Selector(
        config,
        engine.scoring_backend(),
        num_selected=8,
        proxy=lambda step: random_batch(8, 700 + step),
        pool=lambda step: random_batch(8, 800 + step),
        seed=7,
        text_features=TokenTraits(size),  # type: ignore[arg-type]
    )
    engine.train_step(random_batch(8, 900))
    found = []
    for step in range(STEPS):
        candidates: TokenCandidates = random_batch(size, step // config.score_every)
        pick = selector.select(candidates, step)
        engine.train_step(candidates.take(pick.indices))
        found.append((pick.picked_ids.tolist(), pick.utilities, pick.prescreen_score))
    assert sum(score is not None for _, _, score in found) >= STEPS // config.score_every - 1
    return found


@pytest.fixture(scope="module")
def ranks(pool: Pool, selected: Callable[..., list[str]]) -> Jobs[str]:
    """Layout -> what each rank found; "one": one process."""
    sizes = {"one": 1, **{layout: size for layout, (size, _) in LAYOUTS.items()}}
    return pool.jobs(sizes, select_layout).begin(["one", *selected("layout")])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_picks_are_those_of_one_process(layout: str, name: str, ranks: Jobs[str]) -> None:
    (one_process,) = ranks["one"]
    for rank in ranks[layout]:
        for found, expected in zip(rank[name], one_process[name], strict=True):
            assert found[0] == expected[0]
            for value, wanted in zip(found[1:], expected[1:], strict=True):
                assert (value is None) == (wanted is None)
                if value is not None:
                    scored = wanted.isfinite()
                    assert torch.equal(value.isfinite(), scored)
                    error = (value[scored] - wanted[scored]).norm() / wanted[scored].norm()
                    assert error < 1e-4  # updates in fp32 lie between the first selection and the last
