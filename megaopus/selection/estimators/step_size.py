"""Chooses the finite-difference step of directional scoring, and measures what rounding and curvature leave of it.

A difference of two losses must be well above the rounding of either, and the loss nearly straight over it. Both are
about nats, not about optimizer steps, which shrink with the learning rate (docs/decisions/010).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaopus.selection.backend import Gradient, ScoringBackend
from megaopus.selection.pieces import Scaled, chunks, pieces_of, unscaled

NATS = {False: 0.005, True: 0.025}
"""Change of the proxy's loss that a step should make; True: where the model computes in 16 bits."""
PERIOD = 64
"""Training steps from one judgement of the step to the next."""
DROWNED = 5.0
"""Spread of utilities over their error below which ranks are noise to a good part: Spearman with the oracle was .97
there."""
_TOLERANCE = 0.1
"""Share of the differences that may change when the step is halved, before other steps are tried."""
_RISE = 1.5
"""Growth of that share by which rounding is known: each halving doubles its part."""
_CHANCE = 0.5
"""Share that differences may happen to have which have nothing to do with each other; about 2 on average."""
_MOST_LEVELS = 12
_LARGEST_POWER = 64
_EXPONENT_OF_1, _FRACTION_BITS = 1023, 52
"""Of a float64."""


class Judgement(NamedTuple):
    """Says what was found out about a step."""

    level: int
    """Power of two by which it should have been larger."""
    error: float
    """Standard deviation of the error of a difference, in nats: rounding, and what is left of curvature."""


def step_size(
    backend: ScoringBackend, direction: Gradient, gradient: Mapping[str, Tensor], *, level: int = 0
) -> float | Tensor:
    """The power of two, in units of ``direction``, nearest to a change of the proxy's loss by ``NATS``; times 2^level.

    ``gradient``: of the proxy's loss. A power of two, since layouts round the change to other last bits; the same on
    every rank. 1 where there is no change to go by. () float64 on the device where reading it would have the host wait
    and the backend can do without. Collective.
    """
    change = predicted_change(backend, direction, gradient)
    size = nearest_power(NATS[backend.computes_in_16_bits], change.abs(), level)
    return size if size.device.type != "cpu" and hasattr(backend, "lends_gradient") else float(size)


def nearest_power(wanted: float, change: Tensor, level: int = 0) -> Tensor:
    """() float64: the power of two nearest to ``wanted`` / ``change`` times 2^level; 1 where ``change`` is not above 0.

    Made of its bits, for a device's powers of two need not be exact.
    """
    power = (wanted / change).log2().round() + level
    bounded = power.clamp(-_LARGEST_POWER, _LARGEST_POWER).nan_to_num(0.0).long()
    exact = ((bounded + _EXPONENT_OF_1) << _FRACTION_BITS).view(torch.float64)
    return exact.where((change > 0) & (change < math.inf), torch.ones_like(exact))


def predicted_change(backend: ScoringBackend, direction: Gradient, gradient: Mapping[str, Tensor]) -> Tensor:
    """() float64: <direction, gradient> over the whole model, each weight once: the change of a loss along it, in nats.

    Both in pieces, if the backend has them. The same on every rank, as a sum of all is. Collective.
    """
    counts: Callable[[str], float] = getattr(backend, "counts", lambda name: 1.0)  # version 0.1 had no such method
    weights = {name: float(counts(name)) for name in direction}
    given, factor = unscaled(gradient), gradient.factor if isinstance(gradient, Scaled) else 1.0
    start = torch.zeros(1, dtype=torch.float64, device=backend.device)
    sums = []
    for weight in sorted({*weights.values()} - {0.0}, reverse=True):
        names = [name for name, counted in weights.items() if counted == weight]
        for here, there in chunks([[direction[name] for name in names], [given[name] for name in names]]):
            product = _products(here, there).sum(dtype=torch.float64)
            sums.append(product if weight == 1 else product * weight)
    total = start if not sums else (torch.stack(sums).sum() * factor).view(1).to(start)
    copies = 1 if pieces_of(backend) else backend.world_size
    return backend.sum_over_ranks(start[:0], total)[1][0] / copies


def _products(here: list[Tensor], there: list[Tensor]) -> Tensor:
    """Multiply tensors with tensors, into one flat one, so that they are added up at once."""
    found = torch.cat([tensor.reshape(-1) for tensor in here])
    views = [part.view(tensor.shape) for part, tensor in zip(found.split([t.numel() for t in here]), here, strict=True)]
    torch._foreach_mul_(views, there)
    return found


def judge(differences: Callable[[int], Tensor], sides: str, *, search: bool) -> Judgement | None:
    """Judge a step by halving it: what the halves do not add up to is rounding and curvature.

    ``differences(level)``: (N,) float64 differences of the candidates' losses over 2^level times the step, the same on
    every rank. ``search``: where too much does not add up, look among smaller steps (less curvature, more rounding) and
    larger ones for the one with the least. None if nothing can be told: no two finite values that differ.
    """
    shares: dict[int, tuple[float, float]] = {}

    def share(level: int) -> float:
        if level not in shares:
            whole, half = differences(level), differences(level - 1)
            known = whole.isfinite() & half.isfinite()
            left = float((whole - 2 * half)[known].square().mean().sqrt()) if known.any() else math.nan
            signal = float(whole[known].std(correction=0)) if known.any() else 0.0
            shares[level] = (left / signal if signal > 0 else math.inf, left)
        return shares[level][0]

    def best() -> int:
        return min(shares, key=lambda level: shares[level][0])

    if not math.isfinite(share(0)):
        return None
    if search and share(0) > _TOLERANCE:
        rounding = share(-1) > _RISE * share(0)
        for way in (1, -1) if rounding else (-1, 1):
            if best() * way >= 0 or shares[best()][0] > _CHANCE:  # the other way has not helped
                _walk(share, way)
    # each loss is rounded by itself: variances 5/2 of one loss's against the 1/2 of a central difference, 6 against 2
    return Judgement(best(), shares[best()][1] / (5.0 if sides == "central" else 3.0) ** 0.5)


def _walk(share: Callable[[int], float], way: int) -> None:
    """Try levels up (1) or down (-1) from 0 until a share is small enough, or grows: by chance it may on the way down.

    Where the loss turns several times over a step, shares on the way down say nothing until it turns no more.
    """
    level = 0
    while share(level) > _TOLERANCE and abs(level) < _MOST_LEVELS:
        level, before = level + way, share(level)
        if share(level) > _RISE * before and (way > 0 or before <= _CHANCE):
            return


class StepJudge:
    """Keeps what was found out about the steps of one run, and says when to find out again."""

    def __init__(self) -> None:
        self.level = 0
        """Power of two by which steps are larger than ``NATS`` asks for."""
        self._error: float | None = None
        self._period: int | None = None

    def due(self, step: int) -> bool:
        """Return whether no step of this period was judged."""
        return step // PERIOD != self._period

    def keep(self, found: Judgement, step: int) -> None:
        """Go by a judgement until the next period."""
        self.level += found.level
        self._error, self._period = found.error, step // PERIOD

    def signal_to_error(self, utilities: Tensor, epsilon: float) -> float | None:
        """Spread of (N,) utilities measured at a step, over the error of each; None: not known, or no error seen."""
        finite = utilities[utilities.isfinite()]
        if not self._error or len(finite) < 2:
            return None
        return float(finite.std(correction=0)) * epsilon / self._error

    def state_dict(self) -> dict[str, Any]:
        """Plain values; empty before the first judgement."""
        if self._period is None:
            return {}
        return {"level": self.level, "error": self._error, "period": self._period}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; an empty one is judged anew."""
        self.level, self._error, self._period = state.get("level", 0), state.get("error"), state.get("period")
