"""Scoring under the other optimizers equals one process where matrices are split over ranks or stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megaopus.optim.registry import OPTIMIZERS
from tests.exact.scoring_runs import (
    FIRST,
    LAYOUTS,
    Picks,
    meshed,
    relative_error,
    same_picks,
    select,
    trained,
)
from tests.pool import Jobs, Pool

SETTINGS: dict[str, dict[str, Any]] = {
    "directional": {"epsilon": 1.0},
    "adjoint": {"estimator": "adjoint", "layers": "all"},
    "countsketch": {"estimator": "countsketch", "redundancy": 0.5},
}
_FULL = {"epsilon": 1.0, "muon_operator": "full"}
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "muon": {"full": _FULL, "full, every gradient": {**SETTINGS["countsketch"], "muon_operator": "full"}},
    "namo": {"full": _FULL},
    "namo_d": {"full": _FULL},
    "sophia_g": {"kronecker": {"estimator": "kronecker"}},
}
"""More: of a step that has a derivative beside the paper's formula; of factors some of which are 0."""
TOLERANCE = {"adafactor": 1e-4, "lion": 1e-4, "sophia_g": 1e-3}
"""They divide by a momentum or curvature with nothing added to it: what nearly cancelled is rounding, enlarged; and
Sophia's operator is 0 from where the update is clipped, on either side of which rounding may put an entry."""
TRIED = ("tp2-sp", "pp2")
OTHERS = [name for name in OPTIMIZERS if name not in FIRST or name in MORE]

Case = tuple[str, str]
"""(layout, optimizer)"""


def select_case(case: Case) -> dict[str, Picks]:
    """Setting -> picks, on one rank."""
    layout, optimizer = case
    with meshed(layout) as (mesh, parallel):
        engine = trained(mesh, ("llama-4-layers", optimizer), parallel)
        found = {name: select(engine, **settings) for name, settings in SETTINGS.items() if optimizer not in FIRST}
        derived = MORE.get(optimizer, {})
        return found | {name: select(engine, candidates=8, **settings) for name, settings in derived.items()}


@pytest.fixture(scope="module")
def ranks(pool: Pool, selected: Callable[..., list[Case]]) -> Jobs[Case]:
    """Return what each rank found, and under "one" for a layout one process."""
    sizes = {"one": 1, **{layout: LAYOUTS[layout][0] for layout in TRIED}}
    cases = {(layout, optimizer): size for layout, size in sizes.items() for optimizer in OTHERS}
    chosen = selected("layout", "optimizer")
    return pool.jobs(cases, select_case).begin([*(("one", optimizer) for _, optimizer in chosen), *chosen])


@pytest.mark.parametrize("optimizer", OTHERS)
@pytest.mark.parametrize("layout", TRIED)
def test_picks_are_those_of_one_process(layout: str, optimizer: str, ranks: Jobs[Case]) -> None:
    (one,) = ranks["one", optimizer]
    for found in ranks[layout, optimizer]:
        for name, expected in one.items():
            assert expected[0][1][0].std() > 0
            assert relative_error(found[name], expected) < TOLERANCE.get(optimizer, 1e-5), name
            assert same_picks(found[name], expected), name
