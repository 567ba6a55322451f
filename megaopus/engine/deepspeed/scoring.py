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
from megaopus.engine.deepspeed.zero_optimizer import ZeroOptimizer
from megaopus.engine.scoring_base import EngineScoringBackend
from megaopus.errors import EngineError
from megaopus.selection.backend import Batch, Candidates, GhostConsumer, GhostLayer, Gradient


class DeepSpeedScoringBackend(EngineScoringBackend):
    """The backend of the DeepSpeed engine; gradient, direction and optimizer state are whole on every rank."""

    def __init__(self, engine: Engine):
        self._zero: ZeroOptimizer = engine.optimizer
        super().__init__(engine)

    def _shape(self, parameter: Tensor) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    @contextmanager
    def perturbed(self, direction: Gradient) -> Iterator[Callable[[float], None]]:
        """The model's weights become the cast of the fp32 ones moved, under stage 3 each rank's part."""
        zero, steps = self._zero, direction
        if zero.sharded:
            weights = zero.shards(direction)
            steps = {name: zero.fragments[name].cut(step) for name, step in direction.items()}
        else:
            weights = {name: self._weights[name].detach() for name in direction}
        main = saved = {name: weight.clone() for name, weight in weights.items()}
        if self._engine.bf16 and zero.sharded:
            main = {name: zero.local(name, "weight") for name in direction}
        elif self._engine.bf16:
            main = zero.main_weights()

        def move(scale: float) -> None:
            self._set(weights, {name: torch.add(main[name], step, alpha=scale) for name, step in steps.items()})

        try:
            yield move
        finally:
            self._set(weights, saved)

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            weights[name].copy_(value)
        if self._zero.sharded:
            self._zero.regather()

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
