"""A setting is one line: what follows from it, for a section of its own and for those of the package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from megaopus.config.run_config import SETTINGS, RunConfig
from megaopus.optim.base import LayoutOptimizer
from megaopus.optim.registry import OPTIMIZERS
from megaopus.selection import SelectionConfig
from megaopus.selection.config import PrescreenConfig
from megaopus.settings import (
    FIXED,
    HARMLESS,
    TRAINING,
    Setting,
    did_you_mean,
    entries,
    member_entries,
    problems,
    renamed,
    sections,
    setting,
    written,
)

CLASSES = {HARMLESS, TRAINING, FIXED}


def _even(value: int) -> str | None:
    return "is odd" if value % 2 else None


OWNERS = {
    "x": SimpleNamespace(settings={"depth": Setting(default=2, min=1, doc="How deep.")}),
    "y": SimpleNamespace(settings={}),
}


@dataclass(slots=True, kw_only=True)
class Inner:
    RESUME: ClassVar[str] = FIXED

    words: list[str] = setting(["a"], choices=("a", "b"), doc="Words.")


@renamed(old_size="size")
@dataclass(slots=True, kw_only=True)
class Outer:
    """A section."""

    RESUME: ClassVar[str] = TRAINING

    name: str = setting("x", choices=("x", "y"), doc="Which.", hint="z is not made yet")
    size: int = setting(4, min=1, check=_even, doc="How large.", resume=HARMLESS)
    share: float = setting(0.5, above=0, max=1, doc="How much.", hint="a half is usual")
    rate: float | None = setting(None, above=0, doc="How fast; null: not at all.")
    own: dict[str, Any] = setting({}, members=OWNERS, doc="Of that alone.")
    inner: Inner = field(default_factory=Inner)

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        if self.size > 8 * self.share:
            yield "size", "larger than 8 shares", "a smaller one"


def said(section: Any) -> list[str]:
    return [str(problem) for problem in problems(section)]


def test_every_object_has_its_own_lists() -> None:
    one, two = Outer(), Outer()
    one.inner.words.append("b")
    one.own["depth"] = 3
    assert (two.inner.words, two.own) == (["a"], {})


def test_key_type_default_and_class_follow() -> None:
    found = entries(Outer)
    assert list(found) == ["name", "size", "share", "rate", "own", "inner.words"]
    assert [entry.resume for entry in found.values()] == [TRAINING, HARMLESS, TRAINING, TRAINING, TRAINING, FIXED]
    assert found["inner.words"].kind == list[str]
    assert list(member_entries(found["own"], "x")) == ["own.depth"]
    assert member_entries(found["own"], "y") == member_entries(found["size"], "x") == {}
    assert list(sections(Outer)) == ["", "inner"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": 0}, "size = 0: must be at least 1\n    -> 4 is usual"),
        ({"size": 3}, "size = 3: is odd\n    -> 4 is usual"),
        ({"size": "4"}, "size = '4': must be an integer, not str\n    -> for example size=4"),
        ({"size": True}, "size = True: must be an integer, not bool\n    -> for example size=4"),
        ({"size": 6}, "size = 6: larger than 8 shares\n    -> a smaller one"),
        ({"share": 1.5}, "share = 1.5: must lie in (0, 1]\n    -> a half is usual"),
        ({"share": float("nan")}, "share = nan: must be a finite number, not float\n    -> for example share=0.5"),
        ({"rate": -1}, "rate = -1: must be positive\n    -> null is the default"),
        ({"name": "xy"}, "name = 'xy': unknown choice\n    -> did you mean y? use one of: x, y; z is not made yet"),
        ({"own": {"depht": 3}}, "own.depht = 3: x has no such setting\n    -> did you mean depth?"),
        ({"own": {"depth": 0}}, "own.depth = 0: must be at least 1\n    -> 2 is usual"),
        ({"own": {"depth": 0.5}}, "own.depth = 0.5: must be an integer, not float\n    -> for example own.depth=2"),
        ({"own": {"q": 1}, "name": "y"}, "own.q = 1: y has no such setting\n    -> it has none"),
        ({"own": 3}, "own = 3: is a section, not a int\n    -> write own.NAME=VALUE"),
        (
            {"inner": Inner(words=["a", "bb"])},
            "inner.words = ['a', 'bb']: unknown choice\n    -> did you mean b? use one of: a, b",
        ),
        ({"inner": Inner(words="a")}, "inner.words = 'a': must be a list, not str\n    -> write 'inner.words=[a]'"),
    ],
)
def test_a_value_is_refused_with_reason_and_remedy(values: dict[str, Any], expected: str) -> None:
    assert said(Outer(**values)) == [expected]


def test_one_problem_a_key_and_none_of_relations_between_what_is_no_number() -> None:
    assert [problem.key for problem in problems(Outer(size=11, share=0.1))] == ["size"]
    assert [problem.key for problem in problems(Outer(size="large", share=0.1))] == ["size"]
    assert said(Outer()) == said(Outer(rate=2, own={"depth": 1}, inner=Inner(words=["b", "a"]))) == []


@pytest.mark.parametrize(
    ("declared", "bounds", "value", "reason"),
    [
        ({"min": 0}, ">= 0", -1, "must not be negative"),
        ({"min": 2}, ">= 2", 1, "must be at least 2"),
        ({"above": 0}, "> 0", 0, "must be positive"),
        ({"above": 1}, "> 1", 1, "must be above 1"),
        ({"max": 3}, "<= 3", 4, "must be at most 3"),
        ({"below": 3}, "< 3", 3, "must be below 3"),
        ({"min": 0, "below": 1}, "[0, 1)", 1, "must lie in [0, 1)"),
        ({"above": 0, "below": 1}, "(0, 1)", 0, "must lie in (0, 1)"),
        ({"min": 0, "max": 1}, "[0, 1]", 2, "must lie in [0, 1]"),
    ],
)
def test_ranges_in_words(declared: dict[str, Any], bounds: str, value: int, reason: str) -> None:
    known = Setting(default=None, doc="", **declared)
    assert known.bounds() == bounds
    assert known.refusal(value) == (reason, "null is the default")
    assert known.refusal(None) is None


def test_values_as_they_are_written() -> None:
    values = [None, True, "", "a", 1, 0.5, [1, 2.0], []]
    assert [written(value) for value in values] == ["null", "true", '""', "a", "1", "0.5", "[1,2.0]", "[]"]


def test_did_you_mean() -> None:
    assert did_you_mean("stesp", ["steps", "seed"]) == "did you mean steps? "
    assert did_you_mean("zork", ["steps", "seed"]) == ""


def test_an_old_name_works_and_names_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"Outer\.old_size is now Outer\.size"):
        section = Outer(old_size=2)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="size"):
        assert section.old_size == 2  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="size"):
        section.old_size = 6  # type: ignore[attr-defined]
    assert section.size == 6
    with pytest.warns(DeprecationWarning, match="size"):
        assert replace(section, old_size=4).size == 4  # type: ignore[call-arg]


def test_traits_of_the_prescreen_is_text_features() -> None:
    with pytest.warns(DeprecationWarning, match=r"PrescreenConfig\.traits is now PrescreenConfig\.text_features"):
        prescreen = PrescreenConfig(traits=["domain"])  # type: ignore[call-arg]
    assert prescreen == PrescreenConfig(text_features=["domain"])
    with pytest.warns(DeprecationWarning, match="text_features"):
        assert prescreen.traits == ["domain"]  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = SelectionConfig(method="opus", prescreen=PrescreenConfig(text_features=["domain"]))
        assert asdict(replace(config, rho=0.25))["prescreen"]["text_features"] == ["domain"]


# -- the package's own -------------------------------------------------------------------------------------------------


def sections_of(config: object) -> Iterator[object]:
    yield config
    for each in fields(config):  # type: ignore[arg-type]
        if is_dataclass(value := getattr(config, each.name)):
            yield from sections_of(value)


def test_every_setting_says_what_it_means_and_has_a_class() -> None:
    every = list(SETTINGS.values())
    every += [entry for name in OPTIMIZERS for entry in member_entries(SETTINGS["optim.settings"], name).values()]
    assert len(every) > 120
    for entry in every:
        assert entry.resume in CLASSES, entry.key
        assert entry.known.resume in CLASSES | {""}, entry.key
        assert len(entry.known.doc) > 8, entry.key
        assert entry.known.doc.endswith("."), entry.key
    for section in sections_of(RunConfig()):
        for each in fields(section):  # type: ignore[arg-type]
            assert "setting" in each.metadata or is_dataclass(getattr(section, each.name)), each.name


def test_the_defaults_are_accepted() -> None:
    config = RunConfig()
    assert [problem.key for problem in problems(config)] == ["data.path"]  # it has none
    assert asdict(config) == asdict(RunConfig())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_known_of_an_optimizer_is_what_its_class_has(name: str) -> None:
    """``Spec.shaped`` tells the names of its state to those who hold no optimizer."""
    import torch

    from megaopus.optim.config import OptimConfig

    spec, weight = OPTIMIZERS[name], torch.nn.Parameter(torch.ones(2, 2))
    group = {"params": [weight], "weight_decay": 0.0}
    optimizer = spec.make([group], OptimConfig(name=name), OptimConfig(name=name).own_settings(), None)
    if isinstance(optimizer, LayoutOptimizer):
        assert optimizer.shaped == spec.shaped
        return
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert set(spec.shaped) <= set(optimizer.state[weight])
