"""Says what may change between a checkpoint and the run that goes on from it: each setting has one of three classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

from megaopus.config.aliases import as_saved, before_gram_sketch, current, renamed
from megaopus.config.run_config import RunConfig, flat
from megaopus.errors import CheckpointError
from megaopus.selection.config import SelectionConfig
from megaopus.settings import HARMLESS, TRAINING, declared, kinds


class Change(NamedTuple):
    """A setting that is not what it was."""

    key: str
    saved: Any
    now: Any


def class_of(key: str) -> str:
    """The class of a dotted setting; of one that is no more, its section's. Raises KeyError if neither is known."""
    part: Any = RunConfig
    resume = RunConfig.RESUME
    for name in current(key).split("."):
        kind = kinds(part).get(name)
        if kind is None and part is RunConfig:
            raise KeyError(key)
        if not is_dataclass(kind):
            return resume if kind is None else declared(part, name).resume or resume
        part, resume = kind, getattr(kind, "RESUME", resume)
    return resume


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two nested settings; one that only one of them names has its default in the other.

    Where a run lies and how it resumes is left out. ``defaults``: dotted key -> value. Names are today's.
    """
    found = _differing({**defaults, **flat(as_saved(saved))}, {**defaults, **flat(renamed(now))})
    return [change for change in found if change.key not in _PLACES]


class Began(NamedTuple):
    """Says how a run began where the same command means something else today, so that it goes on that way."""

    decay: float | None = None
    """From one proxy gradient to the next (``proxy_ema``); None: today's setting has its say."""
    before_gram_sketch: bool = False
    """Whether its Gram matrix is of sketches of each layer, which no setting said then."""
    before_odds: bool = False
    """Whether it began before ``selection=opus`` picked by odds."""
    told: tuple[str, ...] = ()
    """What to tell a person."""

    def put(self, settings: dict[str, Any]) -> None:
        """Have the next checkpoint's nested settings say it as the first one's did."""
        if self.decay is not None:
            settings["selection"]["proxy_ema"] = self.decay
        if self.before_gram_sketch:
            del settings["selection"]["gram_sketch"]
        if self.before_odds:
            del settings["selection"][_CADENCE]


def continued(saved: Mapping[str, Any], config: RunConfig) -> Began:
    """Let ``config`` go on as the run with the ``saved`` settings began, but for what ``resume_allow`` names."""
    decay, told = continued_half_life(saved, config)
    before = before_gram_sketch(saved) and _GRAM_SKETCH not in config.resume_allow
    lines = [told] if told else []
    if before and config.selection.gram_sketch != "per_layer":
        config.selection.gram_sketch = "per_layer"
        lines.append(
            f"{_GRAM_SKETCH} stays per_layer, as this run began before there was a choice"
            f" (resume_allow=[{_GRAM_SKETCH}] takes the sum over layers)"
        )
    former = _takes_former_recipe(saved, config)
    if former:
        lines.append("selection=opus goes on as this run began, with the recipe that is called screened now")
    return Began(decay, before, former, tuple(lines))


def _takes_former_recipe(saved: Mapping[str, Any], config: RunConfig) -> bool:
    """Let a run that began when ``selection=opus`` was what is ``screened`` now go on with that; say whether it does.

    What the recipe says is told from what the command says beside it: it has the recipe's value.
    """
    began = "selection" in saved and _CADENCE not in saved["selection"]
    if not began or config.selection.utilities != "odds":
        return False
    was = {**flat({"selection": asdict(SelectionConfig())}), **flat(as_saved(saved))}
    allowed = set(map(current, config.resume_allow))
    then, now = (flat({"selection": asdict(SelectionConfig.preset(name))}) for name in ("screened", "opus"))
    for key, value in flat({"selection": asdict(config.selection)}).items():
        if value == now[key] and was[key] == then[key] and key not in allowed:
            holder: Any = config
            for part in key.split(".")[:-1]:
                holder = getattr(holder, part)
            setattr(holder, key.rpartition(".")[2], was[key])
    return config.selection.utilities != "odds"


def continued_half_life(saved: Mapping[str, Any], config: RunConfig) -> tuple[float | None, str]:
    """Let a run that began with a decay from one proxy gradient to the next (``proxy_ema``) go on with it.

    Recipes say the same in steps today, so the run's own command may mean another decay than it did. ``config`` takes
    the checkpoint's, unless ``resume_allow`` names the setting. Returns (the decay, for the next checkpoint to know it
    too; None: it has no say, what to tell a person; empty: nothing).
    """
    before = saved.get("selection", {}).get("proxy_ema")
    kept = renamed(saved).get("selection", {}).get("proxy_half_life")
    if before is None or kept is None or _HALF_LIFE in map(current, config.resume_allow):
        return None, ""
    now, config.selection.proxy_half_life = config.selection.proxy_half_life, kept
    if kept == now:
        return before, ""
    return before, (
        f"{_HALF_LIFE} stays {kept:.6g}, as this run began with proxy_ema={before} (the command says {now:.6g} now:"
        f" resume_allow=[{_HALF_LIFE}] takes it)"
    )


_CADENCE = "cadence"  # a setting that came with picks by odds
_GRAM_SKETCH = "selection.gram_sketch"
_HALF_LIFE = "selection.proxy_half_life"
_PLACES = ("run_dir", "resume", "resume_allow")


def refuse_unallowed(found: Iterable[Change], allow: Iterable[str], checkpoint: object) -> None:
    """Raise CheckpointError for settings of class ``training`` that changed and that ``allow`` does not name."""
    allowed = set(map(current, allow))
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
    if wrong := _differing(flat(saved), flat(now)):
        raise CheckpointError(
            f"{checkpoint} belongs to another run; these differ:\n{_lines(wrong)}\n"
            "Set them back, or start a new run with another run_dir (nothing was written)"
        )


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [Change(key, before.get(key), after.get(key)) for key in keys]


def _lines(found: Iterable[Change]) -> str:
    return "\n".join(f"  {change.key}: saved {change.saved!r}, now {change.now!r}" for change in found)
