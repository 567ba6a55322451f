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

from megaopus.distributed.shards import whole_of
from megaopus.optim.base import LayoutOptimizer


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

    name: str
    """Of the parameter."""
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

    To be mixed into its class (``over_flat_parts``), Muon or one like it. Data-parallel ranks share the work: of as
    many matrices as there are ranks, each is sent the parts of one, works out the direction and sends the parts of the
    result back.
    """

    def place(self, matrices: Iterable[Matrix], dp_group: dist.ProcessGroup) -> None:
        """Say what the flat parts consist of, once they are cut. Same order on every rank."""
        self._dp_group = dp_group
        self._matrices: dict[Tensor, list[Matrix]] = {}
        for matrix in sorted(matrices, key=lambda matrix: -matrix.shape.numel()):  # alike ones take turns
            self._matrices.setdefault(matrix.flat, []).append(matrix)

    update_group = LayoutOptimizer.update_group

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change a flat part, in which matrices lie one after the other, and its state. Collective."""
        direction = self._direction(self.averaged(gradient, state, group), parameter, group)  # type: ignore[attr-defined]
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])

    def _direction(self, update: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Work out where every matrix in the flat ``parameter`` goes."""
        optimizer: Any = self
        found = torch.zeros_like(update)
        matrices, rank = self._matrices[parameter], dist.get_rank(self._dp_group)

        def run(flat: Tensor, matrix: Matrix) -> Tensor:
            return flat.narrow(0, matrix.offset, matrix.counts[rank])

        def own(matrix: Matrix, part: Tensor) -> Tensor:
            whole = whole_of(part, matrix.parameter, optimizer.tp_group)
            return optimizer.part(optimizer.scaled(optimizer.orthogonal(whole, group), part.dtype), matrix.parameter)

        made = by_owner(
            matrices,
            lambda matrix: [run(update, matrix)],
            lambda matrix, parts: own(matrix, parts[0]),
            self._dp_group,
        )
        for matrix, part in zip(matrices, made, strict=True):
            run(found, matrix).copy_(part)
        return found

    def matrices(self) -> list[Matrix]:
        """Those in the flat parts, in the order in which ranks take turns."""
        return [matrix for each in self._matrices.values() for matrix in each]


def by_owner(
    matrices: Sequence[Matrix],
    runs: Callable[[Matrix], list[Tensor]],
    work: Callable[[Matrix, list[Tensor]], Tensor],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Have one rank, in turns, put each of ``matrices`` together and work on it; (numel,) runs of what it made.

    ``runs``: this rank's run of each of the tensors that belong to a matrix. ``work``: these tensors whole, in its
    shape -> one of that shape. Only matrices of one turn are whole at a time. Collective.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found: list[Tensor] = []
    for first in range(0, len(matrices), size):
        turn = matrices[first : first + size]
        mine = turn[rank] if rank < len(turn) else None
        theirs = [matrix.counts[rank] for matrix in turn] + [0] * (size - len(turn))
        own = [0] * size if mine is None else mine.counts
        wholes = []
        for parts in zip(*map(runs, turn), strict=True):
            whole = parts[0].new_empty(sum(own))
            dist.all_to_all_single(whole, torch.cat(parts), own, theirs, group=group)
            wholes.append(whole)
        made = wholes[0] if mine is None else work(mine, [whole.view(mine.shape) for whole in wholes]).reshape(-1)
        back = made.new_empty(sum(theirs))
        dist.all_to_all_single(back, made, theirs, own, group=group)
        found.extend(back.split(theirs)[: len(turn)])
    return found


@cache
def over_flat_parts(optimizer: type) -> type:
    """The class ``optimizer`` (``Spec.by_matrix``) for flat parts of matrices."""
    return type(f"Flat{optimizer.__name__}", (FlatMatrices, optimizer), {})
