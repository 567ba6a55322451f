"""Says what estimators by sketches share: what they keep of candidates, their place in the registry, their memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megaopus.selection.backend import Candidates, GhostConsumer, GhostLayer, ScoringBackend, UpdateOperator
from megaopus.selection.estimators.layers import ghost_layers
from megaopus.selection.estimators.registry import EVERY_LAYER, Request, Sizes, Taken

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


class _Sketching(Protocol):
    """``CountSketchEstimator`` or one like it."""

    def estimate(
        self,
        backend: ScoringBackend,
        candidates: Candidates,
        operator: UpdateOperator,
        proxy_gradient: Mapping[str, Tensor],
        *,
        length: int | None,
        micro_batch_size: int,
        keep_sketches: bool,
        extra_consumer: GhostConsumer | None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]: ...


class SketchEstimator:
    """Estimates by the inner products of sketches, and lends them to estimators that have none."""

    def __init__(self, config: SelectionConfig, sketch: _Sketching):
        self._layers = config.ghost_layers()
        self._sketch = sketch

    def uses(self, backend: ScoringBackend, gradient: Mapping[str, Tensor]) -> list[GhostLayer]:
        return ghost_layers(backend, self._layers)

    def estimate(self, request: Request) -> tuple[Tensor, dict[str, Tensor] | None]:
        return self._estimate(request, request.keep_updates, None)

    def sketches(self, request: Request, extra_consumer: GhostConsumer | None = None) -> dict[str, Tensor]:
        kept = self._estimate(request, True, extra_consumer)[1]
        assert kept is not None
        return kept

    def _estimate(
        self, request: Request, keep: bool, extra_consumer: GhostConsumer | None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return self._sketch.estimate(
            request.backend,
            request.candidates,
            request.operator,
            request.proxy_gradient,
            length=request.length,
            micro_batch_size=request.micro_batch_size,
            keep_sketches=keep,
            extra_consumer=extra_consumer,
        )


def kept_sketches(
    proxy: Mapping[str, Tensor], count: int, dim: int, summed: bool, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(layer -> zeros (count, dim) to add its sketches to, the rows that come of it): one sum for all if ``summed``.

    The sum of a vector's CountSketches over layers, each with hashes of its own, is a CountSketch of the whole vector:
    its inner products are unbiased too, with the variance of ``CountSketch`` for whole vectors. That of a sketch for
    each layer is the sum over layers of theirs: where all weigh the same it is smaller by their number, as it would be
    with a sum of as many times the length. ``proxy``: a sketch of each layer.
    """
    if not summed:
        rows = {name: psi.new_zeros(count, dim) for name, psi in proxy.items()}
        return rows, rows
    # a pipeline stage without such a layer has its part in the sum over stages
    dtype = functools.reduce(torch.promote_types, (psi.dtype for psi in proxy.values()), torch.float32)
    total = torch.zeros(count, dim, dtype=dtype, device=device)
    return dict.fromkeys(proxy, total), {EVERY_LAYER: total}


def sketch_memory(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    """Count the sketches of candidates that are kept at once.

    The alignment needs one micro-batch of one layer at a time, the Gram matrix all of this rank's candidates.
    """
    kept = sizes.candidates if config.redundancy else min(sizes.candidates, sizes.micro_batch_size)
    layers = len(sizes.matrices) if config.redundancy and config.gram_sketch == "per_layer" else 1
    size = 4 * kept * layers * config.sketch_dim
    each = "sums over matrices" if config.redundancy and config.gram_sketch == "summed" else f"{layers} matrices"
    return {"sketches": Taken(size, f"fp32, {kept} candidates x {each} x {config.sketch_dim}", whole=size)}
