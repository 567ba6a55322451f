"""CountSketch, and the paper's estimator: sketches of preconditioned ghost gradients, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaopus.selection import counter_rng
from megaopus.selection.backend import (
    Candidates,
    GhostConsumer,
    GhostLayer,
    Piece,
    ScoringBackend,
    UpdateOperator,
)
from megaopus.selection.estimators.adjoint import adjoint_utilities
from megaopus.selection.estimators.ghost import held_at_once, per_sample_gradient, spans
from megaopus.selection.estimators.layers import ghost_layers
from megaopus.selection.estimators.registry import Sizes, Taken, put_together, register_estimator
from megaopus.selection.estimators.sketches import SketchEstimator, kept_sketches, sketch_memory
from megaopus.selection.old_names import renamed_argument
from megaopus.selection.pieces import OnDemand, pieces_of, shapes_of, whole_operator

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


class CountSketch:
    """Pi: R^d -> R^m, sketch[h(i)] += s(i) x_i with hash h and sign s (Charikar, Chen, Farach-Colton, 2002).

    <Pi x, Pi y> is unbiased for <x, y> over seeds, with variance (|x|^2 |y|^2 + <x,y>^2 - 2 sum_i x_i^2 y_i^2) / m.
    h and s are functions of (seed, name, index); ``indices`` (d,) are positions in the whole matrix, so sketches of its
    shards add up to the sketch of the whole. Hashes are worked out anew at each use, ``AT_ONCE`` at a time; ``kept``:
    at the first, 9 bytes for each of d.
    """

    def __init__(self, name: str, indices: Indices, dim: int, seed: int, kept: bool = False):
        self._name, self._indices, self._seed, self.dim = name, indices, seed, dim
        self._kept = [*self._hashed()] if kept else None

    def _hashed(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which of d, their buckets, their signs), a part at a time."""
        for start in range(0, len(self._indices), AT_ONCE):
            part = slice(start, min(start + AT_ONCE, len(self._indices)))
            yield part, *hashes(self._name, self._indices[part], self.dim, self._seed)

    def __call__(self, rows: Tensor, factor: Tensor | None = None) -> Tensor:
        """(n, d) -> (n, m): sketch of each row, multiplied elementwise by ``factor`` (d,) or scalar first if given."""
        sketch = rows.new_zeros(len(rows), self.dim)
        for part, bucket, sign in self._kept or self._hashed():
            weight, values = sign.to(rows.dtype), rows[:, part]
            if factor is not None:
                weight = weight * (factor[part] if factor.ndim else factor).to(rows.dtype)
            sketch.scatter_add_(1, bucket.expand_as(values), values * weight)
        return sketch

    def transpose(self, sketch: Tensor) -> Tensor:
        """(m,) -> (d,): Pi^T, so that <Pi x, s> = <x, Pi^T s>."""
        found = sketch.new_empty(len(self._indices))
        for part, bucket, sign in self._kept or self._hashed():
            found[part] = sketch[bucket] * sign.to(sketch.dtype)
        return found


class Places:
    """Says where in the whole matrix a run of this rank's flattened part of it lies; worked out when it is sliced."""

    def __init__(self, rows: Tensor, columns: Tensor, width: int, start: int, count: int):
        """``rows``, ``columns``: of the part, in the whole, which is ``width`` wide."""
        self._rows, self._columns, self._width = rows, columns, width
        self._start, self._count = start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> Tensor:
        """(n,) int64 positions in the flattened whole matrix."""
        first, end, _ = part.indices(self._count)
        flat = torch.arange(self._start + first, self._start + end, device=self._rows.device)
        own = len(self._columns)
        return self._rows[flat // own] * self._width + self._columns[flat % own]


Indices = Tensor | Places
AT_ONCE = 1 << 22
"""Hashes that are worked out at a time."""
_KEPT_ON_CPU = 256 << 20
"""Bytes of hashes that are kept on a CPU, which takes as long to work them out as to sketch by them."""


def hashes(name: str, indices: Tensor, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """(bucket int64 in [0, dim), sign int8) of each index; a function of (seed, name, index) alone."""
    bits = counter_rng.bits(counter_rng.key(seed, "sketch", name), indices)
    bucket = ((bits >> 1) & ((1 << 63) - 1)) % dim  # int64: what scatter_add_ takes
    return bucket, ((bits & 1) * 2 - 1).to(torch.int8)


def whole_coordinates(
    backend: ScoringBackend, name: str, shape: torch.Size, spread: int | None
) -> tuple[Tensor, Tensor]:
    """(rows, columns) in the whole matrix of this rank's part; ``spread``: the dimension that is whole already."""
    shard = backend.shards().get(name)
    axes = []
    for dim in (0, 1):
        if shard is None or shard.dim != dim:
            axes.append(torch.arange(shape[dim], device=backend.device))
        elif spread == dim:
            axes.append(torch.arange(shard.size, device=backend.device))
        else:
            axes.append(shard.index.to(backend.device))
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

    ``layers``: see ``layers.ghost_layers``; ``summed``: what is kept of a candidate is the sum of its layers' sketches.
    """

    def __init__(self, dim: int, seed: int, layers: str = "linear", summed: bool = False):
        self._dim = dim
        self._seed = seed
        self._which = layers
        self._summed = summed
        self._kept: dict[tuple[str, int | None], CountSketch] = {}
        self._room = _KEPT_ON_CPU

    def layers(self, backend: ScoringBackend) -> list[GhostLayer]:
        """The uses on this rank that are summed over."""
        return ghost_layers(backend, self._which)

    def estimate(
        self,
        backend: ScoringBackend,
        candidates: Candidates,
        operator: UpdateOperator,
        proxy_gradient: Mapping[str, Tensor],
        *,
        length: int | None = None,
        micro_batch_size: int = 16,
        keep_sketches: bool = False,
        extra_consumer: GhostConsumer | None = None,
        also: GhostConsumer | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """((n,) float64 parts of the alignments, sketches (n, m) by layer, or of all, or None); this rank's candidates.

        The inner products of the sketches, once summed over parts, estimate the Gram matrix <P g_z, P g_s>. Where only
        alignments are asked for, no candidate is sketched: <Pi P g_z, psi> = <g_z, P^T Pi^T psi> is adjoint scoring of
        the proxy's sketch carried back, the same number without any per-sample gradient.
        ``extra_consumer`` (once ``also``) sees the same pass.
        Raises RuntimeError naming any layer whose activations could not be captured.
        """
        extra_consumer = renamed_argument("also", also, "extra_consumer", extra_consumer)
        assert extra_consumer is None or keep_sketches
        uses = self.layers(backend)
        shapes = shapes_of(backend, proxy_gradient)
        proxy = self._proxy(backend, uses, proxy_gradient, shapes)
        if not keep_sketches:
            parts = adjoint_utilities(
                backend,
                candidates,
                operator,
                self._carried(backend, proxy, shapes),
                layers=self._which,
                length=length,
                micro_batch_size=micro_batch_size,
            )
            return parts, None
        parts = torch.zeros(len(candidates), dtype=torch.float64, device=backend.device)
        phi, kept = kept_sketches(proxy, len(candidates), self._dim, self._summed, backend.device)

        with torch.no_grad(), whole_operator(operator) as of_whole:

            def consume(layer: GhostLayer, rows: slice, act_a: Tensor, grad_b: Tensor) -> None:
                name = layer.parameter
                if extra_consumer is not None:
                    extra_consumer(layer, rows, act_a, grad_b)
                grad_b = grad_b.to(proxy[name].dtype)
                for span in spans(len(grad_b), shapes[name].numel()):
                    sketch = self._sketch(backend, layer, shapes[name], of_whole, act_a[span], grad_b[span])
                    where = slice(rows.start + span.start, rows.start + span.stop)
                    # linear in the sketch: parts of it, by shard or by use, give parts of the alignment
                    parts[where] += (sketch * proxy[name]).sum(1, dtype=torch.float64)
                    phi[name][where] += sketch

            backend.ghost_pass(candidates, uses, consume, length=length, micro_batch_size=micro_batch_size)
        return parts, kept

    def _proxy(
        self,
        backend: ScoringBackend,
        uses: list[GhostLayer],
        gradient: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
    ) -> dict[str, Tensor]:
        """psi (m,) by layer, of whole matrices: one message where ranks share them."""
        names = dict.fromkeys(layer.parameter for layer in uses)
        counted = {layer.parameter for layer in uses if layer.counted}
        psi = {}
        for name in names:
            sketch = self._of_piece(backend, name, shapes[name])(gradient[name].reshape(1, -1))[0]
            psi[name] = sketch if name in counted else torch.zeros_like(sketch)
        return sum_proxies(backend, psi)

    def _carried(
        self, backend: ScoringBackend, proxy: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> Mapping[str, Tensor]:
        """Pi^T psi of each layer, as gradients are."""

        def carry(name: str) -> Tensor:
            found = self._of_piece(backend, name, shapes[name]).transpose(proxy[name])
            return found if pieces_of(backend) else found.view(shapes[name])

        return OnDemand(proxy, carry)

    def _sketch(
        self,
        backend: ScoringBackend,
        layer: GhostLayer,
        shape: torch.Size,
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
        gradient = per_sample_gradient(layer, shape, act_a, grad_b)
        if factor is None and not through_factors:
            gradient = operator.apply({name: gradient})[name]
        spread = spread_dim(sides) if through_factors else None
        flat = None if factor is None else factor.flatten() if factor.ndim else factor
        return self._of(backend, name, shape, spread)(gradient.flatten(1), flat)

    def _of(self, backend: ScoringBackend, name: str, shape: torch.Size, spread: int | None) -> CountSketch:
        """Of this rank's part of the whole matrix ``name``; ``spread`` as in ``whole_coordinates``."""
        if (name, spread) in self._kept:
            return self._kept[name, spread]
        places = _places(backend, name, shape, spread, None)
        kept = backend.device.type == "cpu" and 9 * len(places) <= self._room
        made = CountSketch(name, places, self._dim, self._seed, kept)
        if kept:
            self._room -= 9 * len(places)
            self._kept[name, spread] = made
        return made

    def _of_piece(self, backend: ScoringBackend, name: str, shape: torch.Size) -> CountSketch:
        """Of the run of it that gradients have."""
        if (piece := pieces_of(backend).get(name)) is None:
            return self._of(backend, name, shape, None)
        return CountSketch(name, _places(backend, name, shape, None, piece), self._dim, self._seed)


def _places(backend: ScoringBackend, name: str, shape: torch.Size, spread: int | None, piece: Piece | None) -> Places:
    rows, columns = whole_coordinates(backend, name, shape, spread)
    shard = backend.shards().get(name)
    width = shard.size if shard is not None and shard.dim == 1 else shape[1]
    start, count = (0, len(rows) * len(columns)) if piece is None else (piece.start, piece.numel)
    return Places(rows, columns, width, start, count)


def sum_proxies(backend: ScoringBackend, psi: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sketches of the proxy gradient's shards and pieces -> of the whole matrices; one message each."""
    if psi and pieces_of(backend):
        psi = backend.sum_pieces(psi)
    return backend.sum_over_model(psi, "matrix") if psi else psi


def _update_in_the_making(sizes: Sizes) -> int:
    """Find the bytes that are there while the proxy's sketch of some matrix is carried back, those before it too.

    Six times 8 bytes for each hash and the gradient; or the sketch carried back, what bounds the map, and its factor.
    """
    done = most = 0
    for size in sizes.matrices:
        own = size // sizes.shards
        most = max(most, 4 * done + max(48 * min(AT_ONCE, own) + 4 * own, 12 * own))
        done += own
    return most


def _memory(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    largest = max(sizes.matrices, default=0)
    if not config.redundancy:
        how = "fp32, the update on the proxy's sketches carried back"
        update = "update on the proxy's sketch"
        making = _update_in_the_making(sizes)
        rows = {
            "update in the making": Taken(making, "matrix by matrix", whole=making, before=("sketches", update)),
            update: Taken(4 * sum(sizes.matrices) // sizes.shards, how),
        }
        return {**rows, **put_together(sizes), **sketch_memory(config, sizes)}
    at_once, part = min(sizes.micro_batch_size, held_at_once(max(1, largest))), min(AT_ONCE, largest)
    how = f"fp32, of {at_once} candidate(s) in the largest matrix, and hashes or products of a part"
    size = 4 * at_once * largest + max(40, 4 * at_once + 12) * part
    return {
        **put_together(sizes),
        "gradients of candidates": Taken(size, how),
        **sketch_memory(config, sizes),
    }


@register_estimator(
    "countsketch",
    flops=(1.0, "forward, input gradients, and a product of each layer's with the carried-back proxy sketch"),
    gram=(1.0, "forward, input gradients and each layer's gradient per sequence; sketching not counted"),
    sketches=True,
    needs={"hooks": "captures the activations of layers"},
    memory=_memory,
    pieces=True,
    example={"sampler": "boltzmann"},
)
def _countsketch(config: SelectionConfig) -> SketchEstimator:
    which = config.ghost_layers()
    summed = config.gram_sketch == "summed"
    return SketchEstimator(config, CountSketchEstimator(config.sketch_dim, config.sketch_seed, which, summed))
