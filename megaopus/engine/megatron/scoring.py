"""Scores candidates through megatron's schedules, at every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from megaopus.engine.megatron.passes import MegatronPasses
from megaopus.engine.scoring_base import EngineScoringBackend
from megaopus.errors import EngineError
from megaopus.selection.backend import Candidates, GhostConsumer, GhostLayer, Gradient
from megaopus.selection.estimators.ghost import GhostCapture

_PIPELINE_FILL = 4  # micro-batches per stage that keep the idle share of a pipeline small


class MegatronScoringBackend(EngineScoringBackend):
    """The backend of the megatron engine, through whose schedule every pass runs."""

    _engine: MegatronPasses

    @property
    def multiple(self) -> int:
        """With virtual stages micro-batches come in groups."""
        return self.world_size * self._engine.micro_batch_group

    @contextmanager
    def perturbed(self, direction: Gradient) -> Iterator[Callable[[float], None]]:
        """16-bit model weights become the cast of the fp32 ones moved, which are gathered once where sharded."""
        if not self._engine.bf16:
            with super().perturbed(direction) as move:
                yield move
            return
        main = self.parameters()
        saved = {name: self._weights[name].detach().clone() for name in direction}

        @torch.no_grad()
        def move_cast(scale: float) -> None:
            for name, step in direction.items():
                self._weights[name].copy_(torch.add(main[name], step, alpha=scale))

        try:
            yield move_cast
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    self._weights[name].copy_(value)

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
        most = max(1, min(wanted, count // (_PIPELINE_FILL * pp)))
        return next(size for size in range(most, 0, -1) if (count // group) % size == 0)
