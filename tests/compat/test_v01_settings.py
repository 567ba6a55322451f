"""Every name that a user of version 0.1 may have written: settings, their words, groups, options of the verbs.

``settings.json`` has them all. A name that was changed since must still be taken, and must still set something.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from megaopus import settings
from megaopus.cli.main import verb_parser
from megaopus.config.compose import compose
from megaopus.config.parse import restored
from megaopus.config.resume_policy import class_of
from megaopus.config.run_config import differences
from megaopus.errors import ConfigError
from tests.compat.v01 import MOVED, copied, frozen, inside

NAMES = frozen("settings.json")
DEFAULTS: dict[str, Any] = NAMES["defaults"]


MEASURED_ANEW = {"selection.proxy_ema": 0.5}
"""Other values (``other``) of settings as they are today, where it is measured otherwise: a weight that falls to a
quarter in a step halves in half a step."""


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return tree


def other(key: str) -> Any:
    """A value that is not the default, of its type."""
    default = DEFAULTS[key]
    if key == "selection.proxy_ema":
        return 0.25
    if key in NAMES["words"]:
        return next(word for word in NAMES["words"][key] if word != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 3
    if isinstance(default, list):
        return [0.5, 0.25] if default and isinstance(default[0], float) else ["x"]
    if isinstance(default, str):
        return "x"
    for value in ("x", 3, 0.5):  # null: of which type is not in the file
        try:
            restored(nested({key: value}), "here")
        except ConfigError:
            continue
        return value
    raise AssertionError(f"{key} takes neither text nor a number")


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_setting_in_a_config_yaml_is_taken(key: str) -> None:
    """Under its old name, and it alone is then not the default; a redundancy term rests on sketches of each layer."""
    value = other(key)
    found = differences(restored(nested({key: value}), "here"))
    if key == "selection.redundancy":
        assert found.pop("selection.gram_sketch") == ("per_layer", "summed")
    assert [now for now, _ in found.values()] == [MEASURED_ANEW.get(key, value)]


def test_every_setting_with_its_default_is_the_default() -> None:
    assert differences(restored(nested(DEFAULTS), "here")) == MOVED


def test_every_setting_is_taken_on_the_command_line(tmp_path: Path) -> None:
    """All at once, and a value given there arrives."""
    given = {**DEFAULTS, "data.path": "corpus", "data.wanted": ["rivers"], "selection.prescreen.window": 640}
    with inside(copied(tmp_path)):
        found = differences(compose([f"{key}={json.dumps(value)}" for key, value in given.items()]))
    moved = [str(then) for then, _ in MOVED.values()]
    assert sorted(map(str, (now for now, _ in found.values()))) == sorted(["640", "['rivers']", "corpus", *moved])


@pytest.mark.parametrize("optimizer", NAMES["optimizers"])
def test_an_optimizers_own_settings_are_taken(optimizer: str, tmp_path: Path) -> None:
    own = NAMES["optimizers"][optimizer]
    given = [f"optim={optimizer}", *(f"optim.settings.{key}={json.dumps(value)}" for key, value in own.items())]
    with inside(copied(tmp_path)):
        config = compose(["data.path=corpus", *given])
    assert config.optim.own_settings() == own


@pytest.mark.parametrize("key", NAMES["words"])
def test_the_words_of_a_setting_are_known(key: str) -> None:
    section = key.split(".")[0]
    for word in NAMES["words"][key]:
        config = restored(nested({key: word}), "here")
        told = settings.problems(getattr(config, section))
        assert not [problem for problem in told if "unknown" in problem.reason], word


def test_classes_of_settings_are_as_they_were() -> None:
    """Return what may change on resume; an old name has the class of the new one."""
    assert {key: class_of(key) for key in NAMES["classes"]} == NAMES["classes"]


def test_choices_of_the_groups_are_there(tmp_path: Path) -> None:
    """As many at a time as there are groups."""
    groups = {group: names for group, names in NAMES["groups"].items() if group != "experiment"}
    with inside(copied(tmp_path)):
        for row in zip_longest(*groups.values()):
            chosen = [f"{group}={name}" for group, name in zip(groups, row, strict=True) if name]
            refused = problems([*chosen, "data.path=corpus"])
            assert not refused & set(groups), chosen
        for name in NAMES["groups"]["experiment"]:
            assert "experiment" not in problems([f"experiment={name}", "data.path=corpus"])


def problems(overrides: list[str]) -> set[str]:
    """Keys of what is wrong with settings."""
    try:
        compose(overrides)
    except ConfigError as error:
        return {problem.key for problem in error.problems}
    return set()


def test_a_folder_of_configs_of_ones_own(tmp_path: Path) -> None:
    """An experiment that a user wrote, with names of version 0.1."""
    mine = tmp_path / "mine"
    (mine / "experiment").mkdir(parents=True)
    (mine / "experiment" / "quick.yaml").write_text(
        "# @package _global_\n"
        "defaults: [{override /selection: opus}, {override /model: tiny}]\n"
        "data: {path: corpus, wanted: [rivers], seq_len: 32}\n"
        "selection: {rho: 0.25, prescreen: {multiple: 2, slice: 16, traits: [ngrams, shape]}, guards: {min_ess: 3}}\n"
        "train: {global_batch_size: 4, micro_batch_size: 4}\n"
    )
    with inside(copied(tmp_path)):
        config = compose(["experiment=quick"], mine)
        same = compose(
            [
                *("selection=opus", "model=tiny", "data.path=corpus", "data.wanted=[rivers]", "data.seq_len=32"),
                *("selection.rho=0.25", "selection.prescreen.multiple=2", "selection.prescreen.slice=16"),
                *("selection.prescreen.traits=[ngrams,shape]", "selection.guards.min_ess=3"),
                *("train.global_batch_size=4", "train.micro_batch_size=4"),
            ]
        )
    assert config == same
    assert {"[rivers]", "['ngrams', 'shape']"} & {str(now) for now, _ in differences(config).values()}


@pytest.mark.parametrize("verb", NAMES["options"])
def test_a_verb_has_its_options(verb: str) -> None:
    actions = verb_parser(verb)._actions
    assert set(NAMES["options"][verb]) <= {text for action in actions for text in action.option_strings}
    if verb == "score":
        (methods,) = [action.choices for action in actions if "--method" in action.option_strings]
        assert set(NAMES["score_methods"]) <= set(methods or ())
