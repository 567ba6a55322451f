"""Averages the proxy gradient over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megaopus.selection.backend import Gradient
from megaopus.selection.pieces import Scaled


class ProxyGradient:
    """Running average A <- decay A + (1 - decay) g from A = 0, read as A / (1 - decay^count): a weighted mean of the g.

    Only steps that score feed it. With ``decay`` 0 it is the latest gradient, remembered only if ``kept``.
    """

    def __init__(self, decay: float, kept: bool = False):
        self._decay = decay
        self._kept = kept or decay > 0
        self._average: Gradient = {}
        self._count = 0
        self._offered: Gradient = {}
        self._lent = False

    def offer(self, gradient: Gradient, *, in_place: bool = False, lent: bool = False) -> Mapping[str, Tensor]:
        """The average with this step's gradient in it; it is forgotten unless ``keep`` follows.

        ``in_place``: ``gradient`` becomes it. ``lent``: and lies where the next will, so that ``keep`` takes a copy.
        Raises ValueError if the parameters are not those kept.
        """
        if not self._kept:
            return gradient
        if self._count and self._average.keys() != gradient.keys():
            changed = sorted(self._average.keys() ^ gradient.keys())
            raise ValueError(
                f"the running proxy gradient is of other parameters than the model's: {', '.join(changed)}"
            )
        self._offered = gradient if in_place else {name: value.clone() for name, value in gradient.items()}
        self._lent = in_place and lent
        self._blend(list(self._offered.values()))
        return self._unbiased(self._offered, self._count + 1)

    @torch.no_grad()
    def _blend(self, gradients: list[Tensor]) -> None:
        """Make decay A + (1 - decay) g of each g."""
        if not gradients:
            return
        if not self._count:
            torch._foreach_mul_(gradients, 1 - self._decay)
            return
        for name, value in zip(self._average, gradients, strict=True):
            self._average[name] = self._average[name].to(value)
        torch._foreach_lerp_(gradients, list(self._average.values()), self._decay)

    def last(self) -> Mapping[str, Tensor] | None:
        """The average as kept last, None before; an offer that was not kept is forgotten."""
        self._offered = {}
        return self._unbiased(self._average, self._count) if self._count else None

    def _unbiased(self, average: Gradient, count: int) -> Mapping[str, Tensor]:
        return Scaled(average, 1 / (1 - self._decay**count))

    @torch.no_grad()
    def keep(self) -> None:
        """Make the offered average the one to go on from."""
        if not self._offered:
            return
        if self._lent:
            self._average = self._average or {name: torch.empty_like(value) for name, value in self._offered.items()}
            torch._foreach_copy_(list(self._average.values()), list(self._offered.values()))
        else:
            self._average = self._offered
        self._offered = {}
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """{'count': updates so far, 'average': name -> copy}; empty before the first update."""
        if not self._count:
            return {}
        return {"count": self._count, "average": {name: value.clone() for name, value in self._average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; where nothing is remembered there is nothing to continue."""
        if not self._kept or "average" not in state:
            self._average, self._count = {}, 0
        else:
            self._average = {name: value.detach().clone() for name, value in state["average"].items()}
            self._count = int(state["count"])
