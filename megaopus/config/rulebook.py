"""Keeps rules between settings, each with the keys that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

from megaopus.config.run_config import RunConfig
from megaopus.errors import Problem

Rule = Callable[[RunConfig, int | None], Iterator[Problem]]
"""(settings, world size or None while it is unknown) -> what does not hold."""


class RuleBook:
    """Holds rules in their order; one that reads a refused setting is left out, so that one mistake is one line."""

    def __init__(self) -> None:
        self._rules: list[tuple[frozenset[str], Rule]] = []

    def reading(self, *keys: str) -> Callable[[Rule], Rule]:
        """Enter a rule that reads ``keys``, settings or whole sections."""

        def enter(rule: Rule) -> Rule:
            self._rules.append((frozenset(keys), rule))
            return rule

        return enter

    def problems(self, config: RunConfig, world_size: int | None, refused: Set[str]) -> Iterator[Problem]:
        """Return what does not hold, by the rules that read none of the ``refused`` settings."""
        for keys, rule in self._rules:
            if not any(key in keys or key.split(".", 1)[0] in keys for key in refused):
                yield from rule(config, world_size)
