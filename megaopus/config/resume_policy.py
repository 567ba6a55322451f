"""What may change between a checkpoint and the run that goes on from it: three classes of settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megaopus.errors import CheckpointError

HARMLESS = "harmless"
"""Where and how the run goes on, what it reports and keeps: logged. Layout and device change the last bits alone."""
TRAINING = "training"
"""Which data are trained on in which order, or how: needs ``resume_allow``."""
FIXED = "fixed"
"""A checkpoint means something else then: never, as far as its meaning changes (``build._identity`` says that)."""

CLASSES: dict[str, str] = {
    "run_dir": HARMLESS,
    "seed": FIXED,
    "resume": HARMLESS,
    "resume_allow": HARMLESS,
    "model": FIXED,
    "data": TRAINING,
    "data.path": FIXED,  # by the corpus's fingerprint: it may move
    "data.seq_len": FIXED,
    "data.filter": FIXED,
    "data.traits_path": HARMLESS,
    "data.validation_path": HARMLESS,
    "data.prepare": HARMLESS,
    "selection": TRAINING,
    "selection.rho": FIXED,
    "selection.score_micro_batch_size": HARMLESS,
    "selection.check_every": HARMLESS,
    "selection.score_every": FIXED,
    "selection.prescreen.mode": FIXED,
    "selection.prescreen.multiple": FIXED,
    "optim": TRAINING,
    "optim.name": FIXED,
    "engine": HARMLESS,
    "engine.name": FIXED,
    "engine.precision": FIXED,
    "parallel": HARMLESS,
    "train": TRAINING,
    "train.global_batch_size": FIXED,
    "train.micro_batch_size": HARMLESS,
    "train.eval_every": HARMLESS,
    "train.eval_sequences": HARMLESS,
    "checkpoint": HARMLESS,
    "logging": HARMLESS,
}
"""Setting or section -> class; the longest name that fits counts."""


class Change(NamedTuple):
    """A setting that is not what it was."""

    key: str
    saved: Any
    now: Any


def class_of(key: str) -> str:
    """The class of a dotted setting. Raises KeyError if none is named for it."""
    name = key
    while name not in CLASSES:
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise KeyError(key)
    return CLASSES[name]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Change]:
    """What differs between two nested settings; one that only one of them names has its default in the other.

    Where a run lies and how it resumes is left out. ``defaults``: dotted key -> value.
    """
    before, after = {**defaults, **flat(saved)}, {**defaults, **flat(now)}
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [Change(key, before.get(key), after.get(key)) for key in keys if key not in _PLACES]


_PLACES = ("run_dir", "resume", "resume_allow")


def refuse_unallowed(found: Iterable[Change], allow: Iterable[str], checkpoint: object) -> None:
    """Raise CheckpointError for settings of class ``training`` that changed and that ``allow`` does not name."""
    allowed = set(allow)
    wrong = [change for change in found if _named(change.key) == TRAINING and change.key not in allowed]
    if wrong:
        keys = ",".join([*sorted(allowed), *(change.key for change in wrong)])
        raise CheckpointError(
            f"{checkpoint} was made under other settings; these change what is trained on, or how:\n"
            + _lines(wrong)
            + f"\nSet them back, or allow them by name: 'resume_allow=[{keys}]' (nothing was written)"
        )


def _named(key: str) -> str:
    """As ``class_of``; a setting that exists no more has no class to object with."""
    try:
        return class_of(key)
    except KeyError:
        return HARMLESS


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], checkpoint: object) -> None:
    """Raise CheckpointError, naming every difference, unless a checkpoint belongs to a run with this identity."""
    if wrong := changes(saved, now, {}):
        raise CheckpointError(
            f"{checkpoint} belongs to another run; these differ:\n{_lines(wrong)}\n"
            "Set them back, or start a new run with another run_dir (nothing was written)"
        )


def _lines(found: Iterable[Change]) -> str:
    return "\n".join(f"  {change.key}: saved {change.saved!r}, now {change.now!r}" for change in found)
