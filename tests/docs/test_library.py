"""docs/library.md: its example runs, and it names what is public and what was renamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megaopus.selection
from megaopus.selection import SelectionConfig, Selector, TensorCandidates
from megaopus.selection.estimators.registry import ESTIMATORS
from megaopus.selection.methods.registry import METHODS
from megaopus.selection.old_names import RENAMED
from megaopus.selection.samplers.registry import SAMPLERS
from tests.unit.selection_net import K, N, batch, make, make_backend

PAGE = (Path(__file__).parents[2] / "docs" / "library.md").read_text()


@pytest.fixture
def registered() -> Iterator[None]:
    """Return what the example registers, for one test."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    exec(code, {"__name__": "example"})
    yield
    for registry, name in ((ESTIMATORS, "one_matrix"), (METHODS, "length"), (SAMPLERS, "every_other")):
        registry.remove(name)


@pytest.mark.usefixtures("registered")
def test_an_estimator_of_ones_own_selects() -> None:
    """The same as the oracle on that matrix, redundancy term and all."""
    backend = make_backend()
    for redundancy in (0.0, 0.5):
        found = make(backend, estimator="one_matrix", redundancy=redundancy).select(batch(0), 0)
        oracle = make(backend, estimator="exact", layers="b.weight", redundancy=redundancy).select(batch(0), 0)
        assert found.method == "opus"
        torch.testing.assert_close(found.utilities, oracle.utilities)
        assert found.picked_ids.tolist() == oracle.picked_ids.tolist()


@pytest.mark.usefixtures("registered")
def test_a_method_and_a_sampler_of_ones_own_select() -> None:
    tokens = (torch.arange(20) < torch.arange(N).unsqueeze(1)).long()  # candidate i has i tokens
    config = SelectionConfig(method="length")
    backend = make_backend(0)
    picked = Selector(config, backend, num_selected=K, proxy=None, seed=0).select(tokens, 0).indices
    assert picked.tolist() == list(range(N - K, N))
    config = SelectionConfig(
        method="length", sampler="every_other", guards=megaopus.selection.config.GuardConfig(min_ess=0)
    )
    halves = set()
    for step in range(5):
        selector = Selector(config, backend, num_selected=2, proxy=None, seed=0)
        halves.add(tuple(selector.select(TensorCandidates(tokens, torch.arange(N) + 20), step).indices.tolist()))
    assert len(halves) > 1
    assert all(min(half) >= 2 for half in halves)


def test_every_public_name_is_said() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE.split("## Estimators")[0], flags=re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(megaopus.selection.__all__)
    assert all(getattr(megaopus.selection, name) is not None for name in megaopus.selection.__all__)


def test_every_renamed_member_is_said() -> None:
    renamed = PAGE.split("## Names that changed")[1]
    for old, new in RENAMED.items():
        assert re.search(rf"`(ModuleBackend\.)?{old}\b.*\| `{new.split('(')[0]}", renamed), old
