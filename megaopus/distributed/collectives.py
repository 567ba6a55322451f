"""Decisions that one rank takes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megaopus.distributed.mesh import Mesh
from megaopus.errors import MegaopusError

T = TypeVar("T")


def on_rank_0(mesh: Mesh, action: Callable[[], T]) -> T:
    """Return what ``action()`` returns on rank 0, on every rank; a MegaopusError raised there is raised on every rank.

    For what depends on files: ranks on other nodes may see them later, or not at all. The result is pickled.
    """
    outcome: tuple[T | None, MegaopusError | None] | None = None
    if mesh.rank == 0:
        try:
            outcome = action(), None
        except MegaopusError as error:
            outcome = None, error
    value, problem = mesh.broadcast_object(outcome)
    if problem is not None:
        raise problem
    return value
