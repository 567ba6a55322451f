"""Builds P_t of all parameters: the linear map from a gradient to the optimizer's update, its state frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from megaopus.selection.backend import Gradient, Shard
from megaopus.selection.operators.maps import Diagonal, ParameterOperator
from megaopus.selection.operators.registry import check_state, factory_of
from megaopus.selection.operators.rule import scalar


class OptimizerOperator:
    """P_t of every parameter of one or several optimizers (``UpdateOperator``)."""

    def __init__(self, operators: dict[str, ParameterOperator]):
        self._operators = operators

    def apply(self, gradient: Gradient) -> Gradient:
        """P g for each parameter given; one without optimizer state (never trained so far) maps to zero."""
        return {
            name: self._operators[name].apply(value) if name in self._operators else torch.zeros_like(value)
            for name, value in gradient.items()
        }

    def bounded(self, gradient: Gradient) -> OptimizerOperator:
        """As ``UpdateOperator.bounded``; parameters that have no gradient there stay as they are."""
        return OptimizerOperator(
            {
                name: operator.bounded(gradient[name]) if name in gradient else operator
                for name, operator in self._operators.items()
            }
        )

    def transposed(self) -> OptimizerOperator:
        """As ``UpdateOperator.transposed``."""
        return OptimizerOperator({name: operator.transposed() for name, operator in self._operators.items()})

    def diagonal(self, name: str) -> Tensor | None:
        """Elementwise factor of one parameter, or None where P is not diagonal."""
        if name not in self._operators:
            return torch.zeros(())
        return self._operators[name].diagonal()

    def sides(self, name: str) -> tuple[Tensor | None, Tensor | None] | None:
        """(left, right) factors of one parameter, or None where P is not of that form."""
        operator = self._operators.get(name)
        return None if operator is None else operator.sides()


class Held(NamedTuple):
    """A parameter and what its optimizer knows of it."""

    name: str
    parameter: Tensor
    optimizer: Optimizer
    group: Mapping[str, Any]
    state: Mapping[str, Any]


def held_by(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> Iterator[Held]:
    """Those of ``parameters`` (name -> the tensor an optimizer holds) that one of ``optimizers`` updates."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (name := names.get(id(parameter))) is not None:
                    yield Held(name, parameter, optimizer, group, optimizer.state.get(parameter, {}))


def build_operator(
    parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer], muon_operator: str = "paper"
) -> OptimizerOperator | None:
    """P_t of ``parameters`` (name -> the tensor the optimizer holds), or None while one of the optimizers has no state.

    ``muon_operator``: 'paper' or 'full' for Muon's; 'raw' for lr I whatever the optimizer, as GREATS has it.
    Raises TypeError for an optimizer without a registered operator, or with the state of another.
    """
    return operator_of(held_by(optimizers, parameters), muon_operator)


@torch.no_grad()
def operator_of(
    held: Iterable[Held], muon_operator: str = "paper", shards: Mapping[str, Shard] | None = None
) -> OptimizerOperator | None:
    """As ``build_operator``, of parameters wherever their optimizer's state lies.

    ``shards``: those of the parameters that ranks share; the call is then collective where P_t needs the whole matrix.
    Raises TypeError for an optimizer without a registered operator.
    """
    operators: dict[str, ParameterOperator] = {}
    with_state: dict[int, bool] = {}
    for each in held:
        operator: ParameterOperator | None
        if muon_operator == "raw":
            operator = Diagonal(scalar(each.group["lr"], each.parameter))
        else:
            settings = {**each.group, "muon_operator": muon_operator, "shard": (shards or {}).get(each.name)}
            factory = factory_of(each.optimizer)
            check_state(each.optimizer, factory, each.state, each.name)
            operator = factory(settings, each.state, each.parameter)
        key = id(each.optimizer)
        with_state[key] = with_state.get(key, False) or operator is not None
        if operator is not None:
            operators[each.name] = operator
    return OptimizerOperator(operators) if all(with_state.values()) else None
