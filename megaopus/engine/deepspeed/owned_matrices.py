"""Works out P_t of matrices that are updated as wholes, where ZeRO cuts them: each is put together by one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from megaopus.engine.deepspeed.flat_matrices import Matrix, by_owner
from megaopus.engine.deepspeed.zero_optimizer import ZeroOptimizer
from megaopus.selection.backend import Gradient
from megaopus.selection.operators.maps import Deferred, ParameterOperator
from megaopus.selection.operators.registry import factory_of

if TYPE_CHECKING:
    from megaopus.engine.scoring_base import EngineScoringBackend


class OwnedMatrices:
    """P_t of each matrix: its direction by the rank that puts it together, the map itself from a gathered momentum."""

    def __init__(self, zero: ZeroOptimizer, backend: EngineScoringBackend, muon_operator: str):
        self._zero = zero
        self._backend = backend
        self._muon_operator = muon_operator
        self._matrices = {matrix.name: matrix for matrix in zero.matrices()}

    def __contains__(self, name: str) -> bool:
        return name in self._matrices

    def map(self, name: str) -> ParameterOperator:
        """P_t of a whole matrix. Collective, and so is what it is asked for."""
        return Deferred(lambda: self._of(name, self._zero.whole(name, self._zero.keys(name)[-1])))

    def direction(self, gradient: Mapping[str, Tensor], names: Iterable[str], adjoint: bool) -> Gradient:
        """P_t^T g of matrices (P_t g if ``adjoint``), in this rank's runs. Collective."""
        wanted = set(names)
        matrices = [matrix for name, matrix in self._matrices.items() if name in wanted]

        def work(matrix: Matrix, wholes: list[Tensor]) -> Tensor:
            momentum, whole = wholes
            map_ = self._of(matrix.name, momentum)
            return (map_ if adjoint else map_.transposed()).apply(whole)

        def runs(matrix: Matrix) -> list[Tensor]:
            return [self._momentum(matrix.name), gradient[matrix.name]]

        made = by_owner(matrices, runs, work, self._zero.group)
        return {matrix.name: run for matrix, run in zip(matrices, made, strict=True)}

    def _of(self, name: str, momentum: Tensor) -> ParameterOperator:
        optimizer, group = self._zero.held(name)
        settings = {**group, "muon_operator": self._muon_operator, "shard": self._backend.split.get(name)}
        found = factory_of(optimizer)(settings, {"momentum_buffer": momentum}, momentum)
        assert found is not None  # there is a momentum
        return found

    def _momentum(self, name: str) -> Tensor:
        return self._zero.local(name, self._zero.keys(name)[-1])
