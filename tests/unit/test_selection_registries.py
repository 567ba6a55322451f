"""Estimators, methods and samplers by name: what each entry must have, who may add one, and that names cost nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaopus.config.run_config import RunConfig
from megaopus.planning.estimate import scoring_overhead
from megaopus.selection import Selector, register_estimator, register_method, register_sampler
from megaopus.selection.config import SelectionConfig
from megaopus.selection.estimators import registry as estimators
from megaopus.selection.methods import registry as methods
from megaopus.selection.samplers import registry as samplers
from megaopus.settings import problems
from tests.unit.selection_net import batch, make, make_backend

DOC = (Path(__file__).parents[2] / "docs" / "selection.md").read_text()
OUTSIDE = """
from megaopus.selection import exact_utilities, register_estimator

@register_estimator("uphill", flops=(2.0, "twice what it takes"), needs={"whole_sequence": "is about whole texts"})
class Uphill:
    def __init__(self, config):
        pass

    def uses(self, backend, gradient):
        return list(gradient)

    def estimate(self, request):
        given = (request.backend, request.candidates, request.operator, request.proxy_gradient)
        return -exact_utilities(*given), None
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of a user's that registers an estimator when it is imported."""
    (tmp_path / "users_package.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("users_package")
    yield
    del sys.modules["users_package"]
    estimators.ESTIMATORS.remove("uphill")


@pytest.mark.usefixtures("outside")
def test_an_estimator_from_outside_the_tree_selects_and_is_reckoned_with() -> None:
    backend = make_backend()
    found = make(backend, estimator="uphill").select(batch(0), 0)
    oracle = make(backend, estimator="exact").select(batch(0), 0)
    assert found.method == "opus"
    assert torch.equal(found.utilities, -oracle.utilities)
    assert not set(found.picked_ids.tolist()) & set(oracle.picked_ids.tolist())
    assert "uphill" in estimators.names()
    config = RunConfig()
    config.selection = SelectionConfig(method="opus", estimator="uphill", rho=0.5, proxy_batch_size=8)
    config.train.global_batch_size = 16
    assert scoring_overhead(config) == pytest.approx(2 * 2.0 + 0.5)
    assert config.selection.needs()["whole_sequence"] == ("estimator", "uphill", "is about whole texts")


@pytest.mark.usefixtures("outside")
def test_a_name_belongs_to_one() -> None:
    with pytest.raises(ValueError, match=r"estimator 'uphill' is taken, by users_package.Uphill"):
        register_estimator("uphill", flops=(1.0, ""))(lambda config: None)
    with pytest.raises(ValueError, match=r"estimator 'exact' is taken, by megaopus.selection.estimators.exact.Exact"):
        register_estimator("exact", flops=(1.0, ""))(lambda config: None)
    with pytest.raises(ValueError, match="method 'high_ppl' is taken"):
        register_method("high_ppl", flops=(1.0, ""))(lambda step: None)
    with pytest.raises(ValueError, match="method 'uniform' scores nothing"):
        register_method("uniform", flops=(1.0, ""))
    with pytest.raises(ValueError, match="sampler 'top_k' is taken"):
        register_sampler("top_k")(lambda utilities, ids, temperature, key: utilities)
    with pytest.raises(ValueError, match="needs a_miracle, which means nothing"):
        register_method("new", flops=(1.0, ""), needs={"a_miracle": "it will not work"})(lambda step: None)
    assert "new" not in methods.names()


def test_what_is_there() -> None:
    expected = {"directional", "adjoint", "countsketch", "kronecker", "exact"}
    assert set(estimators.names()) >= expected
    assert set(estimators.sketch_names()) == {"countsketch", "kronecker"}
    by_loss, by_text = {"high_ppl", "low_ppl", "mid_ppl"}, {"dsir", "importance"}
    assert set(OURS) >= {"opus", "greats", "domain_oracle", *by_loss, *by_text}
    assert {name for name in OURS if methods.by_estimator(name)} == {"opus", "greats"}
    assert {name for name in OURS if "text_features" in methods.needs(name)} == by_text
    assert set(samplers.names()) == {"top_k", "boltzmann"}


# methods of other packages may be there by the time that this is read
OURS = [entry.name for entry in methods.METHODS if entry.origin.startswith("megaopus.")]


@pytest.mark.parametrize("name", [*estimators.names(), methods.UNIFORM, *OURS, *samplers.names()])
def test_every_name_is_documented(name: str) -> None:
    assert f"`{name}`" in DOC


@pytest.mark.parametrize("name", estimators.names())
@pytest.mark.parametrize("redundancy", [0.0, 0.5])
def test_every_estimator_has_a_cost_and_memory(name: str, redundancy: float) -> None:
    entry = estimators.ESTIMATORS.find(name)
    flops = estimators.scoring_flops(name, "countsketch", redundancy > 0)
    assert 0 < entry.flops.ratio <= flops.ratio <= entry.flops.ratio + 1
    assert flops.why
    shapes = [(10, 10), (20, 10)]
    sizes = estimators.Sizes(weights=1000, matrices=[100, 200], shapes=shapes, candidates=32, micro_batch_size=8)
    rows = estimators.scoring_memory(SelectionConfig(method="opus", estimator=name, redundancy=redundancy), sizes)
    assert rows
    assert all(row.size > 0 and row.how for row in rows.values())
    borrows = redundancy > 0 and entry.gram is None
    sketches_each = redundancy > 0 and (name == "countsketch" or borrows)
    assert ("gradients of candidates" in rows) == sketches_each
    assert ("update in the making" in rows) == (name == "countsketch" and not sketches_each)


@pytest.mark.parametrize("name", methods.METHODS.names())
def test_every_method_has_a_cost(name: str) -> None:
    entry = methods.METHODS.find(name)
    assert entry.by_estimator == (entry.flops is None)
    if entry.flops is not None:
        assert entry.flops.ratio >= 0
        assert entry.flops.why
    assert problems(SelectionConfig(method=name, **entry.example)) == []


def test_unknown_names_are_refused_with_those_there_are() -> None:
    for key, names in (("method", methods.names()), ("estimator", estimators.names()), ("sampler", samplers.names())):
        (found,) = problems(SelectionConfig(**{key: "nonsense"}))
        assert (found.key, found.remedy) == (key, f"use one of: {', '.join(names)}")
    with pytest.raises(ValueError, match="unknown estimator 'nonsense': use one of"):
        estimators.ESTIMATORS.find("nonsense")


def test_reading_settings_does_not_import_torch() -> None:
    code = "import sys, megaopus.selection as s; s.SelectionConfig(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_an_unknown_method_is_refused_by_the_selector() -> None:
    with pytest.raises(ValueError, match=r"method='nonsense': unknown choice"):
        Selector(SelectionConfig(method="nonsense"), make_backend(0), num_selected=1, proxy=None, seed=0)
