"""CountSketch, and the paper's estimator: sketches of preconditioned ghost gradients, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from megaopus.selection import noise
from megaopus.selection.backend import Batch, Candidates, GhostLayer, Gradient, ScoringBackend, UpdateOperator
from megaopus.selection.ghost import GhostCapture, per_sample_gradient, rows_by_sequence

_CHUNK_ELEMENTS = 1 << 25  # largest per-sample gradient held at once, in numbers (128 MB in fp32)


class CountSketch:
    """Pi: R^d -> R^m, sketch[h(i)] += s(i) x_i with hash h and sign s (Charikar, Chen, Farach-Colton, 2002).

    <Pi x, Pi y> is unbiased for <x, y> over seeds, with variance (|x|^2 |y|^2 + <x,y>^2 - 2 sum_i x_i^2 y_i^2) / m.
    h and s are functions of (seed, name, index); ``indices`` (d,) are positions in the whole matrix, so sketches of its
    shards add up to the sketch of the whole.
    """

    def __init__(self, name: str, indices: Tensor, dim: int, seed: int):
        bits = noise.bits(noise.key(seed, "sketch", name), indices)
        self._bucket = ((bits >> 1) & ((1 << 63) - 1)) % dim  # int64: what scatter_add_ takes
        self._sign = ((bits & 1) * 2 - 1).to(torch.int8)
        self.dim = dim

    def __call__(self, rows: Tensor, factor: Tensor | None = None) -> Tensor:
        """(n, d) -> (n, m): sketch of each row, multiplied elementwise by ``factor`` (d,) or scalar first if given."""
        weight = self._sign.to(rows.dtype)
        if factor is not None:
            weight = weight * factor.to(rows.dtype)
        return rows.new_zeros(len(rows), self.dim).scatter_add_(1, self._bucket.expand_as(rows), rows * weight)


class CountSketchEstimator:
    """Alignment sum_r <phi_r, psi_r>, phi_r = Pi_r(P_r sum_t b_t a_t^T), psi_r = Pi_r(proxy gradient of layer r).

    Keeps each layer's hashes (9 bytes per weight) between steps. ``layers``: 'linear' sums over matrices with at least
    one linear use (a tied embedding counts both its uses), 'all' over embeddings too.
    """

    def __init__(self, dim: int, seed: int, layers: str = "linear"):
        self._dim = dim
        self._seed = seed
        self._which = layers
        self._sketches: dict[str, CountSketch] = {}

    def layers(self, backend: ScoringBackend) -> list[GhostLayer]:
        """The uses that are summed over; raises ValueError if there are none."""
        every = backend.ghost_layers()
        linear = {layer.parameter for layer in every if layer.kind == "linear"}
        chosen = [layer for layer in every if self._which == "all" or layer.parameter in linear]
        if not chosen:
            raise ValueError("countsketch found no trained nn.Linear (or nn.Embedding): use estimator=directional")
        return chosen

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
    ) -> tuple[Tensor, Tensor | None]:
        """((n,) float64 alignments, sketches (n, layers x m) or None); of this rank's candidates.

        The inner products of the sketches estimate the Gram matrix <P g_z, P g_s> of the updates.
        Raises RuntimeError naming any layer whose activations could not be captured.
        """
        layers = self.layers(backend)
        names = list(dict.fromkeys(layer.parameter for layer in layers))
        proxy = torch.cat(
            [self._of(name, proxy_gradient[name])(proxy_gradient[name].reshape(1, -1)) for name in names], 1
        )
        utilities, kept = [], []
        for chunk in torch.arange(len(candidates)).split(micro_batch_size):
            batch = candidates.take(chunk).batch(length)
            sketches = self._sketch(backend, batch, len(chunk), layers, operator, proxy_gradient)
            utilities.append((sketches * proxy).sum(1, dtype=torch.float64))
            if keep_sketches:
                kept.append(sketches)
        return torch.cat(utilities), torch.cat(kept) if keep_sketches else None

    def _sketch(
        self,
        backend: ScoringBackend,
        batch: Batch,
        count: int,
        layers: list[GhostLayer],
        operator: UpdateOperator,
        proxy_gradient: Gradient,
    ) -> Tensor:
        """(count, layers x m): phi of one micro-batch, layer after layer."""
        phi = {layer.parameter: proxy_gradient[layer.parameter].new_zeros(count, self._dim) for layer in layers}

        def consume(layer: GhostLayer, act_a: Tensor, grad_b: Tensor) -> None:
            name = layer.parameter
            weight = proxy_gradient[name]
            act_a, grad_b = rows_by_sequence(layer, act_a, count), rows_by_sequence(layer, grad_b, count)
            factor = operator.diagonal(name)
            flat = None if factor is None else factor.flatten() if factor.ndim else factor
            for part in torch.arange(count).split(max(1, _CHUNK_ELEMENTS // weight.numel())):
                span = slice(int(part[0]), int(part[-1]) + 1)
                gradient = per_sample_gradient(layer, weight.shape, act_a[span], grad_b[span].to(weight.dtype))
                if factor is None:
                    gradient = operator.apply({name: gradient})[name]
                phi[name][span] += self._of(name, weight)(gradient.flatten(1), flat)

        with GhostCapture(layers, consume) as capture, torch.no_grad():
            backend.ghost_backward(batch)
            capture.check()
        return torch.cat(list(phi.values()), 1)

    def _of(self, name: str, weight: Tensor) -> CountSketch:
        if name not in self._sketches:
            indices = torch.arange(weight.numel(), device=weight.device)
            self._sketches[name] = CountSketch(name, indices, self._dim, self._seed)
        return self._sketches[name]
