"""Every setting is of one of the three classes that say whether it may change when a run goes on."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass

import pytest

from megaopus.config.resume_policy import changes, class_of, refuse_unallowed
from megaopus.config.run_config import RunConfig, default_settings, flat
from megaopus.errors import CheckpointError
from megaopus.settings import FIXED, HARMLESS, TRAINING


def settings(config: object, prefix: str = "") -> list[str]:
    found: list[str] = []
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        key = prefix + field.name
        found += settings(value, f"{key}.") if is_dataclass(value) else [key]
    return found


def test_every_setting_has_one_class() -> None:
    found = {key: class_of(key) for key in settings(RunConfig())}
    assert set(found.values()) == {HARMLESS, TRAINING, FIXED}
    groups: dict[str, list[str]] = {}
    for key, kind in found.items():
        groups.setdefault(kind, []).append(key)
    # What the checkpoint's identity holds, by value or by what it means (build._identity).
    assert [key for key in groups[FIXED] if not key.startswith(("model.", "data.filter."))] == [
        "seed",
        "data.path",
        "data.seq_len",
        "selection.rho",
        "selection.score_every",
        "selection.prescreen.mode",
        "selection.prescreen.multiple",
        "optim.name",
        "engine.name",
        "engine.precision",
        "train.global_batch_size",
    ]
    sections = ("engine", "parallel", "checkpoint", "logging", "data.prepare", "tasks")
    assert [key for key in groups[HARMLESS] if not key.startswith(tuple(f"{name}." for name in sections))] == [
        "run_dir",
        "resume",
        "resume_allow",
        "plugins",
        "model.hf",
        "init.path",
        "data.text_features_path",
        "data.validation_path",
        "data.read_ahead_mb",
        "data.store_cache_mb",
        "data.store_patience_s",
        "selection.score_micro_batch_size",
        "selection.proxy_micro_batch_size",
        "selection.check_every",
        "train.tokens",
        "train.epochs",
        "train.micro_batch_size",
        "train.eval_every",
        "train.eval_sequences",
    ]


def test_a_setting_without_a_class_is_seen() -> None:
    with pytest.raises(KeyError):
        class_of("quux.zork")


def test_settings_that_came_later_have_their_defaults() -> None:
    now = RunConfig()
    saved = asdict(now)
    del saved["optim"]["eps"]
    saved["logging"]["gone"] = 3
    found = changes(saved, asdict(now), default_settings(now))
    assert [(change.key, change.saved, change.now) for change in found] == [("logging.gone", 3, None)]
    refuse_unallowed(found, [], "step_00000001")
    now.optim.eps = 1e-6
    found = changes(saved, asdict(now), default_settings(now))
    with pytest.raises(CheckpointError, match=r"optim\.eps: saved 1e-08, now 1e-06"):
        refuse_unallowed(found, ["optim.lr"], "step_00000001")
    refuse_unallowed(found, ["optim.eps"], "step_00000001")


def test_flat() -> None:
    assert flat({"a": {"b": 1, "c": {"d": []}}, "e": None}) == {"a.b": 1, "a.c.d": [], "e": None}
