"""Averages the proxy gradient over steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaopus.selection.backend import Gradient


class ProxyGradient:
    """Running average A <- decay A + (1 - decay) g from A = 0, read as A / (1 - decay^count): a weighted mean of the g.

    Only steps that score feed it. With ``decay`` 0 it is the latest gradient, remembered only if ``kept``.
    """

    def __init__(self, decay: float, kept: bool = False):
        self._decay = decay
        self._kept = kept or decay > 0
        self._average: dict[str, Tensor] = {}
        self._count = 0
        self._offered: dict[str, Tensor] = {}

    def offer(self, gradient: Gradient) -> Gradient:
        """The average with this step's gradient in it; it is forgotten unless ``keep`` follows.

        Raises ValueError if the parameters are not those kept.
        """
        if not self._kept:
            return gradient
        if not self._count:
            self._offered = {name: value * (1 - self._decay) for name, value in gradient.items()}
        elif self._average.keys() != gradient.keys():
            changed = sorted(self._average.keys() ^ gradient.keys())
            raise ValueError(
                f"the running proxy gradient is of other parameters than the model's: {', '.join(changed)}"
            )
        else:
            self._offered = {
                name: torch.add(self._average[name].to(value.device) * self._decay, value, alpha=1 - self._decay)
                for name, value in gradient.items()
            }
        return self._unbiased(self._offered, self._count + 1)

    def last(self) -> Gradient | None:
        """The average as kept last, None before; an offer that was not kept is forgotten."""
        self._offered = {}
        return self._unbiased(self._average, self._count) if self._count else None

    def _unbiased(self, average: Gradient, count: int) -> Gradient:
        scale = 1 / (1 - self._decay**count)
        return {name: value * scale for name, value in average.items()}

    def keep(self) -> None:
        """Make the offered average the one to go on from."""
        if self._offered:
            self._average, self._offered = self._offered, {}
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
