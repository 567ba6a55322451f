"""Declares a setting in one line: its default, what it may be, whether it may change on resume, and what it means.

    steps: int = setting(100, min=1, doc="Updates in all.")

Errors with remedy and did-you-mean, the class of a change when a run goes on, the verb ``settings`` and
docs/settings.md follow from that line. A section is a dataclass of such lines; where it has ``conflicts()``, that
yields ``(key, reason, remedy)`` for what does not hold between them.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
import re
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from megaopus.errors import Problem

HARMLESS = "harmless"
"""Where and how the run goes on, what it reports and keeps: logged. Layout and device change the last bits alone."""
TRAINING = "training"
"""Which data are trained on in which order, or how: needs ``resume_allow``."""
FIXED = "fixed"
"""A checkpoint means something else then: never, as far as its meaning changes."""

Section = TypeVar("Section")


class HasSettings(Protocol):
    """Has settings of its own, such as an optimizer's."""

    @property
    def settings(self) -> Mapping[str, Setting]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Holds what is declared of one setting; of a list, range and choices are those of its elements."""

    default: Any
    doc: str
    resume: str = ""
    """One of the three classes; empty: ``RESUME`` of its section, or of the section around that."""
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[Any] | Callable[[], Collection[Any]] = ()
    """Asked for when they are needed: a registry imports its entries then."""
    check: Callable[[Any], str | None] | None = None
    """Says what is wrong with a value, where range and choices cannot."""
    schemes: Collection[str] | None = None
    """Of a path: the addresses (``s3``, say) that it may be besides a path of this machine; None: it is no path."""
    hint: str = ""
    """What to do about a value that is refused; empty: the default is named."""
    members: Mapping[str, HasSettings] | None = None
    """Of a dictionary: who says what it may hold, by the section's ``name``."""

    def options(self) -> tuple[Any, ...]:
        """The values that it may have; none: any within the range."""
        return tuple(self.choices() if callable(self.choices) else self.choices)

    def bounds(self) -> str:
        """The range as mathematics writes it, ``>= 1`` or ``(0, 1]``; empty: any value."""
        low = self.above if self.min is None else self.min
        high = self.below if self.max is None else self.max
        if low is not None and high is not None:
            return f"{'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if low is not None:
            return f"{'>=' if self.above is None else '>'} {low}"
        return "" if high is None else f"{'<=' if self.below is None else '<'} {high}"

    def refusal(self, value: Any) -> tuple[str, str] | None:
        """(reason, remedy) if a value of the right type cannot be used."""
        if value is None:
            return None
        if self.check is not None and (reason := self.check(value)):
            return reason, self._remedy()
        parts = value if isinstance(value, list | tuple) else [value]
        for part in parts if self.schemes is not None else ():
            if found := address_refusal(str(part), self.schemes or ()):
                return found
        options = self.options()
        if options and (wrong := [part for part in parts if part not in options]):
            close = did_you_mean(str(wrong[0]), map(str, options))
            hint = f"; {self.hint}" if self.hint else ""
            return "unknown choice", f"{close}use one of: {', '.join(map(str, options))}{hint}"
        return None if all(map(self._inside, parts)) else (self._outside(), self._remedy())

    def _inside(self, value: Any) -> bool:
        return (
            (self.min is None or value >= self.min)
            and (self.above is None or value > self.above)
            and (self.max is None or value <= self.max)
            and (self.below is None or value < self.below)
        )

    def _outside(self) -> str:
        sign, _, bound = (bounds := self.bounds()).partition(" ")
        words = {">=": "be at least", ">": "be above", "<=": "be at most", "<": "be below"}
        special = {">= 0": "must not be negative", "> 0": "must be positive"}
        return special.get(bounds) or (f"must {words[sign]} {bound}" if sign in words else f"must lie in {bounds}")

    def _remedy(self) -> str:
        return self.hint or f"{written(self.default)} is {'usual' if self.default is not None else 'the default'}"


def address_refusal(path: str, schemes: Collection[str] = ()) -> tuple[str, str] | None:
    """(reason, remedy) if a path is an address of another scheme than ``schemes``; None for paths of this machine.

    The path may have a name before it, ``NAME=PATH``.
    """
    found = _ADDRESS.match(path)
    if found is None or found[1].lower() in schemes:
        return None
    if found[1].lower() == "file":
        return "is an address, where a path is asked for", f"name {path[found.end() :]}"
    also = "".join(f" and {scheme}://" for scheme in schemes)
    reason = f"is an address ({found[1]}://), and only paths of this machine's file system{also} can be used here"
    return reason, "copy it here and back, or mount it, and name that path"


_ADDRESS = re.compile(r"(?:[^/=]*=)?([A-Za-z][A-Za-z0-9+.-]*)://")


def setting(default: Any, *, doc: str, **declared: Any) -> Any:
    """Declare a field of a section; ``declared`` as ``Setting`` has it. Each object gets a list or dict of its own."""
    metadata = {"setting": Setting(default=default, doc=doc, **declared)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Entry(NamedTuple):
    """A setting where it stands in a section."""

    key: str
    """Dotted."""
    kind: Any
    """Its type."""
    known: Setting
    resume: str
    """Its class on resume."""


def entries(section: Any, prefix: str = "", resume: str = "") -> dict[str, Entry]:
    """Every setting of a section and the sections in it, by dotted key."""
    found: dict[str, Entry] = {}
    resume = getattr(section, "RESUME", resume)
    for name, kind in kinds(section).items():
        key = f"{prefix}{name}"
        if is_dataclass(kind):
            found |= entries(kind, f"{key}.", resume)
        else:
            known = declared(section, name)
            found[key] = Entry(key, kind, known, known.resume or resume)
    return found


def sections(section: Any, key: str = "") -> dict[str, type]:
    """A section and those in it by dotted key; its own key is the empty one."""
    found = {key: section}
    for name, kind in kinds(section).items():
        if is_dataclass(kind):
            found |= sections(kind, f"{key}.{name}" if key else name)
    return found


def member_entries(entry: Entry, owner: str) -> dict[str, Entry]:
    """Return what an open dictionary may hold where its section's ``name`` is ``owner``, by dotted key."""
    found: dict[str, Entry] = {}
    owners = entry.known.members or {}
    for name, known in owners[owner].settings.items() if owner in owners else ():
        key = f"{entry.key}.{name}"
        found[key] = Entry(key, type(known.default), known, known.resume or entry.resume)
    return found


@functools.cache
def kinds(section: Any) -> dict[str, Any]:
    """Name -> type of each field of a section."""
    hints = typing.get_type_hints(section)
    return {each.name: hints[each.name] for each in fields(section)}


@functools.cache
def declared(section: Any, name: str) -> Setting:
    """Return what is declared of one field."""
    return next(each for each in fields(section) if each.name == name).metadata["setting"]


def problems(section: Any, prefix: str = "") -> list[Problem]:
    """Return what is wrong with the values of a section and of those in it, and between them; one problem a key."""
    found: dict[str, Problem] = {}
    related = True
    for name, kind in kinds(type(section)).items():  # type: ignore[arg-type]
        value, key = getattr(section, name), f"{prefix}{name}"
        if is_dataclass(value):
            found |= {problem.key: problem for problem in problems(value, f"{key}.")}
            continue
        entry = Entry(key, kind, declared(type(section), name), "")  # type: ignore[arg-type]
        try:
            found |= {problem.key: problem for problem in _refused(entry, value, getattr(section, "name", ""))}
        except Misfit as misfit:
            found[key], related = Problem(key, value, *misfit.args), False
    for name, reason, remedy in section.conflicts() if related and hasattr(section, "conflicts") else ():
        found.setdefault(f"{prefix}{name}", Problem(f"{prefix}{name}", value_at(section, name), reason, remedy))
    return list(found.values())


def _refused(entry: Entry, value: Any, owner: str) -> Iterator[Problem]:
    """Problems of one value, or of those in an open dictionary. Raises Misfit for a value of another type."""
    fitting = fit(value, entry)
    if refusal := entry.known.refusal(fitting):
        yield Problem(entry.key, value, *refusal)
    if entry.known.members is None or owner not in entry.known.members:
        return
    members = member_entries(entry, owner)
    for name, given in fitting.items():
        if (member := members.get(f"{entry.key}.{name}")) is not None:
            try:
                yield from _refused(member, given, "")
            except Misfit as misfit:
                yield Problem(member.key, given, *misfit.args)
        else:
            names = [key.rpartition(".")[2] for key in members]
            has = f"it has {', '.join(names)}" if names else "it has none"
            yield Problem(
                f"{entry.key}.{name}", given, f"{owner} has no such setting", did_you_mean(name, names).strip() or has
            )


def value_at(section: Any, key: str) -> Any:
    """The value of a dotted setting."""
    for name in key.split("."):
        section = section[name] if isinstance(section, dict) else getattr(section, name)
    return section


class Misfit(ValueError):
    """Raised for a value of another type than its setting's; has (reason, remedy)."""


_KINDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


def fit(value: Any, entry: Entry) -> Any:
    """``value`` as the type of its setting. Raises Misfit."""
    kind = entry.kind
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in options:
        return None
    refused: list[Misfit] = []
    for option in options:
        if option is not types.NoneType:
            try:
                return _fit(value, option, entry)
            except Misfit as misfit:
                refused.append(misfit)
    raise refused[0]


def _fit(value: Any, kind: Any, entry: Entry) -> Any:
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        remedy = f"write '{entry.key}={written(entry.known.default) if entry.known.default else '[a,b]'}'"
        if not isinstance(value, list | tuple):
            raise Misfit(f"must be a list, not {type(value).__name__}", remedy)
        try:
            return list(value) if item is Any else [_fit(each, item, entry) for each in value]
        except Misfit as misfit:
            raise Misfit(f"each element {misfit.args[0]}", remedy) from None
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise Misfit(f"is a section, not a {type(value).__name__}", f"write {entry.key}.NAME=VALUE")
        return dict(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = {
        int: whole or (isinstance(value, float) and value.is_integer()),  # 30e9 is how a count is written
        float: whole or (isinstance(value, float) and math.isfinite(value)),
        bool: isinstance(value, bool),
        str: whole or isinstance(value, str),
    }
    if not fits[kind]:
        raise Misfit(f"must be {_KINDS[kind]}, not {type(value).__name__}", _example(kind, entry))
    return kind(value)


def _example(kind: type, entry: Entry) -> str:
    """Return how a value of the right type is written."""
    if kind is bool:
        return f"write {entry.key}=true or {entry.key}=false"
    if kind is str:
        return f"quote what YAML would read as something else: '{entry.key}=\"text\"'"
    return f"for example {entry.key}={entry.known.default or {int: 8, float: 0.1}[kind]}"


def written(value: Any) -> str:
    """A value as it is written in a file or on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


def did_you_mean(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str:
    """``"did you mean NAME? "`` with the nearest valid name; empty if none is near."""
    close = difflib.get_close_matches(name, list(valid), 1, cutoff)
    return f"did you mean {close[0]}? " if close else ""


def replaced(
    old: str, new: str, to_new: Callable[[Any, Any], Any], to_old: Callable[[Any], Any]
) -> Callable[[type[Section]], type[Section]]:
    """Keep a section's setting that is now measured otherwise: keyword and attribute ``old`` warn of ``new``.

    ``to_new(section, value)``: what the old value is now, beside the section's other settings; ``to_old(section)``.
    """

    def warn(cls: type) -> None:
        warnings.warn(f"{cls.__name__}.{old} is now {cls.__name__}.{new}", DeprecationWarning, stacklevel=3)

    def decorate(cls: type[Section]) -> type[Section]:
        made = cls.__init__

        @functools.wraps(made)
        def __init__(self: Any, **values: Any) -> None:
            given = old in values
            value = values.pop(old, None)
            made(self, **values)  # dataclasses.replace gives the new name as well
            if given:
                warn(cls)
                setattr(self, new, to_new(self, value))

        def get(self: Any) -> Any:
            warn(cls)
            return to_old(self)

        def put(self: Any, value: Any) -> None:
            warn(cls)
            setattr(self, new, to_new(self, value))

        cls.__init__ = __init__  # type: ignore[method-assign]
        setattr(cls, old, property(get, put))
        return cls

    return decorate


def renamed(**names: str) -> Callable[[type[Section]], type[Section]]:
    """Keep old names (old=new) of a section's settings for one release: keyword and attribute warn of the new one."""

    def warn(cls: type, old: str, new: str) -> None:
        warnings.warn(f"{cls.__name__}.{old} is now {cls.__name__}.{new}", DeprecationWarning, stacklevel=3)

    def decorate(cls: type[Section]) -> type[Section]:
        made = cls.__init__

        @functools.wraps(made)
        def __init__(self: Any, **values: Any) -> None:
            for old in [name for name in names if name in values]:
                warn(cls, old, names[old])
                values[names[old]] = values.pop(old)  # dataclasses.replace gives the new name as well
            made(self, **values)

        cls.__init__ = __init__  # type: ignore[method-assign]
        for old, new in names.items():

            def get(self: Any, old: str = old, new: str = new) -> Any:
                warn(cls, old, new)
                return getattr(self, new)

            def put(self: Any, value: Any, old: str = old, new: str = new) -> None:
                warn(cls, old, new)
                setattr(self, new, value)

            setattr(cls, old, property(get, put))
        return cls

    return decorate
