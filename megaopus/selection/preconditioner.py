"""P_t: an optimizer's linear map from a gradient to its update, with the optimizer's state frozen.

The update of each optimizer is split as  -P_t g + (what does not depend on g: momentum's history, weight decay); the
second part is the same for every candidate and dropped. The learning rate is part of P_t, so with a learning rate of 0
every utility is 0. Formulas: arXiv 2602.05400, section 4, and the optimizers' own update rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from megaopus.selection.backend import Gradient, Shard


class ParameterOperator(Protocol):
    """P_t of one parameter; self-adjoint."""

    def apply(self, gradient: Tensor) -> Tensor:
        """P g in g's dtype; leading axes beyond the parameter's own are batch axes."""

    def diagonal(self) -> Tensor | None:
        """Elementwise factor (the parameter's shape, or a scalar); None where P is not diagonal."""

    def sides(self) -> tuple[Tensor | None, Tensor | None] | None:
        """As ``UpdateOperator.sides``."""

    def bounded(self, gradient: Tensor) -> ParameterOperator:
        """As ``UpdateOperator.bounded``, of this parameter."""


OperatorFactory = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor], ParameterOperator | None]
"""(parameter group, state of the parameter, parameter) -> its operator, or None while there is no state.

The group also holds ``muon_operator``, 'paper' or 'full', and ``shard``, the ``Shard`` of a matrix that ranks share."""


@dataclass(frozen=True, slots=True)
class Diagonal:
    """Multiplication by ``factor``: a scalar tensor, or one of the parameter's shape."""

    factor: Tensor

    def apply(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor.to(gradient.dtype)

    def diagonal(self) -> Tensor | None:
        return self.factor

    def sides(self) -> None:
        return None

    def bounded(self, gradient: Tensor) -> Diagonal:
        return self


class Adaptive:
    """Adam's: multiplication by ``factor`` of a gradient that the second moment takes in first; of None: as it stands.

    Worked out when first asked for: where steps are bounded the frozen one never is.
    """

    def __init__(self, factor: Callable[[Tensor | None], Tensor]):
        self._factor = factor

    @cached_property
    def _frozen(self) -> Diagonal:
        return Diagonal(self._factor(None))

    def apply(self, gradient: Tensor) -> Tensor:
        return self._frozen.apply(gradient)

    def diagonal(self) -> Tensor:
        return self._frozen.factor

    def sides(self) -> None:
        return None

    def bounded(self, gradient: Tensor) -> Diagonal:
        return Diagonal(self._factor(gradient))


@dataclass(frozen=True, slots=True)
class OneSided:
    """Multiplication by a symmetric matrix: ``matrix @ g`` where ``left``, else ``g @ matrix``.

    ``matrix`` is that of the whole parameter; ``shard``: the part of the parameter that this rank holds.
    """

    matrix: Tensor
    left: bool
    shard: Shard | None = None

    def apply(self, gradient: Tensor) -> Tensor:
        matrix = self.matrix.to(gradient.dtype)
        if self._mixes_ranks():
            assert self.shard is not None
            gradient, matrix = self.shard.gather(gradient), matrix[self.shard.index]
            return matrix @ gradient if self.left else gradient @ matrix.t()
        return matrix @ gradient if self.left else gradient @ matrix

    def diagonal(self) -> Tensor | None:
        return None

    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        matrix = self.matrix
        if self._mixes_ranks():
            assert self.shard is not None
            matrix = matrix[self.shard.index]  # symmetric: (local, whole)
            return (matrix.t(), None) if self.left else (None, matrix)
        return (matrix, None) if self.left else (None, matrix)

    def bounded(self, gradient: Tensor) -> OneSided:
        return self

    def _mixes_ranks(self) -> bool:
        return self.shard is not None and self.shard.dim == (0 if self.left else 1)


def sgd(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator:
    """torch.optim.SGD: lr I; with momentum lr (1 - dampening) I, with Nesterov lr (1 + momentum (1 - dampening)) I.

    The first step copies the gradient into the momentum buffer, so no dampening applies there.
    """
    _refuse_maximize(group)
    factor = 1.0
    momentum = group.get("momentum", 0)
    if momentum:
        fresh = 1.0 if state.get("momentum_buffer") is None else 1.0 - group.get("dampening", 0)
        factor = 1.0 + momentum * fresh if group.get("nesterov") else fresh
    return Diagonal(_scalar(group["lr"] * factor, parameter))


def adam(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Adam and AdamW: C_t / (sqrt(v / (1 - b2^(t-1))) + eps), C_t = lr (1 - b1) / (1 - b1^t).

    t is the step about to be taken: the state holds v after t - 1 steps and is corrected for as many, while b1's
    correction is the one the coming update uses. With amsgrad, v is its running maximum. Bounded by a gradient g:
    v' = b2 v + (1 - b2) g^2 in place of v, corrected for t steps, as the update itself would have it; then
    |P g| <= C_t sqrt((1 - b2^t) / (1 - b2)) whatever g is.
    """
    _refuse_maximize(group)
    step = float(state.get("step", group.get("step", 0)))  # apex keeps it in the group
    if step < 1 or "exp_avg_sq" not in state:
        return None
    beta1, beta2 = (float(beta) for beta in group["betas"])
    corrected = group.get("bias_correction", True)
    first, second = (1 - beta1 ** (step + 1), 1 - beta2**step) if corrected else (1.0, 1.0)
    v, largest = state["exp_avg_sq"], state["max_exp_avg_sq"] if group.get("amsgrad") else None
    scale = group["lr"] * (1 - beta1) / first

    @torch.no_grad()
    def factor(gradient: Tensor | None) -> Tensor:
        moment, correction = v if largest is None else largest, second
        if gradient is not None:
            moment = v * beta2 + (1 - beta2) * gradient.to(v.dtype).square()
            moment = moment if largest is None else moment.maximum(largest)
            correction = 1 - beta2 ** (step + 1) if corrected else 1.0
        return (moment / correction).sqrt_().add_(group["eps"]).reciprocal_().mul_(scale)

    return Adaptive(factor)


def muon(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Muon: lr s kappa S / ||M||_F, M the momentum buffer, S = S_k .. S_1, S_j = aI + bA_j + cA_j^2, A_j = X_j X_j^T.

    X_1 = M / ||M||_F, X_(j+1) = S_j X_j, on the short side of the matrix. kappa is the weight of the new gradient in
    the update: 1 - mu^2 with Nesterov, else 1 - mu. s is the optimizer's scale for the shape. ``muon_operator`` 'paper'
    keeps S_1; 'full' takes every factor of the Newton-Schulz iteration.
    """
    momentum = state.get("momentum_buffer")
    if momentum is None:
        return None
    shard = group.get("shard")
    if shard is not None:
        momentum = shard.gather(momentum)
    rows, columns = momentum.shape
    left = rows <= columns
    x = momentum.float() if left else momentum.float().t()
    norm = x.norm().clamp_(min=group.get("eps", 1e-7))
    x = x / norm
    a, b, c = group["ns_coefficients"]
    identity = torch.eye(len(x), device=x.device)
    product = identity
    for _ in range(group["ns_steps"] if group["muon_operator"] == "full" else 1):
        gram = x @ x.t()
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor @ product
        x = factor @ x
    mu = group["momentum"]
    scale = group["lr"] * _muon_shape_scale(group, rows, columns) * (1 - (mu**2 if group["nesterov"] else mu))
    # every S_j is a polynomial in the same Gram matrix, so the product is symmetric; rounding is averaged out
    return OneSided((product + product.t()) * (0.5 * scale / norm), left, shard)


def _muon_shape_scale(group: Mapping[str, Any], rows: int, columns: int) -> float:
    rule = group.get("adjust_lr_fn") or "original"
    if rule == "original":
        return max(1.0, rows / columns) ** 0.5
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    raise ValueError(f"Muon's adjust_lr_fn={rule!r} is unknown: use 'original' or 'match_rms_adamw'")


def _refuse_maximize(group: Mapping[str, Any]) -> None:
    if group.get("maximize"):
        raise ValueError(
            "selection lowers a loss, but the optimizer was made with maximize=True: negate the loss instead"
        )


def _scalar(value: float | Tensor, parameter: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=parameter.device)


_FACTORIES: dict[str, OperatorFactory] = {"SGD": sgd, "Adam": adam, "AdamW": adam, "FusedAdam": adam, "Muon": muon}


def register_operator(optimizer_class: str, factory: OperatorFactory) -> None:
    """Teach selection the update rule of optimizers whose class, or a base class, has this name."""
    _FACTORIES[optimizer_class] = factory


def factory_of(optimizer: Optimizer) -> OperatorFactory:
    """The operator factory for an optimizer; raises TypeError if its class and bases are unknown."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _FACTORIES:
            return _FACTORIES[cls.__name__]
    raise TypeError(
        f"no update operator is known for the optimizer {type(optimizer).__name__}, only for"
        f" {', '.join(sorted(_FACTORIES))}. Add one with megaopus.selection.register_operator (docs/selection.md)"
    )


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
    Raises TypeError for an optimizer without a registered operator.
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
            operator = Diagonal(_scalar(each.group["lr"], each.parameter))
        else:
            settings = {**each.group, "muon_operator": muon_operator, "shard": (shards or {}).get(each.name)}
            operator = factory_of(each.optimizer)(settings, each.state, each.parameter)
        key = id(each.optimizer)
        with_state[key] = with_state.get(key, False) or operator is not None
        if operator is not None:
            operators[each.name] = operator
    return OptimizerOperator(operators) if all(with_state.values()) else None
