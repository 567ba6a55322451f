"""Finds out whether all ranks picked the same sequences, and says which did not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaopus.selection import counter_rng

_SHOWN = 8
"""Ids and ranks that a message names at most, of each kind."""


def digest(ids: Tensor) -> int:
    """64 bits, as a signed integer, that depend on every one of (n,) int64 ids and on its place."""
    ids = ids.cpu()
    return int(counter_rng.bits(0, counter_rng.bits(0, ids) + torch.arange(len(ids))).sum())  # int64 sums wrap


def extremes(number: int) -> list[int]:
    """Two int64 whose maxima over ranks are the largest ``number`` and the complement of the smallest."""
    return [number, ~number]


def disagreement(picks: Sequence[Sequence[int]]) -> str:
    """Say which ranks picked what, given each rank's picked ids in order; what all have in common is left out."""
    ranks: dict[tuple[int, ...], list[int]] = {}
    for rank, ids in enumerate(picks):
        ranks.setdefault(tuple(ids), []).append(rank)
    common = set(picks[0]).intersection(*picks)
    said = []
    for ids, who in ranks.items():
        own = [each for each in ids if each not in common] or list(ids)  # the same in another order
        said.append(f"rank{'s' if len(who) > 1 else ''} {_list(who)} picked {_list(own)}")
    return (
        f"ranks picked different sequences, {len(common)} of {len(picks[0])} are the same: {'; '.join(said)}. Nothing"
        " was trained on them: corpus, text features and plugins must be the same on every rank"
    )


def _list(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more
