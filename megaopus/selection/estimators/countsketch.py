"""CountSketch, and the paper's estimator: sketches of preconditioned ghost gradients, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaopus.selection import counter_rng
from megaopus.selection.backend import (
    Candidates,
    GhostConsumer,
    GhostLayer,
    Gradient,
    ScoringBackend,
    UpdateOperator,
)
from megaopus.selection.estimators.adjoint import adjoint_utilities
from megaopus.selection.estimators.ghost import held_at_once, per_sample_gradient, spans
from megaopus.selection.estimators.layers import ghost_layers
from megaopus.selection.estimators.registry import Sizes, Taken, register_estimator
from megaopus.selection.estimators.sketches import SketchEstimator, sketch_memory
from megaopus.selection.old_names import renamed_argument

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


class CountSketch:
    """Pi: R^d -> R^m, sketch[h(i)] += s(i) x_i with hash h and sign s (Charikar, Chen, Farach-Colton, 2002).

    <Pi x, Pi y> is unbiased for <x, y> over seeds, with variance (|x|^2 |y|^2 + <x,y>^2 - 2 sum_i x_i^2 y_i^2) / m.
    h and s are functions of (seed, name, index); ``indices`` (d,) are positions in the whole matrix, so sketches of its
    shards add up to the sketch of the whole.
    """

    def __init__(self, name: str, indices: Tensor, dim: int, seed: int):
        self._bucket, self._sign = hashes(name, indices, dim, seed)
        self.dim = dim

    def __call__(self, rows: Tensor, factor: Tensor | None = None) -> Tensor:
        """(n, d) -> (n, m): sketch of each row, multiplied elementwise by ``factor`` (d,) or scalar first if given."""
        weight = self._sign.to(rows.dtype)
        if factor is not None:
            weight = weight * factor.to(rows.dtype)
        return rows.new_zeros(len(rows), self.dim).scatter_add_(1, self._bucket.expand_as(rows), rows * weight)

    def transpose(self, sketch: Tensor) -> Tensor:
        """(m,) -> (d,): Pi^T, so that <Pi x, s> = <x, Pi^T s>."""
        return sketch[self._bucket] * self._sign.to(sketch.dtype)


def hashes(name: str, indices: Tensor, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """(bucket int64 in [0, dim), sign int8) of each index; a function of (seed, name, index) alone."""
    bits = counter_rng.bits(counter_rng.key(seed, "sketch", name), indices)
    bucket = ((bits >> 1) & ((1 << 63) - 1)) % dim  # int64: what scatter_add_ takes
    return bucket, ((bits & 1) * 2 - 1).to(torch.int8)


def whole_coordinates(backend: ScoringBackend, name: str, weight: Tensor, spread: int | None) -> tuple[Tensor, Tensor]:
    """(rows, columns) in the whole matrix of this rank's part; ``spread``: the dimension that is whole already."""
    shard = backend.shards().get(name)
    axes = []
    for dim in (0, 1):
        if shard is None or shard.dim != dim:
            axes.append(torch.arange(weight.shape[dim], device=weight.device))
        elif spread == dim:
            axes.append(torch.arange(shard.size, device=weight.device))
        else:
            axes.append(shard.index.to(weight.device))
    return axes[0], axes[1]


def spread_dim(sides: tuple[Tensor | None, Tensor | None] | None) -> int | None:
    """The dimension along which factors of an operator turn a rank's part into a contribution to the whole."""
    left, right = sides or (None, None)
    if left is not None and left.shape[0] != left.shape[1]:
        return 0
    if right is not None and right.shape[0] != right.shape[1]:
        return 1
    return None


class CountSketchEstimator:
    """Alignment sum_r <phi_r, psi_r>, phi_r = Pi_r(P_r sum_t b_t a_t^T), psi_r = Pi_r(proxy gradient of layer r).

    Keeps each layer's hashes (9 bytes per weight) between steps. ``layers``: see ``layers.ghost_layers``.
    """

    def __init__(self, dim: int, seed: int, layers: str = "linear"):
        self._dim = dim
        self._seed = seed
        self._which = layers
        self._sketches: dict[tuple[str, int | None], CountSketch] = {}

    def layers(self, backend: ScoringBackend) -> list[GhostLayer]:
        """The uses on this rank that are summed over."""
        return ghost_layers(backend, self._which)

    def estimate(
        self,
        backend: ScoringBackend,
        candidates: Candidates,
        operator: UpdateOperator,
        proxy_gradient: Gradient,
        *,
        length: int | None = None,
        micro_batch_size: int = 16,
        keep_sketches: bool = False,
        extra_consumer: GhostConsumer | None = None,
        also: GhostConsumer | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """((n,) float64 parts of the alignments, sketches (n, m) by layer or None); of this rank's candidates.

        The inner products of the sketches, once summed over parts, estimate the Gram matrix <P g_z, P g_s>. Where only
        alignments are asked for, no candidate is sketched: <Pi P g_z, psi> = <g_z, P^T Pi^T psi> is adjoint scoring of
        the proxy's sketch carried back, the same number without any per-sample gradient.
        ``extra_consumer`` (once ``also``) sees the same pass.
        Raises RuntimeError naming any layer whose activations could not be captured.
        """
        extra_consumer = renamed_argument("also", also, "extra_consumer", extra_consumer)
        assert extra_consumer is None or keep_sketches
        uses = self.layers(backend)
        proxy = self._proxy(backend, uses, proxy_gradient)
        if not keep_sketches:
            carried = {
                name: self._of(backend, name, proxy_gradient[name], None).transpose(psi).view_as(proxy_gradient[name])
                for name, psi in proxy.items()
            }
            parts = adjoint_utilities(
                backend,
                candidates,
                operator,
                carried,
                layers=self._which,
                length=length,
                micro_batch_size=micro_batch_size,
            )
            return parts, None
        parts = torch.zeros(len(candidates), dtype=torch.float64, device=backend.device)
        phi = {name: psi.new_zeros(len(candidates), self._dim) for name, psi in proxy.items()}

        def consume(layer: GhostLayer, rows: slice, act_a: Tensor, grad_b: Tensor) -> None:
            weight = proxy_gradient[layer.parameter]
            if extra_consumer is not None:
                extra_consumer(layer, rows, act_a, grad_b)
            grad_b = grad_b.to(weight.dtype)
            for span in spans(len(grad_b), weight.numel()):
                sketch = self._sketch(backend, layer, weight, operator, act_a[span], grad_b[span])
                where = slice(rows.start + span.start, rows.start + span.stop)
                # linear in the sketch: parts of it, by shard or by use, give parts of the alignment
                parts[where] += (sketch * proxy[layer.parameter]).sum(1, dtype=torch.float64)
                phi[layer.parameter][where] += sketch

        with torch.no_grad():
            backend.ghost_pass(candidates, uses, consume, length=length, micro_batch_size=micro_batch_size)
        return parts, phi

    def _proxy(self, backend: ScoringBackend, uses: list[GhostLayer], gradient: Gradient) -> dict[str, Tensor]:
        """psi (m,) by layer, of whole matrices: one message where ranks share them."""
        names = dict.fromkeys(layer.parameter for layer in uses)
        counted = {layer.parameter for layer in uses if layer.counted}
        psi = {}
        for name in names:
            flat = gradient[name].reshape(1, -1)
            sketch = self._of(backend, name, gradient[name], None)(flat)[0]
            psi[name] = sketch if name in counted else torch.zeros_like(sketch)
        return sum_proxies(backend, psi)

    def _sketch(
        self,
        backend: ScoringBackend,
        layer: GhostLayer,
        weight: Tensor,
        operator: UpdateOperator,
        act_a: Tensor,
        grad_b: Tensor,
    ) -> Tensor:
        """(n, m): sketch of P g of each sequence, as far as this rank's part of the matrix goes."""
        name = layer.parameter
        factor = operator.diagonal(name)
        sides = None if factor is not None else operator.sides(name)
        left, right = sides or (None, None)
        through_factors = sides is not None and (layer.kind == "linear" or left is None)
        if through_factors:
            if left is not None:
                grad_b = grad_b @ left.t().to(grad_b.dtype)
            if right is not None and layer.kind == "linear":
                act_a = act_a.to(grad_b.dtype) @ right.to(grad_b.dtype)
            elif right is not None:
                grad_b = grad_b @ right.to(grad_b.dtype)
        gradient = per_sample_gradient(layer, weight.shape, act_a, grad_b)
        if factor is None and not through_factors:
            gradient = operator.apply({name: gradient})[name]
        spread = spread_dim(sides) if through_factors else None
        flat = None if factor is None else factor.flatten() if factor.ndim else factor
        return self._of(backend, name, weight, spread)(gradient.flatten(1), flat)

    def _of(self, backend: ScoringBackend, name: str, weight: Tensor, spread: int | None) -> CountSketch:
        if (name, spread) not in self._sketches:
            rows, columns = whole_coordinates(backend, name, weight, spread)
            shard = backend.shards().get(name)
            width = shard.size if shard is not None and shard.dim == 1 else weight.shape[1]
            indices = (rows.unsqueeze(1) * width + columns).flatten()
            self._sketches[name, spread] = CountSketch(name, indices, self._dim, self._seed)
        return self._sketches[name, spread]


def sum_proxies(backend: ScoringBackend, psi: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sketches of the proxy gradient's shards -> of the whole matrices; one message."""
    return backend.sum_over_model(psi, "matrix") if psi else psi


def _memory(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    weights, largest = sum(sizes.matrices), max(sizes.matrices, default=0)
    rows = {"hashes": Taken(9 * weights, "bucket and sign of each sketched weight", kept=True)}
    done, making = 0, 0  # five of 8 bytes: index, random bits, bucket, and the sign twice before it is one byte
    for matrix in sizes.matrices:
        done, making = done + 9 * matrix, max(making, done + 40 * matrix)
    later = ("hashes", "update on the proxy's sketch", "gradients of candidates", "sketches")
    rows["hashes in the making"] = Taken(making, "int64, of one matrix at a time", whole=making, before=later)
    if not config.redundancy:
        how = "fp32, the proxy's sketches carried back, and the update on them"
        return {**rows, "update on the proxy's sketch": Taken(8 * weights, how), **sketch_memory(config, sizes)}
    at_once = min(sizes.micro_batch_size, held_at_once(max(1, largest)))
    how = f"fp32, of {at_once} candidate(s) in the largest matrix, twice, and its signs"
    return {**rows, "gradients of candidates": Taken((8 * at_once + 4) * largest, how), **sketch_memory(config, sizes)}


@register_estimator(
    "countsketch",
    flops=(1.0, "forward, input gradients, and a product of each layer's with the carried-back proxy sketch"),
    gram=(1.0, "forward, input gradients and each layer's gradient per sequence; sketching not counted"),
    sketches=True,
    needs={"hooks": "captures the activations of layers"},
    memory=_memory,
    example={"sampler": "boltzmann"},
)
def _countsketch(config: SelectionConfig) -> SketchEstimator:
    which = config.ghost_layers()
    return SketchEstimator(config, CountSketchEstimator(config.sketch_dim, config.sketch_seed, which))
