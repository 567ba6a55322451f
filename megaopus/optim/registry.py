"""Keeps every optimizer by the name that ``optim.name`` gives it. Nothing is imported before a name is asked for."""

from __future__ import annotations

from megaopus.optim.spec import Spec
from megaopus.registry import Registry

OPTIMIZERS: Registry[Spec] = Registry(
    "optimizer",
    "megaopus.optim",
    lambda module: module.name != "sharded",  # imports megatron, which has to be prepared first
)
"""Name -> ``Spec``."""


def register_optimizer(name: str, spec: Spec) -> Spec:
    """Let ``optim.name`` name an optimizer. Raises ConfigError if the name is taken."""
    return OPTIMIZERS.register(name, spec)


def spec_of(name: str) -> Spec:
    """Return what is known of an optimizer; KeyError for an unknown name."""
    return OPTIMIZERS[name]
