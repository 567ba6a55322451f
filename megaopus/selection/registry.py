"""Keeps entries by name; those of a package are imported when first asked for. Needs the standard library only."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar


class Flops(NamedTuple):
    """Says what scoring costs, beside training on the same tokens."""

    ratio: float
    """FLOPs per scored token over FLOPs per trained token."""
    why: str
    """Which passes they are, in words."""


NEEDS = {
    "proxy": "a proxy batch of each step",
    "text_features": "numbers of the candidates' text, worked out beforehand",
    "wanted": "which candidates are of a target domain",
    "hooks": "hooks on modules, which fire in uncompiled code only",
    "whole_model": "the whole model on every rank: tp = pp = cp = ep = 1",
    "whole_weights": "whole weights on every rank: no ZeRO-3",
    "whole_sequence": "whole sequences on every rank: cp = 1",
    "small_model": "a model of a few million parameters",
    "fine_steps": "weights that one optimizer step changes by more than they are rounded",
}
"""Everything that an entry can need. What the settings cannot give is refused before a run, for the entry's reason;
``hooks`` is for the reader, ``fine_steps`` is looked at when a method scores."""


class Named(Protocol):
    """An entry of a registry."""

    @property
    def name(self) -> str: ...

    @property
    def origin(self) -> str: ...

    @property
    def needs(self) -> Mapping[str, str]: ...


Entry = TypeVar("Entry", bound=Named)


class Registry(Generic[Entry]):
    """Entries of one kind, each added by the module that it lies in.

    Every module of ``package`` is imported when an entry is first looked up: a new file there is all that a new entry
    takes. Other packages add theirs by importing the registry too.
    """

    def __init__(self, kind: str, package: str):
        self._kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def add(self, entry: Entry) -> None:
        """Make ``entry`` known. Raises ValueError for a name that another has, and for a need that nobody knows."""
        if unknown := sorted(set(entry.needs) - set(NEEDS)):
            raise ValueError(
                f"{self._kind} {entry.name!r} needs {', '.join(unknown)}, which means nothing: {', '.join(NEEDS)}"
            )
        if not entry.origin.startswith(f"{self._package}."):
            self._load()
        known = self._entries.get(entry.name)
        if known is not None and known.origin != entry.origin:
            raise ValueError(f"{self._kind} {entry.name!r} is taken, by {known.origin}: choose another name")
        self._entries[entry.name] = entry

    def names(self) -> tuple[str, ...]:
        """Every name, in the order of the files that they are in."""
        self._load()
        return tuple(self._entries)

    def find(self, name: str) -> Entry:
        """The entry of that name. Raises ValueError if there is none."""
        if (entry := self.get(name)) is None:
            raise ValueError(f"unknown {self._kind} {name!r}: use one of {', '.join(self._entries)}")
        return entry

    def get(self, name: str) -> Entry | None:
        """The entry of that name, None if there is none."""
        self._load()
        return self._entries.get(name)

    def remove(self, name: str) -> None:
        """Forget an entry; one that is not there is no error."""
        self._entries.pop(name, None)

    def __iter__(self) -> Iterator[Entry]:
        self._load()
        return iter(tuple(self._entries.values()))

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self._package)
        for module in sorted(found.name for found in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{self._package}.{module}")
        self._loaded = True


def origin_of(function: Callable[..., Any]) -> str:
    """Module and name of what an entry was made from."""
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
