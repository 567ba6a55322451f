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


def operator_of_class(*optimizer_classes: str) -> Callable[[OperatorFactory], OperatorFactory]:
    """Enter a rule of this package under the names of the classes that it is for."""

    def enter(factory: OperatorFactory) -> OperatorFactory:
        for name in optimizer_classes:
            _SHIPPED.register(name, factory)
        return factory

    return enter


def register_operator(optimizer_class: str, factory: OperatorFactory) -> None:
    """Teach selection the update rule of optimizers whose class, or a base class, has this name."""
    _REGISTERED[optimizer_class] = factory


def factory_of(optimizer: Optimizer) -> OperatorFactory:
    """Find the rule of an optimizer; raises TypeError if its class and bases are unknown."""
    known = {**_SHIPPED, **_REGISTERED}
    for cls in type(optimizer).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]
    raise TypeError(
        f"no update operator is known for the optimizer {type(optimizer).__name__}, only for"
        f" {', '.join(sorted(known))}. Add one with megaopus.selection.register_operator (docs/selection.md)"
    )
