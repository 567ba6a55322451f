"""Code that users wrote for version 0.1 goes on working, with a warning that says the new name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import megaopus.selection
from megaopus.selection import (
    CountSketchEstimator,
    ModuleBackend,
    SelectionConfig,
    Selector,
    TensorCandidates,
    TextFeatures,
    backend,
    counter_rng,
)
from megaopus.selection.config import PrescreenConfig
from tests.unit.selection_net import K, N, batch, make, make_backend, proxy
from tests.unit.test_selection_prescreen import LinearTraits

SETTINGS: dict[str, Any] = {"estimator": "kronecker", "redundancy": 0.5, "proxy_half_life": 1.0}


class Old:
    """A backend of version 0.1: every member by the name that it had, and counted."""

    def __init__(self, backend: ModuleBackend):
        self._new = backend
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("computes_in_16_bits", "sum_over_ranks", "sum_over_model"):
            raise AttributeError(name)
        return getattr(self._new, name)

    @property
    def coarse(self) -> bool:
        self.called.append("coarse")
        return False

    def combine(self, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        self.called.append("combine")
        return parts, tally

    def sum_shards(self, values: Tensor) -> Tensor:
        self.called.append("sum_shards")
        return values

    def sum_parts(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.called.append("sum_parts")
        return values

    def sum_stages(self, values: Tensor) -> Tensor:
        self.called.append("sum_stages")
        return values


def test_a_backend_by_the_old_names_selects_the_same() -> None:
    old = Old(make_backend())
    with pytest.warns(DeprecationWarning, match=r"Old\.combine is now sum_over_ranks") as told:
        selector = make(old, **SETTINGS)  # type: ignore[arg-type]
    assert {str(each.message).split(" is now ")[0] for each in told} == {
        f"Old.{name}" for name in ("coarse", "combine", "sum_shards", "sum_parts", "sum_stages")
    }
    found, expected = selector.select(batch(0), 0), make(make_backend(), **SETTINGS).select(batch(0), 0)
    assert torch.equal(found.utilities, expected.utilities)
    assert found.picked_ids.tolist() == expected.picked_ids.tolist()
    assert set(old.called) == {"combine", "sum_shards", "sum_parts", "sum_stages"}
    with pytest.warns(DeprecationWarning, match="Old.coarse"):
        make(old, estimator="directional", proxy_half_life=0.0).select(batch(0), 0)  # type: ignore[arg-type]
    assert "coarse" in old.called


class Scaled(ModuleBackend):
    """A subclass that overrides some of the old members, and calls what it overrides."""

    def combine(self, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        parts, tally = super().combine(parts, tally)
        return 2 * parts, tally


class Everywhere(ModuleBackend):
    def sum_ranks(self, values: Tensor) -> None:
        values *= 3


@pytest.mark.parametrize(("cls", "factor"), [(Scaled, 2), (Everywhere, 3)])
def test_members_that_a_subclass_overrides_are_not_passed_over(cls: type[ModuleBackend], factor: int) -> None:
    settings = {"proxy_half_life": 0.0, "epsilon": 0.25}
    expected = make(make_backend(), **settings).select(batch(0), 0)
    with pytest.warns(DeprecationWarning, match=f"{cls.__name__}\\."):
        found = make(make_backend(cls=cls), **settings).select(batch(0), 0)
    torch.testing.assert_close(found.utilities, factor * expected.utilities)


def test_members_of_a_module_backend_have_their_old_names() -> None:
    ours, values = make_backend(), torch.arange(3.0)
    with pytest.warns(DeprecationWarning, match="coarse is now computes_in_16_bits"):
        assert ours.coarse is ours.computes_in_16_bits is False
    with pytest.warns(DeprecationWarning, match="combine is now sum_over_ranks"):
        parts, tally = ours.combine(values, values[:1])
    assert (parts.tolist(), tally.tolist()) == ([0, 1, 2], [0])
    for name in ("sum_shards", "sum_stages"):
        with pytest.warns(DeprecationWarning, match=f"{name} is now sum_over_model"):
            assert getattr(ours, name)(values).tolist() == [0, 1, 2]
    with pytest.warns(DeprecationWarning, match="sum_parts is now"):
        assert ours.sum_parts({"a": values})["a"].tolist() == [0, 1, 2]
    with pytest.warns(DeprecationWarning, match="sum_ranks is now sum_over_ranks"):
        ours.sum_ranks(values)


def test_a_backend_by_the_new_names_is_taken_as_it_is(recwarn: pytest.WarningsRecorder) -> None:
    ours = make_backend()
    assert make(ours).backend is ours
    assert not [each for each in recwarn if issubclass(each.category, DeprecationWarning)]


def test_traits_are_text_features() -> None:
    config = SelectionConfig(method="importance")
    traits: Any = LinearTraits()
    traits.signatures = lambda ids, near: ids
    given: dict[str, Any] = {"num_selected": K, "proxy": proxy, "seed": 0}
    with pytest.warns(DeprecationWarning, match="traits= is now text_features="):
        selector = Selector(config, make_backend(), traits=traits, **given)
    candidates = TensorCandidates(batch(0), torch.arange(N))
    expected = Selector(config, make_backend(), text_features=traits, **given).select(candidates, 0)
    found = selector.select(candidates, 0)
    assert torch.equal(found.indices, expected.indices)
    with pytest.raises(TypeError, match="traits= is the old name of text_features="):
        Selector(config, make_backend(), traits=traits, text_features=traits, **given)


def test_a_second_consumer_by_its_old_name() -> None:
    scored, seen = make_backend(), []
    candidates = TensorCandidates(batch(0))
    given = (scored, candidates, scored.operator(), scored.gradient(TensorCandidates(proxy(0))))
    with pytest.warns(DeprecationWarning, match="also= is now extra_consumer="):
        CountSketchEstimator(64, 0).estimate(*given, keep_sketches=True, also=lambda *factors: seen.append(factors))
    assert len(seen) == 2


def test_standing_is_the_prescreen_score() -> None:
    config = SelectionConfig(method="opus", prescreen=PrescreenConfig(mode="predict"), warmup_steps=9)
    features: Any = LinearTraits()
    features.signatures = lambda ids, near: ids
    selector = Selector(config, make_backend(), num_selected=K, proxy=proxy, seed=0, text_features=features)
    selection = selector.select(TensorCandidates(batch(0, 4 * N), torch.arange(4 * N)), 0)
    with pytest.warns(DeprecationWarning, match=r"Selection\.standing is now Selection\.prescreen_score"):
        standing = selection.standing
    assert standing is selection.prescreen_score
    assert torch.equal(standing, features.importance(selection.ids))


def test_a_selection_is_made_again_by_its_old_field() -> None:
    selection = make().select(batch(0), 0)
    with pytest.warns(DeprecationWarning, match=r"Selection\.standing is now Selection\.prescreen_score"):
        changed = dataclasses.replace(selection, standing=selection.utilities)
    assert changed.prescreen_score is selection.utilities
    assert selection.prescreen_score is None


def test_modules_that_moved_and_protocols_that_were_renamed() -> None:
    with pytest.warns(DeprecationWarning, match=r"megaopus\.selection\.noise is now megaopus\.selection\.counter_rng"):
        assert megaopus.selection.noise.key("a") == counter_rng.key("a")
    with pytest.warns(DeprecationWarning, match=r"backend\.Traits is now backend\.TextFeatures"):
        assert backend.Traits is TextFeatures
    with pytest.warns(DeprecationWarning, match="needs_traits is now SelectionConfig.needs_text_features"):
        assert SelectionConfig(method="dsir").needs_traits == "selection.method=dsir"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = megaopus.selection.nonsense


def test_every_module_of_version_0_1_is_found() -> None:
    for name in megaopus.selection._MOVED:
        with pytest.warns(DeprecationWarning, match=f"megaopus.selection.{name} is now"):
            assert getattr(megaopus.selection, name).__name__.startswith("megaopus.selection.")
