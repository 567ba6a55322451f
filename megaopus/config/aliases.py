"""Knows settings by the names that they once had: one table for saved files, YAML, command line and resume_allow.

Old names are accepted for ever: runs, checkpoints and files of users have them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

RENAMED = {
    "data.wanted": "data.target_domains",
    "data.traits_path": "data.text_features_path",
    "selection.prescreen.traits": "selection.prescreen.text_features",
}
"""Old dotted name -> today's. An entry is never removed."""


def current(key: str) -> str:
    """Today's name of a setting."""
    return RENAMED.get(key, key)


def former(key: str) -> str:
    """The first name of a setting, for digests that must outlive a new one."""
    return {new: old for old, new in RENAMED.items()}.get(key, key)


def current_override(text: str) -> str:
    """An override of the command line (``+old=value``) under today's name."""
    key, equals, value = text.partition("=")
    plain = key.lstrip("+~")
    return key.removesuffix(plain) + current(plain) + equals + value if plain in RENAMED else text


def notes(overrides: Iterable[str], resume_allow: Iterable[str] = ()) -> list[str]:
    """Return what to tell a person who used old names on the command line."""
    keys = [text.partition("=")[0].lstrip("+~") for text in overrides]
    return [f"{key} is now {RENAMED[key]}" for key in dict.fromkeys([*keys, *resume_allow]) if key in RENAMED]


def renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings under today's names; of a setting given under both, the new name counts."""
    result = copy.deepcopy(dict(tree))
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        holder = _section(result, section)
        if holder is not None and name in holder:
            value = holder.pop(name)
            section, _, name = new.rpartition(".")
            if (holder := _section(result, section)) is not None:
                holder.setdefault(name, value)
    return result


def with_old_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As ``renamed``, and old names that a value refers to (``${old}``) stand beside the new ones."""
    result = renamed(tree)
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        if f"${{{old}" in str(tree) and (holder := _section(result, section)) is not None:
            holder[name] = f"${{{new}}}"
    return result


def _section(tree: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The part of a tree under a dotted key; None where there is no such section."""
    part: Any = tree
    for name in key.split("."):
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else None
