"""Gives P_t where data-parallel ranks' optimizers share the work: each maps its runs of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from megaopus.selection.backend import Gradient, ScoringBackend
from megaopus.selection.operators.build import OptimizerOperator
from megaopus.selection.operators.maps import Diagonal, ParameterOperator
from megaopus.selection.pieces import OnDemand


class Matrices(Protocol):
    """P_t of matrices that are mapped as wholes, of which ranks hold runs."""

    def __contains__(self, name: str) -> bool: ...

    def map(self, name: str) -> ParameterOperator:
        """P_t of a whole matrix. Collective, and so is what it is asked for."""

    def direction(self, gradient: Mapping[str, Tensor], names: Iterable[str], adjoint: bool) -> Gradient:
        """P_t^T g of matrices (P_t g if ``adjoint``), in this rank's runs. Collective."""


class PiecewiseOperator(OptimizerOperator):
    """P_t of elementwise optimizers over this rank's runs, and of ``matrices`` if there are some.

    ``whole`` gathers factors of whole parameters.
    """

    def __init__(
        self,
        maps: Mapping[str, ParameterOperator],
        bound: Mapping[str, Tensor] | None = None,
        *,
        backend: ScoringBackend,
        matrices: Matrices | None = None,
        adjoint: bool = False,
    ):
        super().__init__(maps, bound, adjoint=adjoint)
        self._backend = backend
        self._matrices = matrices

    def with_matrices(self, matrices: Matrices) -> PiecewiseOperator:
        """Return the same, but for those that are mapped as wholes."""
        return self._with(matrices=matrices)

    def direction(self, gradient: Mapping[str, Tensor], names: Iterable[str]) -> Gradient:
        """As ``UpdateOperator.direction``."""
        names, matrices = list(names), self._matrices
        if matrices is None:
            return super().direction(gradient, names)
        found = super().direction(gradient, [name for name in names if name not in matrices])
        found |= matrices.direction(gradient, [name for name in names if name in matrices], self._adjoint)
        return {name: found[name] for name in names}

    def _with(self, **changed: Any) -> PiecewiseOperator:
        given: dict[str, Any] = {"maps": self.maps, "bound": self._bound, "adjoint": self._adjoint}
        return PiecewiseOperator(**(given | {"backend": self._backend, "matrices": self._matrices} | changed))

    @contextmanager
    def whole(self, keeps: bool = True) -> Iterator[OptimizerOperator]:
        """As ``UpdateOperator.whole``; factors that are one number need no gathering."""
        pieces, maps = self._backend.pieces(), dict[str, ParameterOperator]()
        for name in pieces:
            if self._matrices is not None and name in self._matrices:
                maps[name] = self._matrices.map(name)
            elif isinstance(one := self.maps.get(name), Diagonal) and not one.factor.ndim:
                maps[name] = one

        def factor(name: str) -> Tensor:
            found = self.diagonal(name)
            assert found is not None  # the optimizer is elementwise
            return found.expand(pieces[name].numel).float()

        factors = OnDemand([name for name in pieces if name not in maps], factor)
        with self._backend.gathered(factors) as wholes:
            kept = OptimizerOperator(maps, adjoint=self._adjoint, keeps=keeps)
            yield OptimizerOperator({name: _Read(kept, wholes, name) for name in pieces})


class _Read:
    """Looks a parameter's map up when it is asked for something, since its factor may be gathered for that."""

    def __init__(self, kept: OptimizerOperator, wholes: Mapping[str, Tensor], name: str):
        self._kept, self._wholes, self._name = kept, wholes, name

    def _map(self) -> ParameterOperator:
        return self._kept.map(self._name) or Diagonal(self._wholes[self._name])

    def apply(self, gradient: Tensor) -> Tensor:
        return self._map().apply(gradient)

    def diagonal(self) -> Tensor | None:
        return self._map().diagonal()

    def sides(self) -> tuple[Tensor | None, Tensor | None] | None:
        return self._map().sides()

    def bounded(self, gradient: Tensor) -> ParameterOperator:
        return self._map().bounded(gradient)

    def transposed(self) -> ParameterOperator:
        return self._map().transposed()
