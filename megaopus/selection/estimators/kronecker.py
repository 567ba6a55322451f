"""Two-sided sketches: phi = C1 (P g) C2^T from the factors of g alone, C1 and C2 CountSketches of rows and of columns.

C1 (sum_t b_t a_t^T) C2^T = sum_t (C1 b_t)(C2 a_t)^T: neither a per-sample gradient nor a scatter of its size. P is
folded into C1 and C2 once per step: Muon's S as it is; AdamW's diagonal as the outer product of its row and column
factors, in the manner of Adafactor (Shazeer and Stern, 2018), which is not exact. Where P is neither, candidates'
gradients are made, mapped by P, and sketched.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megaopus.selection.backend import (
    Candidates,
    GhostConsumer,
    GhostLayer,
    Piece,
    ScoringBackend,
    UpdateOperator,
)
from megaopus.selection.estimators.countsketch import hashes, spread_dim, sum_proxies, whole_coordinates
from megaopus.selection.estimators.ghost import local_rows, per_sample_gradient, spans
from megaopus.selection.estimators.layers import ghost_layers
from megaopus.selection.estimators.registry import Sizes, Taken, register_estimator
from megaopus.selection.estimators.sketches import SketchEstimator, kept_sketches, sketch_memory
from megaopus.selection.old_names import renamed_argument
from megaopus.selection.pieces import pieces_of, shapes_of, unscaled, whole_operator

if TYPE_CHECKING:
    from megaopus.selection.config import SelectionConfig


def sketch_shape(dim: int) -> tuple[int, int]:
    """(rows, columns) of a two-sided sketch of ``dim`` numbers: the divisor of ``dim`` nearest below its root first."""
    rows = next(rows for rows in range(int(dim**0.5), 0, -1) if dim % rows == 0)
    return rows, dim // rows


class KroneckerEstimator:
    """Alignment sum_r <phi_r, psi_r> with two-sided sketches; ``layers``: see ``layers.ghost_layers``.

    ``summed``: what is kept of a candidate is the sum of its layers' sketches, which have one shape. Keeps each layer's
    C1 and C2 between steps.
    """

    def __init__(self, dim: int, seed: int, layers: str = "linear", summed: bool = False):
        self._shape = sketch_shape(dim)
        self._seed = seed
        self._which = layers
        self._summed = summed
        self._kept: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

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

        ``extra_consumer`` (once ``also``) sees the same pass.
        Raises RuntimeError naming any layer whose activations could not be captured.
        """
        extra_consumer = renamed_argument("also", also, "extra_consumer", extra_consumer)
        uses = ghost_layers(backend, self._which)
        shapes = shapes_of(backend, proxy_gradient)
        self._dtypes = {name: value.dtype for name, value in unscaled(proxy_gradient).items()}
        names = dict.fromkeys(layer.parameter for layer in uses)
        with torch.no_grad(), whole_operator(operator, keeps=False) as each:
            folded = {name: self._fold(backend, name, shapes[name], each) for name in names}
        psi = self._proxy(backend, uses, proxy_gradient, shapes)
        unfolded = None in folded.values()
        with torch.no_grad(), whole_operator(operator) if unfolded else nullcontext(operator) as of_whole:
            parts = torch.zeros(len(candidates), dtype=torch.float64, device=backend.device)
            given = (psi, len(candidates), self._shape[0] * self._shape[1], self._summed, backend.device)
            phi, kept = kept_sketches(*given) if keep_sketches else ({}, None)

            def consume(layer: GhostLayer, rows: slice, act_a: Tensor, grad_b: Tensor) -> None:
                if extra_consumer is not None:
                    extra_consumer(layer, rows, act_a, grad_b)
                name, shape = layer.parameter, shapes[layer.parameter]
                grad_b = grad_b.to(psi[name].dtype)
                if (fold := folded[name]) is None:
                    left, right = self._sketches(backend, name, shape, None)
                    for span in spans(len(grad_b), shape.numel()):
                        gradient = per_sample_gradient(layer, shape, act_a[span], grad_b[span])
                        update = of_whole.apply({name: gradient})[name]
                        add(name, slice(rows.start + span.start, rows.start + span.stop), left @ update @ right.t())
                    return
                left, right = fold
                if layer.kind == "linear":
                    of_rows, of_columns = grad_b @ left.t(), act_a.to(left.dtype) @ right.t()
                else:
                    index, mine = local_rows(layer, left.shape[1], act_a)
                    of_rows, of_columns = left.t()[index] * mine.unsqueeze(-1), grad_b @ right.t()
                add(name, rows, torch.bmm(of_rows.transpose(1, 2), of_columns))

            def add(name: str, rows: slice, sketch: Tensor) -> None:
                parts[rows] += (sketch * psi[name]).flatten(1).sum(1, dtype=torch.float64)
                if name in phi:
                    phi[name][rows] += sketch.flatten(1)

            backend.ghost_pass(candidates, uses, consume, length=length, micro_batch_size=micro_batch_size)
        return parts, kept

    def _proxy(
        self,
        backend: ScoringBackend,
        uses: list[GhostLayer],
        gradient: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
    ) -> dict[str, Tensor]:
        """C1 G C2^T of the proxy gradient by layer, of whole matrices."""
        counted, psi = {layer.parameter for layer in uses if layer.counted}, {}
        for name in dict.fromkeys(layer.parameter for layer in uses):
            left, right = self._sketches(backend, name, shapes[name], None)
            first, matrix = _rows_of(pieces_of(backend).get(name), gradient[name])
            psi[name] = left[:, first : first + len(matrix)] @ matrix @ right.t() * (name in counted)
        return sum_proxies(backend, psi)

    def _sketches(
        self, backend: ScoringBackend, name: str, shape: torch.Size, spread: int | None
    ) -> tuple[Tensor, Tensor]:
        """C1 (rows, O) and C2 (columns, I) as dense matrices."""
        if (name, spread) in self._kept:
            return self._kept[name, spread]
        made = []
        coordinates = whole_coordinates(backend, name, shape, spread)
        for side, indices, dim in zip(("rows", "columns"), coordinates, self._shape, strict=True):
            bucket, sign = hashes(f"{name} {side}", indices, dim, self._seed)
            matrix = torch.zeros(dim, len(indices), dtype=self._dtypes[name], device=indices.device)
            matrix[bucket, torch.arange(len(indices), device=indices.device)] = sign.to(matrix.dtype)
            made.append(matrix)
        self._kept[name, spread] = made[0], made[1]
        return made[0], made[1]

    def _fold(
        self, backend: ScoringBackend, name: str, shape: torch.Size, operator: UpdateOperator
    ) -> tuple[Tensor, Tensor] | None:
        """(C1 L, C2 R^T): sketches of the rows and columns of P g = L g R from those of g; None for another P."""
        factor = operator.diagonal(name)
        if factor is not None:
            left, right = self._sketches(backend, name, shape, None)
            if factor.ndim == 0:
                return left * factor, right
            of_rows, of_columns = rank_one(backend, name, factor)
            return left * of_rows, right * of_columns
        sides = operator.sides(name)
        if sides is None:
            return None
        left, right = self._sketches(backend, name, shape, spread_dim(sides))
        of_left, of_right = sides
        if of_left is not None:
            left = left @ of_left.to(left.dtype)
        if of_right is not None:
            right = right @ of_right.t().to(right.dtype)
        return left, right


def _rows_of(piece: Piece | None, values: Tensor) -> tuple[int, Tensor]:
    """(number of the first row, rows of a matrix filled up with zeros) that hold a run of it; all rows of a whole."""
    if piece is None:
        return 0, values
    width = piece.shape[1]
    first, skipped = divmod(piece.start, width)
    rows = values.new_zeros(-(-(skipped + len(values)) // width), width)
    rows.view(-1)[skipped : skipped + len(values)] = values
    return first, rows


def rank_one(backend: ScoringBackend, name: str, factor: Tensor) -> tuple[Tensor, Tensor]:
    """r (O,), c (I,) with r_i c_j near ``factor`` (O, I): 1 / factor^2 has the row and column means of its rank-1 fit.

    Where an entry is 0 (a weight that does not move), the factor itself has those of its fit. Collective where ranks
    share the matrix.
    """
    some_zero = _means(backend, name, factor == 0)[2] > 0  # both are worked out: nobody waits to know which
    rows, columns, mean = _means(backend, name, factor)
    of_zeros = rows / mean.clamp(min=torch.finfo(mean.dtype).tiny), columns
    rows, columns, mean = _means(backend, name, factor.to(torch.float64, copy=True).square_().reciprocal_())
    others = (mean / rows).sqrt(), columns.rsqrt()
    found = [torch.where(some_zero, *pair).to(factor.dtype) for pair in zip(of_zeros, others, strict=True)]
    return found[0], found[1]


def _means(backend: ScoringBackend, name: str, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of this rank's rows (O,) and columns (I,) over the whole matrix, and of all of it; float64. Collective."""
    sums = [values.sum(1, dtype=torch.float64), values.sum(0, dtype=torch.float64)]
    counts = [values.shape[1], values.shape[0]]
    shard = backend.shards().get(name)
    if shard is not None:  # sums along the dimension that is split are parts
        sums[1 - shard.dim] = backend.sum_over_model({name: sums[1 - shard.dim]}, "matrix")[name]
        counts[1 - shard.dim] = shard.size
    rows, columns = sums[0] / counts[0], sums[1] / counts[1]
    return rows, columns, (columns if shard is not None and shard.dim == 0 else rows).mean()


def _memory(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    of_rows, of_columns = sketch_shape(config.sketch_dim)
    dense = 4 * sum(of_rows * rows + of_columns * columns for rows, columns in sizes.shapes)
    inverse = 12 * max(sizes.matrices, default=0) if sizes.scaled else 0
    return {
        "rank-one fit": Taken(
            inverse, "fp32 and float64, of one matrix at a time", whole=inverse, before=("sketches",)
        ),
        "dense sketches": Taken(dense, "fp32, of the rows and columns of each matrix", kept=True, whole=dense),
        "folded sketches": Taken(dense, "fp32, the same with the update in them", whole=dense),
        **sketch_memory(config, sizes),
    }


_COST = (2 / 3, "forward and input gradients; the sketches of activations not counted")


@register_estimator(
    "kronecker",
    flops=_COST,
    gram=_COST,
    sketches=True,
    needs={"hooks": "captures the activations of layers"},
    memory=_memory,
    wide_factors=True,
    pieces=True,
    example={"redundancy": 0.5},
)
def _kronecker(config: SelectionConfig) -> SketchEstimator:
    which = config.ghost_layers()
    summed = config.gram_sketch == "summed"
    return SketchEstimator(config, KroneckerEstimator(config.sketch_dim, config.sketch_seed, which, summed))
