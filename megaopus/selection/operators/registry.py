"""Keeps each optimizer's P_t, its update rule with the state frozen, by the name of its class.

The update of each optimizer is split as  -P_t g + (what does not depend on g: momentum's history, weight decay); the
second part is the same for every candidate and dropped. The learning rate is part of P_t, so with a learning rate of 0
every utility is 0. Formulas: arXiv 2602.05400, section 4, and the optimizers' own update rules. What each does with
state that says nothing yet: docs/optimizers.md.

Each rule is a file beside this one, which enters itself; all are imported when a rule is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from megaopus.registry import Registry
from megaopus.selection.operators.maps import ParameterOperator

OperatorFactory = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor], ParameterOperator | None]
"""(parameter group, state of the parameter, parameter) -> its operator, or None while there is no state.

The group also holds ``muon_operator``, 'paper' or 'full', and ``shard``, the ``Shard`` of a matrix that ranks share."""

_SHIPPED: Registry[OperatorFactory] = Registry("update rule", "megaopus.selection.operators")
_REGISTERED: dict[str, OperatorFactory] = {}
"""By users; these come first."""
_STATE: dict[OperatorFactory, tuple[str, ...]] = {}
"""Of the rules of this package: keys one of which is in the state of any parameter that was trained."""


def operator_of_class(
    *optimizer_classes: str, state: tuple[str, ...] = ()
) -> Callable[[OperatorFactory], OperatorFactory]:
    """Enter a rule of this package under the names of the classes that it is for.

    ``state``: keys one of which is in the state of any parameter that was trained; without any of them it is the state
    of another class by the same name.
    """

    def enter(factory: OperatorFactory) -> OperatorFactory:
        _STATE[factory] = state
        for name in optimizer_classes:
            _SHIPPED.register(name, factory)
        return factory

    return enter


def register_operator(optimizer_class: str, factory: OperatorFactory) -> None:
    """Teach selection the update rule of optimizers whose class, or a base class, has this name."""
    _REGISTERED[optimizer_class] = factory


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside those that accelerate and Lightning put around it: both have the same parameter groups."""
    for name in ("optimizer", "_optimizer"):
        inner = getattr(optimizer, name, None)
        if inner is not None and getattr(inner, "param_groups", None) is optimizer.param_groups:
            return unwrapped(inner)
    return optimizer


def check_state(optimizer: Optimizer, factory: OperatorFactory, state: Mapping[str, Any], parameter: str) -> None:
    """Raise TypeError if ``state`` of a parameter is not what the optimizer's rule goes by, but another class's."""
    keys, found = _STATE.get(factory, ()), {key for key, value in state.items() if isinstance(value, Tensor)} - {"step"}
    if keys and found and not found & set(keys):
        cls = type(unwrapped(optimizer))
        has, needs = ", ".join(sorted(found)), " or ".join(keys)
        raise TypeError(
            f"{cls.__module__}.{cls.__name__} has the name of an optimizer whose update operator is known, but the"
            f" state of {parameter} has {has} where that has {needs}: it is another optimizer. Give its rule by"
            " megaopus.selection.register_operator (docs/selection.md)"
        )


def factory_of(optimizer: Optimizer) -> OperatorFactory:
    """Find the rule of an optimizer; raises TypeError if its class and bases are unknown."""
    known, optimizer = {**_SHIPPED, **_REGISTERED}, unwrapped(optimizer)
    for cls in type(optimizer).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]
    raise TypeError(
        f"no update operator is known for the optimizer {type(optimizer).__name__}, only for"
        f" {', '.join(sorted(known))}. Add one with megaopus.selection.register_operator (docs/selection.md)"
    )
