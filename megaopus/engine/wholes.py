"""Puts parameters together of which data-parallel ranks hold runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megaopus.selection.backend import Piece


class Wholes(Mapping[str, Tensor]):
    """Puts the pieces that ranks have of a parameter together when it is read; collective then.

    ``group_of``: parameter -> the ranks that share it.
    """

    def __init__(self, values: Mapping[str, Tensor], pieces: Mapping[str, Piece], group_of: Callable[[str], Any]):
        self._values, self._pieces, self._group_of = values, pieces, group_of
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None
            piece, value = self._pieces[name], self._values[name]
            whole = value.new_zeros(piece.shape.numel())
            whole[piece.start : piece.start + piece.numel] = value
            dist.all_reduce(whole, group=self._group_of(name))  # each element is one rank's, the others add zero
            self._last = name, whole.view(piece.shape)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
