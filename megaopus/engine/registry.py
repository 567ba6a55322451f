"""Keeps every engine by the name that ``engine.name`` gives it, with what settings and ``check`` must know of it.

An engine is a package beside this file, whose ``__init__`` registers it; torch is not imported before its class is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megaopus.registry import Registry


class Refusal(NamedTuple):
    """Says which setting elsewhere an engine cannot serve, why, and what to set instead."""

    key: str
    """Dotted."""
    value: object
    reason: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Describes an engine. Functions take sections of the settings: ``EngineConfig``, ``ParallelConfig`` and so on."""

    load_class: Callable[[], type]
    """Imports and returns its ``engine.base.Engine``. Raises EngineError where it is not installed."""
    check_installed: Callable[[], object] = lambda: None
    """Raises EngineError where what it needs cannot be imported."""
    package: str
    """Whose version a run's environment.json tells."""
    describe: Callable[[Any], str]
    """(engine) -> its name and kind in a line of text."""
    refusals: Callable[[Any, Any, Any, Any], Iterator[Refusal]]
    """(engine, parallel, optim, selection or None) -> what it cannot serve; None: selection is not looked at."""
    shards_optimizer: Callable[[Any], bool]
    """(parallel) -> whether data-parallel ranks share the optimizer's state and the fp32 main weights."""
    serves_experts: bool = False
    """Whether it trains a mixture of experts."""
    memory: Callable[[Any, int, str, int, bool], dict[str, tuple[int, str]]]
    """(engine, parameters of a rank, precision, ranks that share the state, whether candidates are scored by proxy) ->
    rows of ``check``'s table of memory, bytes and how they come about, in the place of those that every engine has."""


ENGINES: Registry[EngineSpec] = Registry("engine", "megaopus.engine", lambda module: module.ispkg)
"""Name -> ``EngineSpec``."""


def register_engine(name: str, spec: EngineSpec) -> EngineSpec:
    """Let ``engine.name`` name an engine. Raises ConfigError if the name is taken."""
    return ENGINES.register(name, spec)
