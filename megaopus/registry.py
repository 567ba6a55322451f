"""Keeps things by name that modules of a package, or of anybody, register when they are imported."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from megaopus.errors import ConfigError, Problem

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Maps names to entries. The modules of ``package`` are imported when a name is first asked for, not before.

    An entry's module imports the registry and calls ``register``; so nothing lists the entries, and nothing is imported
    in a circle. Names come in alphabetical order, whatever was imported first.
    """

    def __init__(
        self, what: str, package: str, belongs: Callable[[pkgutil.ModuleInfo], bool] = lambda module: True
    ) -> None:
        """``what``: the word for one entry in messages; ``belongs``: which modules of the package may be imported."""
        self.what = what
        self._package = package
        self._belongs = belongs
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, name: str, entry: Entry) -> Entry:
        """Enter ``entry`` and return it. Raises ConfigError if the name is taken by another one."""
        if self._entries.setdefault(name, entry) is not entry:
            reason, remedy = f"two modules register this {self.what}", "give yours another name"
            raise ConfigError([Problem("plugins", name, reason, remedy)])
        return entry

    def load(self) -> None:
        """Import the package's modules, once."""
        if self._loaded:
            return
        self._loaded = True  # a module may ask for names while it is imported
        try:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                if self._belongs(module):
                    importlib.import_module(f"{self._package}.{module.name}")
        except BaseException:
            self._loaded = False
            raise

    def __getitem__(self, name: str) -> Entry:
        self.load()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self.load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self.load()
        return len(self._entries)

    def names(self) -> str:
        """Every name, as a message lists them."""
        return ", ".join(self)
