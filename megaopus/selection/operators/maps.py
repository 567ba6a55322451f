"""Linear maps from a gradient to an update, of one parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import grad

from megaopus.newton_schulz import product
from megaopus.selection.backend import Shard
from megaopus.selection.pieces import chunks


class ParameterOperator(Protocol):
    """P_t of one parameter."""

    def apply(self, gradient: Tensor) -> Tensor:
        """P g in g's dtype; leading axes beyond the parameter's own are batch axes."""

    def diagonal(self) -> Tensor | None:
        """Elementwise factor (the parameter's shape, or a scalar); None where P is not diagonal."""

    def sides(self) -> tuple[Tensor | None, Tensor | None] | None:
        """As ``UpdateOperator.sides``."""

    def bounded(self, gradient: Tensor) -> ParameterOperator:
        """As ``UpdateOperator.bounded``, of this parameter."""

    def transposed(self) -> ParameterOperator:
        """P^T, which is P where it is self-adjoint."""


@dataclass(frozen=True, slots=True)
class Diagonal:
    """Multiplication by ``factor``: a scalar tensor, or one of the parameter's shape."""

    factor: Tensor

    def apply(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor.to(gradient.dtype)

    def diagonal(self) -> Tensor | None:
        return self.factor

    def sides(self) -> None:
        return None

    def bounded(self, gradient: Tensor) -> Diagonal:
        return self

    def transposed(self) -> Diagonal:
        return self


class Adaptive:
    """Adam's: multiplication by ``factor`` of a gradient that the second moment takes in first; of None: as it stands.

    Worked out when first asked for: where steps are bounded the frozen one never is.
    """

    def __init__(self, factor: Callable[..., Tensor], *state: Tensor):
        """``state``: of the parameter's shape; ``factor`` takes it after the gradient, and then works by element."""
        self._of = factor
        self._state = state

    @torch.no_grad()
    def _factor(self, gradient: Tensor | None) -> Tensor:
        if not self._state or not self.takes(self._state[0] if gradient is None else gradient):
            return self._of(gradient, *self._state)
        found = torch.empty_like(self._state[0])
        given = [] if gradient is None else [[gradient]]
        for out, *parts in chunks([[found], *given, *([state] for state in self._state)]):
            part = parts[0][0] if given else None
            out[0].copy_(self._of(part, *(views[0] for views in parts[len(given) :])))
        return found

    def takes(self, gradient: Tensor) -> bool:
        """Say whether ``direction`` can be given this gradient."""
        return bool(self._state) and all(each.is_contiguous() for each in (gradient, *self._state))

    @torch.no_grad()
    def direction(self, gradient: Tensor, times: float, bounded: bool) -> Tensor:
        """P g of ``times`` the gradient, to the bit as ``apply`` gives it; what is made on the way is of a chunk."""
        found = torch.empty_like(gradient)
        for (out,), (part,), *state in chunks([[found], [gradient], *([each] for each in self._state)]):
            part = part if times == 1 else part * times
            factor = self._of(part if bounded else None, *(each for (each,) in state))
            torch.mul(part, factor.to(part.dtype), out=out)
            del factor  # before the next one is made
        return found

    @cached_property
    def _frozen(self) -> Diagonal:
        return Diagonal(self._factor(None))

    def apply(self, gradient: Tensor) -> Tensor:
        return self._frozen.apply(gradient)

    def diagonal(self) -> Tensor:
        return self._frozen.factor

    def sides(self) -> None:
        return None

    def bounded(self, gradient: Tensor) -> Diagonal:
        return Diagonal(self._factor(gradient))

    def transposed(self) -> Adaptive:
        return self


class Deferred:
    """A map that is worked out each time that it is asked for something, since it takes as much memory as a matrix.

    ``kept`` gives what was worked out. ``build`` is collective where ranks share the matrix.
    """

    def __init__(self, build: Callable[[], ParameterOperator], adjoint: bool = False):
        self._build = build
        self._adjoint = adjoint

    def kept(self) -> ParameterOperator:
        """Work the map out, to be used several times."""
        built = self._build()
        return built.transposed() if self._adjoint else built

    def apply(self, gradient: Tensor) -> Tensor:
        return self.kept().apply(gradient)

    def diagonal(self) -> Tensor | None:
        return None

    def sides(self) -> tuple[Tensor | None, Tensor | None] | None:
        return self.kept().sides()

    def bounded(self, gradient: Tensor) -> Deferred:
        return self

    def transposed(self) -> Deferred:
        return Deferred(self._build, not self._adjoint)


@dataclass(frozen=True, slots=True)
class OneSided:
    """Multiplication by a symmetric matrix, ``matrix @ g`` where ``left``, else ``g @ matrix``; then by ``columns``.

    ``matrix`` and ``columns`` (a factor for each column; None: 1) are those of the whole parameter; ``shard``: the part
    of the parameter that this rank holds. ``columns_first``: they come before the matrix, as in the transposed map.
    """

    matrix: Tensor
    left: bool
    shard: Shard | None = None
    columns: Tensor | None = None
    columns_first: bool = False

    def apply(self, gradient: Tensor) -> Tensor:
        matrix, columns = self.matrix.to(gradient.dtype), self._own_columns(gradient)
        if columns is not None and self.columns_first:
            gradient = gradient * columns
        if self._mixes_ranks():
            assert self.shard is not None
            gradient, matrix = self.shard.gather(gradient), matrix[self.shard.index]
            found = product(matrix, gradient) if self.left else product(gradient, matrix.t())
        else:
            found = product(matrix, gradient) if self.left else product(gradient, matrix)
        return found if columns is None or self.columns_first else found * columns

    def diagonal(self) -> Tensor | None:
        return None

    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        matrix, columns = self.matrix, self.columns
        if columns is not None and not self.left:
            matrix = columns.unsqueeze(1) * matrix if self.columns_first else matrix * columns
        if self._mixes_ranks():
            assert self.shard is not None  # as it stands: (local, whole)
            matrix = matrix[self.shard.index]
        if not self.left:
            return None, matrix
        own = self._own_columns(self.matrix)
        return matrix.t(), None if own is None else torch.diag(own)

    def bounded(self, gradient: Tensor) -> OneSided:
        return self

    def transposed(self) -> OneSided:
        if self.columns is None or self.left:  # rows are mixed and columns scaled: the order is all the same
            return self
        return replace(self, columns_first=not self.columns_first)

    def _own_columns(self, like: Tensor) -> Tensor | None:
        """The factors of the columns that this rank holds."""
        if self.columns is None:
            return None
        columns = self.columns.to(like.dtype)
        return columns[self.shard.index] if self.shard is not None and self.shard.dim == 1 else columns

    def _mixes_ranks(self) -> bool:
        return self.shard is not None and self.shard.dim == (0 if self.left else 1)


@dataclass(frozen=True, slots=True)
class Rotated:
    """Elementwise multiplication in another basis: Q (f * (Q^T g)) where ``left``, else (f * (g Q)) Q^T.

    ``basis`` Q is that of the whole parameter. ``factor``: this rank's part of f, after the second moment takes in the
    part of a rotated gradient; of None: as it stands. ``shard``: the part of the parameter that this rank holds.
    """

    basis: Tensor
    left: bool
    factor: Callable[[Tensor | None], Tensor]
    shard: Shard | None = None

    def apply(self, gradient: Tensor) -> Tensor:
        return self._back(self._there(gradient) * self.factor(None).to(gradient.dtype))

    def diagonal(self) -> None:
        return None

    def sides(self) -> None:
        return None

    def bounded(self, gradient: Tensor) -> Rotated:
        found = self.factor(self._there(gradient))
        return replace(self, factor=lambda _: found)

    def transposed(self) -> Rotated:
        return self

    def _there(self, gradient: Tensor) -> Tensor:
        basis = self.basis.to(gradient.dtype)
        if self._mixes_ranks():
            assert self.shard is not None
            gradient, basis = self.shard.gather(gradient), basis[:, self.shard.index]
        return basis.t() @ gradient if self.left else gradient @ basis

    def _back(self, rotated: Tensor) -> Tensor:
        basis = self.basis.to(rotated.dtype)
        if self._mixes_ranks():
            assert self.shard is not None
            rotated, basis = self.shard.gather(rotated), basis[self.shard.index]
        return basis @ rotated if self.left else rotated @ basis.t()

    def _mixes_ranks(self) -> bool:
        return self.shard is not None and self.shard.dim == (0 if self.left else 1)


@dataclass(frozen=True, slots=True)
class Derivative:
    """The derivative of ``update`` at ``point``, times ``factor``; ``adjoint``: its adjoint.

    ``update`` maps a whole matrix to one of its shape, in any floating-point precision; ``point`` is whole, and
    ``factor`` a scalar. ``shard``: the part of the parameter that this rank holds. Worked out in the precision of what
    it is applied to, fp32 at least.
    """

    update: Callable[[Tensor], Tensor]
    point: Tensor
    factor: Tensor
    shard: Shard | None = None
    adjoint: bool = False

    def apply(self, gradient: Tensor) -> Tensor:
        given = gradient if self.shard is None else self.shard.gather(gradient)
        given = given.to(torch.promote_types(gradient.dtype, torch.float32)) * self.factor
        batched = given.ndim > self.point.ndim
        flat = given.flatten(0, given.ndim - self.point.ndim - 1) if batched else given
        with torch.enable_grad():
            point = self.point.to(given.dtype).detach().requires_grad_()
            value = self.update(point)
            if self.adjoint:
                (found,) = grad(value, point, flat, is_grads_batched=batched)
            else:  # backward through the backward pass, which is linear in what it is given
                along = torch.zeros_like(value, requires_grad=True)
                (back,) = grad(value, point, along, create_graph=True)
                (found,) = grad(back, along, flat, is_grads_batched=batched)
        found = found.view_as(given)
        if self.shard is not None:
            found = found.index_select(self.shard.dim - point.ndim, self.shard.index)
        return found.to(gradient.dtype)

    def diagonal(self) -> None:
        return None

    def sides(self) -> None:
        return None

    def bounded(self, gradient: Tensor) -> Derivative:
        return self

    def transposed(self) -> Derivative:
        return replace(self, adjoint=not self.adjoint)
