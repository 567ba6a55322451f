"""Says which positions of a sequence each context-parallel rank has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def runs_of(length: int, cp: int, rank: int) -> list[slice]:
    """Return the runs of positions of a rank, in ascending order, equally many positions for each.

    Of 2 cp equal pieces the rank-th from either end: one sees as many keys more as the other sees fewer, so that all
    ranks have as much attention to compute. Where ``length`` is no multiple of 2 cp, the rank-th of cp pieces.
    """
    if cp == 1 or length % (2 * cp):
        size = length // cp
        return [slice(rank * size, (rank + 1) * size)]
    size = length // (2 * cp)
    return [slice(place * size, (place + 1) * size) for place in (rank, 2 * cp - 1 - rank)]


def own_part(values: Tensor, cp: int, rank: int, dim: int = 1) -> Tensor:
    """Those of ``values``, one a position along ``dim``, that a rank has."""
    if cp == 1:
        return values
    parts = [values.narrow(dim, run.start, run.stop - run.start) for run in runs_of(values.shape[dim], cp, rank)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def in_order(parts: Sequence[Tensor], stop: int | None = None) -> Tensor:
    """Put the parts (S / cp, ...) of all ranks, by rank, into the order of positions, as far as ``stop``."""
    cp, length = len(parts), sum(map(len, parts))
    pieces: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        begin = 0
        for run in runs_of(length, cp, rank):
            size = run.stop - run.start
            if stop is None or run.start < stop:
                pieces[run.start] = part[begin : begin + size]
            begin += size
    return torch.cat([pieces[start] for start in sorted(pieces)])
