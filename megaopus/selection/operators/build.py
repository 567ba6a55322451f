"""Builds P_t of all parameters: the linear map from a gradient to the optimizer's update, its state frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from megaopus.selection.backend import Gradient, Shard
from megaopus.selection.operators.adam import AdamMap
from megaopus.selection.operators.maps import Adaptive, Deferred, Diagonal, ParameterOperator
from megaopus.selection.operators.registry import check_state, factory_of
from megaopus.selection.operators.rule import scalar
from megaopus.selection.pieces import OnDemand, Scaled, unscaled


class OptimizerOperator:
    """P_t of every parameter of one or several optimizers (``UpdateOperator``).

    Worked out when it is asked for, parameter by parameter, and kept only inside ``whole``: the optimizers' state must
    stay as it is, and so must a gradient that the map is bounded by.
    """

    def __init__(
        self,
        maps: Mapping[str, ParameterOperator],
        bound: Mapping[str, Tensor] | None = None,
        *,
        adjoint: bool = False,
        keeps: bool = False,
    ):
        """``bound``: the gradient that it is bounded by; ``adjoint``: P_t^T; ``keeps``: what was worked out is kept."""
        self.maps = maps
        self._bound = bound
        self._adjoint = adjoint
        self._kept: dict[str, ParameterOperator] | None = {} if keeps else None

    def apply(self, gradient: Gradient) -> Gradient:
        """P g for each parameter given; one without optimizer state (never trained so far) maps to zero."""
        return {
            name: torch.zeros_like(value) if (map_ := self.map(name)) is None else map_.apply(value)
            for name, value in gradient.items()
        }

    def direction(self, gradient: Mapping[str, Tensor], names: Iterable[str]) -> Gradient:
        """As ``UpdateOperator.direction``."""
        names, found = list(names), dict[str, Tensor]()
        alike: dict[Any, list[str]] = {}
        raw = unscaled(gradient)
        together = self._kept is None and (self._bound is None or self._bound is gradient)
        together &= not isinstance(gradient, OnDemand)
        factor = gradient.factor if isinstance(gradient, Scaled) else 1.0
        for name in names if together else ():
            one = self.maps.get(name)
            if isinstance(one, Adaptive) and one.takes(raw[name]):
                if isinstance(one, AdamMap):
                    alike.setdefault(one.alike, []).append(name)
                else:
                    found[name] = one.direction(raw[name], factor, self._bound is not None)
        for group in alike.values():
            maps = [cast(AdamMap, self.maps[name]) for name in group]
            made = AdamMap.directions(maps, [raw[name] for name in group], factor, self._bound is not None)
            found.update(zip(group, made, strict=True))
        turned = self.transposed()
        return {name: found[name] if name in found else turned._one(name, gradient[name]) for name in names}

    def _one(self, name: str, value: Tensor) -> Tensor:
        return self.apply({name: value})[name]

    def bounded(self, gradient: Mapping[str, Tensor]) -> OptimizerOperator:
        """As ``UpdateOperator.bounded``; parameters that have no gradient there stay as they are."""
        found = self._with(bound=gradient)
        if found._kept is not None:
            for name in gradient:
                found.map(name)
        return found

    def transposed(self) -> OptimizerOperator:
        """As ``UpdateOperator.transposed``."""
        return self._with(adjoint=not self._adjoint)

    def diagonal(self, name: str) -> Tensor | None:
        """Elementwise factor of one parameter, or None where P is not diagonal."""
        return torch.zeros(()) if (map_ := self.map(name)) is None else map_.diagonal()

    def sides(self, name: str) -> tuple[Tensor | None, Tensor | None] | None:
        """(left, right) factors of one parameter, or None where P is not of that form."""
        return None if (map_ := self.map(name)) is None else map_.sides()

    @contextmanager
    def whole(self, keeps: bool = True) -> Iterator[OptimizerOperator]:
        """As ``UpdateOperator.whole``."""
        yield self._with(keeps=True) if keeps else self

    def eager(self) -> OptimizerOperator:
        """Work out now what the state says, and when it is bounded what that says: the optimizer may step then."""
        return self._with(maps={name: _worked_out(each) for name, each in self.maps.items()}, keeps=True)

    def _with(self, **changed: Any) -> OptimizerOperator:
        given = {"maps": self.maps, "bound": self._bound, "adjoint": self._adjoint, "keeps": self._kept is not None}
        return OptimizerOperator(**(given | changed))

    def map(self, name: str) -> ParameterOperator | None:
        """P_t of one parameter, as it is asked for."""
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        found = self.maps.get(name)
        if found is None:
            return None
        if self._bound is not None and name in self._bound:
            found = found.bounded(self._bound[name])
        if self._adjoint:
            found = found.transposed()
        if self._kept is not None:
            found = self._kept[name] = _worked_out(found)
        return found


def _worked_out(operator: ParameterOperator) -> ParameterOperator:
    return operator.kept() if isinstance(operator, Deferred) else operator


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
    operator = operator_of(held_by(optimizers, parameters), muon_operator)
    return None if operator is None else operator.eager()


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
