"""Scores candidates through megatron's schedules, at every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

from megaopus.engine.megatron.passes import MegatronPasses
from megaopus.engine.scoring_base import EngineScoringBackend, moved_weights
from megaopus.errors import EngineError
from megaopus.selection.backend import Batch, Candidates, GhostConsumer, GhostLayer, Gradient
from megaopus.selection.config import largest_divisor
from megaopus.selection.estimators.ghost import GhostCapture

_PIPELINE_FILL = 4  # micro-batches per stage that keep the idle share of a pipeline small


class MegatronScoringBackend(EngineScoringBackend):
    """The backend of the megatron engine, through whose schedule every pass runs."""

    _engine: MegatronPasses
    _gradients_free = True

    @property
    def multiple(self) -> int:
        """With virtual stages micro-batches come in groups."""
        return self.world_size * self._engine.micro_batch_group

    @contextmanager
    def perturbed(self, direction: Gradient) -> Iterator[Callable[[float | Tensor], None]]:
        """Each rank moves what its optimizer updates; training's own gathering of weights does the rest.

        16-bit weights become the cast of the fp32 ones moved, and in the end of these as they are: what training made
        of them.
        """
        optimizer, rounded = self._engine.optimizer, self._engine.bf16
        pieces = {self._name_of[local]: piece for local, piece in optimizer.pieces().items()}
        model = [pieces[name].model for name in direction]
        main = [pieces[name].main if rounded else pieces[name].model.clone() for name in direction]

        def gather() -> None:
            with self._mesh.megatron():
                optimizer.gather_weights()

        with moved_weights(main, list(direction.values()), model, gather) as move:
            yield move

    def gathered(self, values: Mapping[str, Tensor]) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Put them where training has its gradients; what is asked for inside of that, one at a time."""
        return self._in_gradients(values) if self._gradients_free else super().gathered(values)

    @contextmanager
    def _in_gradients(self, values: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        self._gradients_free = False
        try:
            with self._mesh.megatron():
                found = self._engine.gather(values)
            yield found
        finally:
            self._gradients_free = True

    def exact_gradients(self, batch: Batch) -> Iterator[Gradient]:
        with self._engine.gradients_apart():
            yield from super().exact_gradients(batch)

    def ghost_pass(
        self,
        candidates: Candidates,
        layers: Iterable[GhostLayer],
        consume: GhostConsumer,
        *,
        length: int | None = None,
        micro_batch_size: int = 16,
    ) -> None:
        """All stages work on micro-batches at once, by the training schedule."""
        micro = self._micro_batch_size(len(candidates), micro_batch_size)
        with ExitStack() as stack:
            capture = stack.enter_context(GhostCapture(layers, consume))
            reduction = self._engine.without_reduction()
            for context in (self.frozen(), self.scoring(), torch.enable_grad(), self._mesh.megatron(), reduction):
                stack.enter_context(context)
            self._engine.run_capturing(candidates, micro, self._length(length), capture)
            capture.check()

    def _micro_batch_size(self, count: int, wanted: int) -> int:
        """The largest size up to ``wanted`` that divides ``count`` candidates into enough micro-batches.

        A pipeline needs equal ones (with virtual stages, in groups of pp), several per stage to keep all stages busy.
        """
        pp, group = self._mesh.shape.pp, self._engine.micro_batch_group
        if pp == 1:
            return wanted
        if count % group:
            raise EngineError(
                f"{count} candidates per data-parallel rank are not a multiple of pp={group}, which vpp needs"
            )
        return largest_divisor(count // group, min(wanted, count // (_PIPELINE_FILL * pp)))
