"""Runs Muon, and others of its kind, where ZeRO keeps flat parts of the weights, and AdamW beside it.

DeepSpeed takes one optimizer and replaces the parameters of its groups by the flat parts that the rank owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class ChainedOptimizer(Optimizer):
    """Several optimizers in the place of one: their groups one after the other, and one state."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self._optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of what has a gradient: DeepSpeed calls it for each group, whose gradient alone is there then."""
        for optimizer in self._optimizers:
            optimizer.step()


class Matrix(NamedTuple):
    """A matrix of which every data-parallel rank owns a run of elements, in rank order, possibly none."""

    parameter: Tensor
    """Says how tensor-parallel ranks share it."""
    shape: torch.Size
    """Of what this tensor-parallel rank holds of it."""
    flat: Tensor
    """This rank's flat part of many matrices."""
    offset: int
    """Of its run in ``flat``."""
    counts: list[int]
    """Elements that each data-parallel rank owns."""


class FlatMatrices:
    """Makes an optimizer by matrix (``Spec.by_matrix``) work on flat parts: state stays in parts, the update is whole.

    To be mixed into its class (``over_flat_parts``), whose ``direction`` takes a whole matrix. Data-parallel ranks
    share the work: of as many matrices as there are ranks, each is sent the parts of one, works out the direction and
    sends the parts of the result back.
    """

    def place(self, matrices: Iterable[Matrix], dp_group: dist.ProcessGroup) -> None:
        """Say what the flat parts consist of, once they are cut. Same order on every rank."""
        self._dp_group = dp_group
        self._matrices: dict[Tensor, list[Matrix]] = {}
        for matrix in sorted(matrices, key=lambda matrix: -matrix.shape.numel()):  # alike ones take turns
            self._matrices.setdefault(matrix.flat, []).append(matrix)

    def direction(self, update: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """As the optimizer's own, of every matrix in the flat ``parameter``. Collective."""
        found = torch.zeros_like(update)
        matrices, size = self._matrices[parameter], dist.get_world_size(self._dp_group)
        for first in range(0, len(matrices), size):
            self._share(matrices[first : first + size], update, found, group)
        return found

    def _share(self, matrices: list[Matrix], update: Tensor, found: Tensor, group: dict[str, Any]) -> None:
        """``direction`` of up to dp matrices, rank r's that of ``matrices[r]``: from ``update`` into ``found``."""
        rank, size = dist.get_rank(self._dp_group), dist.get_world_size(self._dp_group)
        mine = matrices[rank] if rank < len(matrices) else None
        theirs = [matrix.counts[rank] for matrix in matrices] + [0] * (size - len(matrices))
        own = [0] * size if mine is None else mine.counts
        parts = [update.narrow(0, matrix.offset, matrix.counts[rank]) for matrix in matrices]
        whole = update.new_empty(sum(own))
        dist.all_to_all_single(whole, torch.cat(parts), own, theirs, group=self._dp_group)
        if mine is not None:
            whole = super().direction(whole.view(mine.shape), mine.parameter, group).reshape(-1)  # type: ignore[misc]
        back = update.new_empty(sum(theirs))
        dist.all_to_all_single(back, whole, theirs, own, group=self._dp_group)
        for matrix, part in zip(matrices, back.split(theirs), strict=False):
            found.narrow(0, matrix.offset, matrix.counts[rank]).copy_(part)


@cache
def over_flat_parts(optimizer: type) -> type:
    """The class ``optimizer`` (``Spec.by_matrix``) for flat parts of matrices."""
    return type(f"Flat{optimizer.__name__}", (FlatMatrices, optimizer), {})
