"""Knows settings by the names that they once had: one table for saved files, YAML, command line and resume_allow.

Old names are accepted for ever: runs, checkpoints and files of users have them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megaopus.selection.config import PrescreenConfig, SelectionConfig, half_life
from megaopus.settings import declared

RENAMED = {
    "data.wanted": "data.target_domains",
    "data.traits_path": "data.text_features_path",
    "selection.prescreen.traits": "selection.prescreen.text_features",
    "selection.proxy_ema": "selection.proxy_half_life",
}
"""Old dotted name -> today's. An entry is never removed."""


def _proxy_period(tree: Mapping[str, Any]) -> int | None:
    """Steps from one proxy gradient to the next under the nested settings of a run; None: those cannot be used."""
    selection = tree.get("selection")
    given = {name: _given(selection, SelectionConfig, name) for name in ("proxy_every", "score_every")}
    prescreen = selection.get("prescreen") if isinstance(selection, dict) else None
    inner = {name: _given(prescreen, PrescreenConfig, name) for name in ("mode", "every")}
    counts = (given["proxy_every"], given["score_every"], inner["every"])
    if not all(isinstance(each, int) and each > 0 for each in counts):
        return None
    return SelectionConfig(**given, prescreen=PrescreenConfig(**inner)).proxy_period


def _given(section: Any, kind: type, name: str) -> Any:
    return (section if isinstance(section, dict) else {}).get(name, declared(kind, name).default)


def _half_life(decay: Any, tree: Mapping[str, Any]) -> float | None:
    period = _proxy_period(tree)
    if period is None or isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        return None
    return half_life(decay, period)


CONVERTED: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {"selection.proxy_ema": _half_life}
"""Old name of a setting that was measured otherwise, in the same section -> its value today: (value, all nested
settings) -> value; None: it cannot be told."""
REFUSED = {
    "selection.proxy_ema": (
        "was the decay from one proxy gradient to the next, a number in [0, 1)",
        "set selection.proxy_half_life instead, in training steps",
    )
}
"""Old name -> (reason, remedy) where its value cannot be told under the new one."""


def current(key: str) -> str:
    """Today's name of a setting."""
    return RENAMED.get(key, key)


def former(key: str) -> str:
    """The first name of a setting, for digests that must outlive a new one."""
    return {new: old for old, new in RENAMED.items()}.get(key, key)


def former_settings(settings: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Some of a run's settings under their first names, as they were measured then; ``config``: all of them."""
    found = {former(key): value for key, value in settings.items()}
    if "selection.proxy_ema" in found:
        found["selection.proxy_ema"] = config.selection.proxy_decay
    return found


def current_override(text: str) -> str:
    """An override of the command line (``+old=value``) under today's name."""
    key, equals, value = text.partition("=")
    plain = key.lstrip("+~")
    keeps = plain in CONVERTED and not key.startswith("~")  # its value depends on other settings
    return key.removesuffix(plain) + current(plain) + equals + value if plain in RENAMED and not keeps else text


def notes(overrides: Iterable[str], resume_allow: Iterable[str] = ()) -> list[str]:
    """Return what to tell a person who used old names on the command line."""
    keys = [text.partition("=")[0].lstrip("+~") for text in overrides]
    old = [key for key in dict.fromkeys([*keys, *resume_allow]) if key in RENAMED]
    return [f"{key} is now {RENAMED[key]}" + (", in training steps" if key in CONVERTED else "") for key in old]


def renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings under today's names; of a setting given under both, the new name counts.

    A value that cannot be told under the new name stays under the old one (``REFUSED`` says why).
    """
    result = _moved(tree)
    for old, convert in CONVERTED.items():
        section, _, name = old.rpartition(".")
        _, _, new = RENAMED[old].rpartition(".")
        if (holder := _section(result, section)) is None or name not in holder:
            continue
        if new not in holder and (value := convert(holder[name], result)) is not None:
            holder[new] = value
        if new in holder:
            del holder[name]
    return result


def as_saved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved settings under today's names, and with those that came later where it went by another value.

    Before ``gram_sketch`` there was a sketch of each layer.
    """
    result = renamed(tree)
    if before_gram_sketch(result):
        result["selection"]["gram_sketch"] = "per_layer"
    return result


def before_gram_sketch(saved: Mapping[str, Any]) -> bool:
    """Say whether a run's saved settings have a redundancy term, and do not say of which sketches."""
    selection = saved.get("selection")
    given = selection if isinstance(selection, dict) else {}
    return "gram_sketch" not in given and bool(given.get("redundancy"))


def _moved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with today's names for the settings that mean the same as before."""
    result = copy.deepcopy(dict(tree))
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        holder = _section(result, section)
        if old not in CONVERTED and holder is not None and name in holder:
            value = holder.pop(name)
            section, _, name = new.rpartition(".")
            if (holder := _section(result, section)) is not None:
                holder.setdefault(name, value)
    return result


def with_old_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which values that have references mean what they meant: ``${old}`` is found beside the new name.

    What is to be converted stays as it is: it depends on other values, which may be references too.
    """
    result = _moved(tree)
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        if old not in CONVERTED and f"${{{old}" in str(tree) and (holder := _section(result, section)) is not None:
            holder[name] = f"${{{new}}}"
    return result


def without_presets(tree: dict[str, Any], chosen: Iterable[str]) -> dict[str, Any]:
    """Composed settings without the new name where a person gave the old one, which is to be converted.

    No file of ours has the old name; one with the new name may lie beneath. ``chosen``: keys of the command line, where
    the new name counts.
    """
    result = copy.deepcopy(tree)
    for old in CONVERTED:
        section, _, name = old.rpartition(".")
        holder = _section(result, section)
        if holder is not None and name in holder and RENAMED[old] not in chosen:
            holder.pop(RENAMED[old].rpartition(".")[2], None)
    return result


def _section(tree: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The part of a tree under a dotted key; None where there is no such section."""
    part: Any = tree
    for name in key.split("."):
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else None
