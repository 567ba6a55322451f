"""Handles gradients of which a data-parallel rank holds what its optimizer updates: runs of flattened parameters.

Where optimizers share no work (``pieces_of`` is empty) a piece is a whole parameter, in its own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megaopus.selection.backend import Gradient, Piece, ScoringBackend, UpdateOperator
from megaopus.selection.config import CHUNK

_BUFFER = 1 << 28
_ALIGNED = 64
"""Numbers, so that each tensor begins where kernels may read several at once."""


class Scaled(Mapping[str, Tensor]):
    """``values`` times ``factor``, each multiplied anew when it is read: none of the products is kept."""

    def __init__(self, values: Mapping[str, Tensor], factor: float):
        self.inner, self.factor = values, factor

    def __getitem__(self, name: str) -> Tensor:
        value = self.inner[name]
        return value if self.factor == 1 else value * self.factor

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


class OnDemand(Mapping[str, Tensor]):
    """Tensors that are made anew each time that one is read."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self._names, self._make = list(names), make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def unscaled(gradient: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give the tensors of a gradient, or those that it is a multiple of: shapes and types can be read of them."""
    return gradient.inner if isinstance(gradient, Scaled) else gradient


def pieces_of(backend: ScoringBackend) -> Mapping[str, Piece]:
    """Parameter -> which run of it gradients have here; empty: the whole. Backends of version 0.1 know of none."""
    return backend.pieces() if hasattr(backend, "pieces") else {}


def shapes_of(backend: ScoringBackend, gradient: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Parameter of ``gradient`` -> the shape of what this rank's model holds of it."""
    pieces = pieces_of(backend)
    if pieces:
        return {name: pieces[name].shape for name in gradient}
    return {name: value.shape for name, value in unscaled(gradient).items()}


def parameter_shapes(backend: ScoringBackend) -> dict[str, torch.Size]:
    """Trained parameter -> the shape of what this rank's model holds of it; nothing is gathered for that."""
    if pieces := pieces_of(backend):
        return {name: piece.shape for name, piece in pieces.items()}
    return {name: value.shape for name, value in backend.parameters().items()}


def direction(operator: UpdateOperator, gradient: Mapping[str, Tensor], names: Iterable[str]) -> Gradient:
    """P^T g of the parameters ``names``, in pieces as ``gradient`` is."""
    if hasattr(operator, "direction"):
        return operator.direction(gradient, names)
    return operator.transposed().apply({name: gradient[name] for name in names})  # of version 0.1


def whole_operator(operator: UpdateOperator, keeps: bool = True) -> AbstractContextManager[UpdateOperator]:
    """Give, inside, P_t of whole parameters, which gradients of single sequences are of. Collective with pieces.

    ``keeps``: what was worked out for one is kept, since it is asked for again.
    """
    return operator.whole(keeps) if hasattr(operator, "whole") else nullcontext(operator)


def gathered(backend: ScoringBackend, values: Mapping[str, Tensor]) -> AbstractContextManager[Mapping[str, Tensor]]:
    """Give, inside, the whole of each of ``values``, pieces of the ranks of this gradient's kind.

    One at a time is read, or all are put together at once (``ScoringBackend.gathered``). Collective.
    """
    return backend.gathered(values) if pieces_of(backend) else nullcontext(values)


def whole_gradient(backend: ScoringBackend, gradient: Mapping[str, Tensor]) -> Gradient:
    """Gather all of a gradient, to be kept. Collective where ranks hold pieces."""
    with gathered(backend, gradient) as whole:
        return {name: whole[name].clone() if pieces_of(backend) else whole[name] for name in whole}


def chunks(values: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Cut lists of equally large tensors, side by side, into lists of views of ``CHUNK`` numbers at most in all.

    Yields, chunk by chunk, a list of flat views for each of ``values``: small tensors are put together, large ones cut
    so that each chunk but the last is full. Those that are not contiguous are left whole, as they are.
    """
    taken: list[list[Tensor]] = [[] for _ in values]
    size = 0
    for row in zip(*values, strict=True):
        plain, start, numel = all(tensor.is_contiguous() for tensor in row), 0, row[0].numel()
        while start < numel:
            length = min(CHUNK - size, numel - start) if plain else numel
            for views, tensor in zip(taken, row, strict=True):
                views.append(tensor.view(-1)[start : start + length] if plain else tensor)
            start, size = start + length, size + length
            if size >= CHUNK:
                yield taken
                taken, size = [[] for _ in values], 0
    if size:
        yield taken


def side_by_side(like: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors of the shapes of ``like``, not filled; the buffers that they are views of).

    What is done to every number alike is done to a buffer at once. They are of ``_BUFFER`` numbers at most, so that an
    allocator need not find more in one place, or of one tensor. All of ``like`` are of one type, on one device.
    """
    widths = [-(-tensor.numel() // _ALIGNED) * _ALIGNED for tensor in like]
    sizes: list[int] = []
    places = []
    for width in widths:
        if not sizes or sizes[-1] + width > _BUFFER:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += width
    buffers = [like[0].new_empty(size) for size in sizes]
    views = [
        buffers[number][start : start + tensor.numel()].view(tensor.shape)
        for (number, start), tensor in zip(places, like, strict=True)
    ]
    return views, buffers


def finite(gradient: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Say (() bool, on the device) whether every number of a gradient is finite."""
    values = [value for value in gradient.values() if value.numel()]
    if not values:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack(torch._foreach_norm(values, float("inf"))).isfinite().all()
