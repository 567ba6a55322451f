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


def fingerprint(ids: Tensor) -> Tensor:
    """(8,) float64 whose sums over ranks tell, by ``alike``, whether all had these (n,) int64 ids in this order.

    16-bit parts h of a hash, and their squares. They are exact in the sums of up to 2^21 ranks.
    """
    number = digest(ids)
    parts = [number >> shift & 0xFFFF for shift in range(0, 64, 16)]
    return torch.tensor([*parts, *(part**2 for part in parts)], dtype=torch.float64)


def alike(sums: Sequence[float], ranks: int) -> bool:
    """Say whether ``fingerprint``s that add up to ``sums`` (8,) were equal on as many ``ranks``.

    By Cauchy and Schwarz ranks * sum h^2 = (sum h)^2 only where all h are the same.
    """
    return all(ranks * int(squares) == int(total) ** 2 for total, squares in zip(sums[:4], sums[4:], strict=True))


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
