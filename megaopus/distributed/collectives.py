"""Decisions that one rank takes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megaopus.distributed.mesh import Mesh
from megaopus.errors import CheckpointError

T = TypeVar("T")


def on_rank_0(mesh: Mesh, action: Callable[[], T]) -> T:
    """What ``action()`` returns on rank 0, on every rank; a CheckpointError raised there is raised on every rank.

    For what depends on files: ranks on other nodes may see them later, or not at all. The result is pickled.
    """
    outcome: tuple[T | None, CheckpointError | None] | None = None
    if mesh.rank == 0:
        try:
            outcome = action(), None
        except CheckpointError as error:
            outcome = None, error
    value, problem = mesh.broadcast_object(outcome)
    if problem is not None:
        raise problem
    return value


def on_every_rank(mesh: Mesh, action: Callable[[], T]) -> T:
    """``action()``, which must succeed on every rank: where one rank raises CheckpointError, all do."""
    problem: CheckpointError | None = None
    try:
        value = action()
    except CheckpointError as error:
        problem = error
    if mesh.any(problem is not None):
        raise problem or CheckpointError("another rank could not do its part of the checkpoint; see its message")
    return value
