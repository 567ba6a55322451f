"""Directional scoring: by how much would a candidate's loss fall if the optimizer took its step on the proxy?

With d = -P_t^T g_proxy (P_t is self-adjoint for most optimizers), that fall is <g_z, P_t^T g_proxy> to first order, the
utility <P_t g_z, g_proxy>. Two forward passes measure it: no hooks, no per-sample gradients, every parameter counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from megaopus.selection.backend import Candidates, Gradient, ScoringBackend, UpdateOperator
from megaopus.selection.config import CHUNK
from megaopus.selection.estimators.layers import parameter_names
from megaopus.selection.estimators.registry import ESTIMATORS, Request, Sizes, Sketch, Taken, register_estimator
from megaopus.selection.estimators.step_size import StepJudge, judge, step_size
from megaopus.selection.pieces import direction

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


def directional_utilities(
    backend: ScoringBackend,
    candidates: Candidates,
    operator: UpdateOperator,
    proxy_gradient: Mapping[str, Tensor],
    *,
    epsilon: float | Tensor | None = None,
    sides: str = "central",
    layers: str = "all",
    length: int | None = None,
    micro_batch_size: int = 16,
) -> Tensor:
    """(n,) float64: this rank's part; positive where the optimizer's step on the proxy lowers the candidate's loss.

    central: (L(theta - e d) - L(theta + e d)) / 2e, error O(e^2); one: (L(theta) - L(theta + e d)) / e, error O(e).
    ``epsilon`` is in units of one optimizer step; None: such that the proxy's loss changes by about
    ``step_size.NATS``, however small the learning rate. ``layers``: the parameters that are moved
    (``layers.parameter_names``).
    """
    update = _update(backend, operator, proxy_gradient, layers)
    if epsilon is None:
        _observe(backend, candidates, length)
        epsilon = step_size(backend, update, proxy_gradient)
    passes = {"length": length, "micro_batch_size": micro_batch_size}
    return _differences(backend, candidates, update, epsilon, sides, passes)[0] / epsilon


def _update(backend: ScoringBackend, operator: UpdateOperator, gradient: Mapping[str, Tensor], layers: str) -> Gradient:
    """P^T g of the parameters that are moved: the direction is -d."""
    return direction(operator, gradient, parameter_names(backend, gradient, layers))


def _observe(backend: ScoringBackend, candidates: Candidates, length: int | None) -> None:
    """Have a backend that must see a pass to know what it computes in see one, of one candidate."""
    if getattr(backend, "unobserved", False):
        backend.losses(candidates.take(torch.arange(1)), length=length, micro_batch_size=1)


def _differences(
    backend: ScoringBackend,
    candidates: Candidates,
    update: Gradient,
    epsilon: float | Tensor,
    sides: str,
    passes: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """(this rank's part of the fall of each loss over ``epsilon`` steps along ``update``, two losses around it), (n,).

    The mean of the two losses is that at the weights as they are, or next to it.
    """
    before = backend.losses(candidates, **passes) if sides == "one" else None
    with backend.perturbed(update) as move:
        move(-epsilon)
        ahead = backend.losses(candidates, **passes)
        if before is not None:
            return before - ahead, before, before
        move(epsilon)
        behind = backend.losses(candidates, **passes)
        return (behind - ahead) / 2, behind, ahead


def _memory(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    everything = config.derived_layers() == "all"
    moved, whole = (sizes.weights, sizes.replicated) if everything else (sum(sizes.matrices), 0)
    moved, whole = moved // sizes.shards, whole // sizes.shards
    moving = 4 * min(CHUNK, moved)
    rows = {
        "weights moved": Taken(moving, "fp32, a chunk at a time", whole=moving, before=()),
        "direction": Taken(4 * moved, "fp32, the optimizer's step on the proxy", whole=4 * whole),
    }
    if sizes.model_width == 4:  # 16-bit weights are those of the optimizer, rounded
        rows["weights to restore"] = Taken(4 * moved, "a copy of what is moved", whole=4 * whole)
    return rows


@register_estimator(
    "directional",
    flops=(2 / 3, "two forwards: 4 of the 6 FLOPs per parameter and token that training takes"),
    auto_layers="all",
    memory=_memory,
    pieces=True,
    # a whole step: the difference of two fp32 losses is then well above their rounding
    example={"redundancy": 0.5, "epsilon": 1.0},
)
class Directional:
    """Estimates by differences of losses along the optimizer's step; judges now and then how far along it to go."""

    def __init__(self, config: SelectionConfig):
        self._config = config
        self._layers = config.derived_layers()
        self._gram = cast(Sketch, ESTIMATORS.find(config.gram).make(config)) if config.redundancy > 0 else None
        self._judge = StepJudge()
        self._epsilon: float | Tensor = 1.0
        self._around = (torch.empty(0, dtype=torch.float64),) * 2

    def uses(self, backend: ScoringBackend, gradient: Mapping[str, Tensor]) -> list[str]:
        return parameter_names(backend, gradient, self._layers)

    def estimate(self, request: Request) -> tuple[Tensor, dict[str, Tensor] | None]:
        update = _update(request.backend, request.operator, request.proxy_gradient, self._layers)
        self._epsilon = self._config.epsilon or self._step_size(request, update)
        differences, behind, ahead = self._differences(request, update, self._epsilon)
        if self._config.utilities == "odds":
            self._around = behind, ahead
        del behind, ahead
        parts = differences / self._epsilon
        del update  # before sketches are made
        return parts, self._gram.sketches(request) if self._gram is not None and request.keep_updates else None

    def _step_size(self, request: Request, update: Gradient) -> float | Tensor:
        _observe(request.backend, request.candidates, request.length)
        return step_size(request.backend, update, request.proxy_gradient, level=self._judge.level)

    def losses(self) -> Tensor:
        """Give this rank's part of the losses that ``estimate`` saw, (n,) float64."""
        return (self._around[0] + self._around[1]) / 2

    def _differences(
        self, request: Request, update: Gradient, epsilon: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        passes = {"length": request.length, "micro_batch_size": request.micro_batch_size}
        return _differences(request.backend, request.candidates, update, epsilon, self._config.sides, passes)

    # -- how far to go ------------------------------------------------------------------------------------------------

    def refine(self, request: Request, parts: Tensor, step: int) -> Tensor:
        """Judge the step that gave ``parts``, if that is due; gives them, or those of a better step. Collective.

        A step that the settings name is judged and stays.
        """
        if not self._judge.due(step):
            return parts
        backend, first = request.backend, self._epsilon
        update = _update(backend, request.operator, request.proxy_gradient, self._layers)
        own = {0: parts * first}

        @functools.cache
        def differences(level: int) -> Tensor:
            if level not in own:
                own[level], *_ = self._differences(request, update, first * 2.0**level)
            whole = backend.sum_over_ranks(own[level], own[level].new_zeros(1))[0][: request.total]
            return backend.from_rank_0(whole.cpu())

        found = judge(differences, self._config.sides, search=self._config.epsilon is None)
        if found is None:
            return parts
        self._judge.keep(found, step)
        self._epsilon = first * 2.0**found.level
        return own[found.level] / self._epsilon

    def unread(self) -> Tensor:
        """Give how far along the step it went, (1,) float64; (0,) where the host knows it."""
        return self._epsilon.view(1) if isinstance(self._epsilon, Tensor) else torch.empty(0, dtype=torch.float64)

    def read(self, numbers: Tensor) -> None:
        """Take what was ``unread``."""
        if len(numbers):
            self._epsilon = float(numbers)

    def signal_to_error(self, utilities: Tensor) -> float | None:
        """Spread of the latest utilities (N,) over the error of each, as judged last; None: not known."""
        return self._judge.signal_to_error(utilities, float(self._epsilon))

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what was found out about steps."""
        return self._judge.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self._judge.load_state_dict(state)
