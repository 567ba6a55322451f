"""Scoring under the other optimizers equals one process where matrices are split over ranks or stages."""

from __future__ import annotations

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
from tests.harness import run_layouts

SETTINGS = {
    "directional": {"epsilon": 1.0},
    "adjoint": {"estimator": "adjoint", "layers": "all"},
    "countsketch": {"estimator": "countsketch", "redundancy": 0.5},
}
TOLERANCE = {"lion": 1e-4, "sophia_g": 1e-3}
"""They divide by a momentum or curvature with nothing added to it: what nearly cancelled is rounding, enlarged; and
Sophia's operator is 0 from where the update is clipped, on either side of which rounding may put an entry."""
TRIED = ("tp2-sp", "pp2")
OTHERS = [name for name in OPTIMIZERS if name not in FIRST]


def select_layout(layout: str) -> dict[str, dict[str, Picks]]:
    found = {}
    with meshed(layout) as (mesh, parallel):
        for optimizer in OTHERS:
            engine = trained(mesh, ("llama-4-layers", optimizer), parallel)
            found[optimizer] = {name: select(engine, **settings) for name, settings in SETTINGS.items()}
    return found


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Picks]]:
    return select_layout("one")


@pytest.fixture(scope="module")
def ranks(one_process: dict) -> dict[str, list[dict[str, dict[str, Picks]]]]:
    return run_layouts({layout: LAYOUTS[layout][0] for layout in TRIED}, select_layout)


@pytest.mark.parametrize("optimizer", OTHERS)
@pytest.mark.parametrize("layout", TRIED)
def test_picks_are_those_of_one_process(layout: str, optimizer: str, ranks: dict, one_process: dict) -> None:
    for found in ranks[layout]:
        for name, expected in one_process[optimizer].items():
            assert expected[0][1][0].std() > 0
            assert relative_error(found[optimizer][name], expected) < TOLERANCE.get(optimizer, 1e-5), name
            assert same_picks(found[optimizer][name], expected), name
