"""Each optimizer's P_t: its update rule with the state frozen, by the name of its class.

The update of each optimizer is split as  -P_t g + (what does not depend on g: momentum's history, weight decay); the
second part is the same for every candidate and dropped. The learning rate is part of P_t, so with a learning rate of 0
every utility is 0. Formulas: arXiv 2602.05400, section 4, and the optimizers' own update rules. What each does with
state that says nothing yet: docs/optimizers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megaopus.selection.operators.maps import Adaptive, Diagonal, OneSided, ParameterOperator, Rotated

OperatorFactory = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor], ParameterOperator | None]
"""(parameter group, state of the parameter, parameter) -> its operator, or None while there is no state.

The group also holds ``muon_operator``, 'paper' or 'full', and ``shard``, the ``Shard`` of a matrix that ranks share."""


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
    return Diagonal(scalar(group["lr"] * factor, parameter))


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
    keeps S_1; 'full' takes every factor of the Newton-Schulz iteration. A matrix without momentum does not move: 0.
    """
    found = _newton_schulz(group, state)
    if found is None:
        return None
    matrix, rows, columns = found
    return _one_sided(group, matrix * (group["lr"] * _muon_shape_scale(group, rows, columns)), rows <= columns)


def namo(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """NAMO: Muon's with min(0.2 a sqrt(max(m, n)), 1) for lr s; a as the optimizer's with ||M|| for ||U||, frozen.

    As for Adam, v after t - 1 steps is corrected for as many, momentum for t.
    """
    found = _newton_schulz(group, state)
    if found is None:
        return None
    matrix, rows, columns = found
    rate = _namo_rate(group, state, _whole(group, state["momentum_buffer"]).norm(), state["v_squared"])
    scale = (0.2 * max(rows, columns) ** 0.5 * rate).clamp(max=1).float()
    return _one_sided(group, matrix * scale, rows <= columns)


def namo_d(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """NAMO-D: S / ||M||_F kappa, then columns times min(0.2 sqrt(max(m, n)) e s_j, 1), s_j clamped, all frozen.

    Not self-adjoint where m > n: S then mixes the columns that are scaled.
    """
    found = _newton_schulz(group, state)
    if found is None:
        return None
    matrix, rows, columns = found
    rate_N = _namo_rate(group, state, _whole(group, state["momentum_buffer"]).norm(dim=0), state["V"])
    mean = rate_N.mean()
    rate_N = rate_N.clamp(group["clamp"] * mean, mean / group["clamp"])
    scale_N = (0.2 * max(rows, columns) ** 0.5 * rate_N).clamp(max=1)
    return _one_sided(group, matrix, rows <= columns, scale_N.float())


def _namo_rate(group: Mapping[str, Any], state: Mapping[str, Any], norm: Tensor, second: Tensor) -> Tensor:
    step = float(state["step"])
    correction = (1 - group["mu2"] ** step) ** 0.5 / (1 - group["momentum"] ** (step + 1))
    return group["lr"] * correction * norm / (second.sqrt() + group["scale_eps"])


def _newton_schulz(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Tensor, int, int] | None:
    """(kappa S / ||M||_F, rows, columns) of the whole momentum M; zero where M is, None where there is none."""
    if state.get("momentum_buffer") is None or ("step" in state and float(state["step"]) < 1):
        return None
    momentum = _whole(group, state["momentum_buffer"])
    rows, columns = momentum.shape
    x = momentum.float() if rows <= columns else momentum.float().t()
    length = x.norm()
    norm = length.clamp(min=group.get("eps") or 1e-30)
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
    scale = (1 - (mu**2 if group["nesterov"] else mu)) * (length > 0) / norm
    # every S_j is a polynomial in the same Gram matrix, so the product is symmetric; rounding is averaged out
    return (product + product.t()) * (0.5 * scale), rows, columns


def _whole(group: Mapping[str, Any], value: Tensor) -> Tensor:
    return value if group.get("shard") is None else group["shard"].gather(value)


def _one_sided(group: Mapping[str, Any], matrix: Tensor, left: bool, columns: Tensor | None = None) -> OneSided:
    return OneSided(matrix, left, group.get("shard"), columns)


def _muon_shape_scale(group: Mapping[str, Any], rows: int, columns: int) -> float:
    rule = group.get("adjust_lr_fn") or "original"
    if rule == "original":
        return max(1.0, rows / columns) ** 0.5
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    raise ValueError(f"Muon's adjust_lr_fn={rule!r} is unknown: use 'original' or 'match_rms_adamw'")


def lion(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Lion: lr (1 - b1) / (b1 |m|): sign(c) = c / |c|, c = b1 m + (1 - b1) g, with the denominator frozen at g = 0.

    A sign has no derivative to speak of; this is what Adam's rule is for its own denominator. Where m is 0, 0. Bounded
    by a gradient g: lr (1 - b1) / max(b1 |m|, (1 - b1) |g|), so that no weight moves further than lr.
    """
    _refuse_maximize(group)
    if (m := state.get("exp_avg")) is None:
        return None
    beta1 = group["betas"][0]
    return Adaptive(lambda gradient: _saturated(group["lr"], 1 - beta1, m.abs() * beta1, gradient))


def sophia_g(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Sophia-G: lr (1 - b1) / (rho h + eps); where |b1 m| is above rho h + eps, and the update clipped therefore, 0.

    0 too where h is 0: nothing is known of the curvature. Bounded by a gradient g: the denominator is at least
    (1 - b1) |g|, so that no weight moves further than lr.
    """
    hessian = state.get("hessian")
    if hessian is None or float(state["step"]) < 1:
        return None
    beta1 = group["betas"][0]
    limit = hessian * group["rho"] + group["eps"]
    free = (hessian > 0) & (state["exp_avg"].abs() * beta1 <= limit)
    return Adaptive(lambda gradient: _saturated(group["lr"], 1 - beta1, limit, gradient) * free)


def _saturated(lr: float, weight: float, limit: Tensor, gradient: Tensor | None) -> Tensor:
    """lr weight / limit, the limit raised to weight |gradient|; 0 where both are 0."""
    if gradient is not None:
        limit = limit.maximum(gradient.to(limit.dtype).abs() * weight)
    return torch.where(limit > 0, lr * weight / limit, 0.0)


def sgd_sai(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """SGD-SaI: lr gsnr (1 - mu) I; 0 while gsnr, which the first gradient sets, is not set."""
    if "gsnr" not in state:
        return None
    return Diagonal(scalar(group["lr"] * (1 - group["momentum"]) * state["gsnr"][0], parameter))


def conda(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Conda: Adam's, times ``scale``, in the basis Q. Bounded: v takes the rotated gradient in, as Adam's does."""
    if "projection" not in state or (moment := adam(group, state, parameter)) is None:
        return None
    assert isinstance(moment, Adaptive)
    rows, columns = _whole(group, state["exp_avg_sq"]).shape

    def factor(rotated: Tensor | None) -> Tensor:
        known = moment if rotated is None else moment.bounded(rotated)
        return known.diagonal() * group["scale"]

    return Rotated(state["projection"], rows <= columns, factor, group.get("shard"))


def _refuse_maximize(group: Mapping[str, Any]) -> None:
    if group.get("maximize"):
        raise ValueError(
            "selection lowers a loss, but the optimizer was made with maximize=True: negate the loss instead"
        )


def scalar(value: float | Tensor, parameter: Tensor) -> Tensor:
    """A number as a tensor beside the parameter."""
    return torch.as_tensor(value, dtype=torch.float32, device=parameter.device)


_FACTORIES: dict[str, OperatorFactory] = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": adam,
    "FusedAdam": adam,
    "Lion": lion,
    "Muon": muon,
    "NAMO": namo,
    "NAMOD": namo_d,
    "Conda": conda,
    "SophiaG": sophia_g,
    "SGDSaI": sgd_sai,
}


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
