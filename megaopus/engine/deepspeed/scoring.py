"""The DeepSpeed engine as the selector sees it: data- and tensor-parallel ranks, weights as ZeRO keeps them.

Under stage 3 each forward and backward pass gathers weights from all data-parallel ranks. They make equally many
passes: candidates and proxy are shared evenly, filled up with copies of weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megaopus.engine.base import Engine
from megaopus.engine.deepspeed.owned_matrices import OwnedMatrices
from megaopus.engine.deepspeed.zero_optimizer import ZeroOptimizer
from megaopus.engine.scoring_base import EngineScoringBackend, moved_weights
from megaopus.errors import EngineError
from megaopus.selection.backend import Batch, Candidates, GhostConsumer, GhostLayer, Gradient, UpdateOperator
from megaopus.selection.operators.piecewise import PiecewiseOperator


class DeepSpeedScoringBackend(EngineScoringBackend):
    """The backend of the DeepSpeed engine; gradient, direction and optimizer state are in ZeRO's fragments."""

    def __init__(self, engine: Engine):
        self._zero: ZeroOptimizer = engine.optimizer
        super().__init__(engine)

    def _shape(self, parameter: Tensor) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def operator(self, muon_operator: str = "paper") -> UpdateOperator | None:
        found = super().operator(muon_operator)
        if found is None or muon_operator == "raw" or not self._zero.matrices():
            return found
        assert isinstance(found, PiecewiseOperator)
        return found.with_matrices(OwnedMatrices(self._zero, self, muon_operator))

    @contextmanager
    def perturbed(self, direction: Gradient) -> Iterator[Callable[[float | Tensor], None]]:
        """Each rank moves its fragments of the model's weights; they become the cast of the fp32 ones in the end."""
        zero = self._zero
        main = [zero.local(name, "weight") for name in direction]
        model = [zero.model_run(name) for name in direction]
        with moved_weights(main, list(direction.values()), model, zero.gather_weights) as move:
            yield move

    def ghost_pass(
        self,
        candidates: Candidates,
        layers: Iterable[GhostLayer],
        consume: GhostConsumer,
        *,
        length: int | None = None,
        micro_batch_size: int = 16,
    ) -> None:
        limits = {"length": self._length(length), "micro_batch_size": micro_batch_size}
        with self._mesh.megatron():
            super().ghost_pass(candidates, layers, consume, **limits)

    def exact_gradients(self, batch: Batch) -> Iterator[Gradient]:
        if self._zero.sharded:
            raise EngineError("selection.estimator=exact needs whole weights on every rank: engine.zero_stage=1 or 2")
        yield from super().exact_gradients(batch)
