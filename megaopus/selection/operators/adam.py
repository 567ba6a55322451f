"""Derives P_t of Adam and AdamW, torch's and Apex's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megaopus.selection.operators.maps import Adaptive, ParameterOperator
from megaopus.selection.operators.registry import operator_of_class
from megaopus.selection.operators.rule import refuse_maximize
from megaopus.selection.pieces import side_by_side


class AdamMap(Adaptive):
    """Adam's P_t of one parameter; those of many that have the same settings make their directions together."""

    def __init__(self, v: Tensor, largest: Tensor | None, settings: tuple[float, float, float, float, float]):
        """``settings``: scale, beta2, eps, and by what v is divided as it stands, and once it took a gradient in."""
        self._v, self._largest, self._settings = v, largest, settings

    @property
    def alike(self) -> Any:
        """Equal for those that can make their directions together."""
        return type(self), self._settings, self._largest is None, self._v.dtype, self._v.device

    @torch.no_grad()
    def _factor(self, gradient: Tensor | None) -> Tensor:
        found = torch.empty_like(self._v)
        given = None if gradient is None else [gradient.to(self._v.dtype)]
        self._inverse_roots([found], [found], [self._v], [] if self._largest is None else [self._largest], given)
        return found

    def _inverse_roots(
        self,
        found: list[Tensor],
        buffers: list[Tensor],
        v: list[Tensor],
        largest: list[Tensor],
        gradients: list[Tensor] | None,
        factor: float = 1.0,
    ) -> None:
        """Put C_t / (sqrt(v / correction) + eps) into each of ``found``, by the settings of this parameter.

        ``buffers``: what they are views of, and nothing else is. ``factor``: of ``gradients``.
        """
        scale, beta2, eps, correction, coming = self._settings
        if gradients is None:
            torch._foreach_copy_(found, largest or v)
        else:
            torch._foreach_copy_(found, v)
            for each in buffers:
                each.mul_(beta2)
            torch._foreach_addcmul_(found, gradients, gradients, (1 - beta2) * factor**2)
            if largest:
                torch._foreach_maximum_(found, largest)
            correction = coming
        for each in buffers:
            each.div_(correction).sqrt_().add_(eps).reciprocal_().mul_(scale)

    def takes(self, gradient: Tensor) -> bool:
        """Say whether ``directions`` can be given this gradient."""
        tensors = (gradient, self._v) if self._largest is None else (gradient, self._v, self._largest)
        return gradient.dtype == self._v.dtype and all(tensor.is_contiguous() for tensor in tensors)

    @staticmethod
    @torch.no_grad()
    def directions(maps: Sequence[AdamMap], gradients: list[Tensor], factor: float, bounded: bool) -> list[Tensor]:
        """P g of each of ``factor`` times ``gradients``, in few launches; to the bit as one by one if ``factor`` is 1.

        ``bounded``: by these gradients. ``maps`` are alike.
        """
        found, buffers = side_by_side(gradients)
        largest = [each._largest for each in maps if each._largest is not None]
        squares = [each._v for each in maps]
        maps[0]._inverse_roots(found, buffers, squares, largest, gradients if bounded else None, factor)
        torch._foreach_mul_(found, gradients)
        for each in buffers if factor != 1 else ():
            each.mul_(factor)
        return found


@operator_of_class("Adam", "AdamW", "FusedAdam", state=("exp_avg_sq",))
def adam(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> ParameterOperator | None:
    """Adam and AdamW: C_t / (sqrt(v / (1 - b2^(t-1))) + eps), C_t = lr (1 - b1) / (1 - b1^t).

    t is the step about to be taken: the state holds v after t - 1 steps and is corrected for as many, while b1's
    correction is the one the coming update uses. With amsgrad, v is its running maximum. Bounded by a gradient g:
    v' = b2 v + (1 - b2) g^2 in place of v, corrected for t steps, as the update itself would have it; then
    |P g| <= C_t sqrt((1 - b2^t) / (1 - b2)) whatever g is.
    """
    refuse_maximize(group)
    step = float(state.get("step", group.get("step", 0)))  # apex keeps it in the group
    if step < 1 or "exp_avg_sq" not in state:
        return None
    beta1, beta2 = (float(beta) for beta in group["betas"])
    corrected = group.get("bias_correction", True)
    first, second = (1 - beta1 ** (step + 1), 1 - beta2**step) if corrected else (1.0, 1.0)
    coming = 1 - beta2 ** (step + 1) if corrected else 1.0
    largest = state["max_exp_avg_sq"] if group.get("amsgrad") else None
    settings = (group["lr"] * (1 - beta1) / first, beta2, group["eps"], second, coming)
    return AdamMap(state["exp_avg_sq"], largest, settings)
