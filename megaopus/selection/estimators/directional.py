"""Directional scoring: by how much would a candidate's loss fall if the optimizer took its step on the proxy?

With d = -P_t^T g_proxy (P_t is self-adjoint for most optimizers), that fall is <g_z, P_t^T g_proxy> to first order, the
utility <P_t g_z, g_proxy>. Two forward passes measure it: no hooks, no per-sample gradients, every parameter counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from megaopus.selection.backend import Candidates, Gradient, ScoringBackend, UpdateOperator
from megaopus.selection.estimators.layers import parameter_names
from megaopus.selection.estimators.registry import ESTIMATORS, Request, Sizes, Sketch, register_estimator

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


def directional_utilities(
    backend: ScoringBackend,
    candidates: Candidates,
    operator: UpdateOperator,
    proxy_gradient: Gradient,
    *,
    epsilon: float | None = None,
    sides: str = "central",
    layers: str = "all",
    length: int | None = None,
    micro_batch_size: int = 16,
) -> Tensor:
    """(n,) float64: this rank's part; positive where the optimizer's step on the proxy lowers the candidate's loss.

    central: (L(theta - e d) - L(theta + e d)) / 2e, error O(e^2); one: (L(theta) - L(theta + e d)) / e, error O(e).
    ``epsilon`` is in units of one optimizer step; None: 0.25, or 1 where weights are rounded to 16 bits, in which a
    smaller step would drown (docs/decisions/005). ``layers``: the parameters that are moved
    (``layers.parameter_names``).
    """
    names = parameter_names(backend, proxy_gradient, layers)
    update = operator.transposed().apply({name: proxy_gradient[name] for name in names})  # P^T g = -d
    if epsilon is None:
        epsilon = 1.0 if backend.computes_in_16_bits else 0.25

    def losses() -> Tensor:
        return backend.losses(candidates, length=length, micro_batch_size=micro_batch_size)

    before = losses() if sides == "one" else None
    with backend.perturbed(update) as move:
        move(-epsilon)
        ahead = losses()
        if before is not None:
            return (before - ahead) / epsilon
        move(epsilon)
        return (losses() - ahead) / (2 * epsilon)


def _memory(config: Any, sizes: Sizes) -> Mapping[str, tuple[int, str]]:
    return {"direction": (8 * sizes.weights, "fp32 direction and a copy of the weights to restore")}


@register_estimator(
    "directional",
    flops=(2 / 3, "two forwards: 4 of the 6 FLOPs per parameter and token that training takes"),
    auto_layers="all",
    needs={"fine_steps": "directional scoring would measure the rounding"},
    memory=_memory,
    # a whole step: the difference of two fp32 losses is then well above their rounding
    example={"redundancy": 0.5, "epsilon": 1.0},
)
class Directional:
    """Estimates by ``directional_utilities``."""

    def __init__(self, config: SelectionConfig):
        self._config = config
        self._layers = config.derived_layers()
        self._gram = cast(Sketch, ESTIMATORS.find(config.gram).make(config)) if config.redundancy > 0 else None

    def uses(self, backend: ScoringBackend, gradient: Gradient) -> list[str]:
        return parameter_names(backend, gradient, self._layers)

    def estimate(self, request: Request) -> tuple[Tensor, dict[str, Tensor] | None]:
        parts = directional_utilities(
            request.backend,
            request.candidates,
            request.operator,
            request.proxy_gradient,
            layers=self._layers,
            epsilon=self._config.epsilon,
            sides=self._config.sides,
            length=request.length,
            micro_batch_size=request.micro_batch_size,
        )
        return parts, self._gram.sketches(request) if self._gram is not None and request.keep_updates else None
