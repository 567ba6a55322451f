"""Makes candidates of plain tensors, and says who of the ranks works on which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from megaopus.selection import counter_rng
from megaopus.selection.backend import Batch, Candidates


class TensorCandidates:
    """A buffer of N sequences held in memory: a tensor, or a tuple, list or dict of tensors with leading axis N.

    ``ids`` (N,) int64 name the sequences; sampling noise is keyed by them, so they should not repeat within a run.
    Raises ValueError for no tensor, unequal leading axes, or ids that are not unique.
    """

    def __init__(self, batch: Batch, ids: Tensor | None = None):
        sizes = {tensor.shape[0] if tensor.ndim else -1 for tensor in tensors_of(batch)}
        if len(sizes) != 1 or -1 in sizes:
            found = sorted(sizes) or "no tensor"
            raise ValueError(f"a candidate batch needs tensors with one common leading axis N; found {found}")
        self._batch = batch
        self._ids = torch.arange(sizes.pop()) if ids is None else ids.detach().to("cpu", torch.int64)
        count = len(next(tensors_of(batch)))
        if self._ids.shape != (count,) or len(self._ids.unique()) != count:
            raise ValueError(f"candidate ids must be {count} different integers, one per sequence")

    @property
    def ids(self) -> Tensor:
        """(N,) int64."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, indices: Tensor) -> TensorCandidates:
        """The candidates at ``indices`` (n,), in that order; an index may repeat."""
        taken = copy.copy(self)
        taken._batch = map_tensors(self._batch, lambda x: x[indices.to(x.device)])
        taken._ids = self._ids[indices.cpu()]
        return taken

    def batch(self, length: int | None = None) -> Batch:
        """The tensors; axis 1 of those that have one cut to its first ``length`` entries."""
        if length is None:
            return self._batch
        return map_tensors(self._batch, lambda x: x[:, :length] if x.ndim > 1 else x)


class Windowed:
    """``candidates`` of which ``batch(length)`` gives another run of neighbouring positions than the first.

    ``window`` says where a run starts: 'random', drawn from (seed, step, id); 'strided', a function of the id that
    spreads the runs of ids that follow one another evenly over the sequence. Positions are those along axis 1; what
    comes after one in a run comes after it in the sequence, so that labels shifted by the loss are true.
    """

    def __init__(self, candidates: Candidates, window: str, seed: int, step: int):
        self._inner = candidates
        self._window = window
        self._seed = seed
        self._step = step

    @property
    def ids(self) -> Tensor:
        """(N,) int64."""
        return self._inner.ids

    def __len__(self) -> int:
        return len(self._inner)

    def take(self, indices: Tensor) -> Windowed:
        """The candidates at ``indices`` (n,), in that order."""
        return Windowed(self._inner.take(indices), self._window, self._seed, self._step)

    def batch(self, length: int | None = None) -> Batch:
        """Their tokens; of tensors with positions as many as the first ``length`` would be, taken from the window."""
        whole = self._inner.batch()
        if length is None:
            return whole
        widths = iter([part.shape[1] if part.ndim > 1 else 0 for part in tensors_of(self._inner.batch(length))])
        return map_tensors(whole, lambda x: self._cut(x, next(widths)))

    def _cut(self, tensor: Tensor, width: int) -> Tensor:
        if tensor.ndim < 2 or width >= tensor.shape[1]:
            return tensor
        ids = self.ids.cpu()
        if self._window == "strided":
            where = counter_rng.spread(ids)
        else:
            where = counter_rng.uniform(counter_rng.key(self._seed, "window", self._step), ids)
        start = (where * (tensor.shape[1] - width + 1)).long()
        positions = start.unsqueeze(1) + torch.arange(width)
        rows = torch.arange(len(tensor)).unsqueeze(1)
        return tensor[rows.to(tensor.device), positions.to(tensor.device)]


class Together:
    """The sequences of ``first``, and after them those of ``second``; batches of the two have one structure."""

    def __init__(self, first: Candidates, second: Candidates):
        self._first, self._second = first, second

    @property
    def both(self) -> tuple[Candidates, Candidates]:
        """Return what it is made of."""
        return self._first, self._second

    @property
    def ids(self) -> Tensor:
        """(N,) int64; those of the second may repeat some of the first."""
        return torch.cat([self._first.ids.cpu(), self._second.ids.cpu()])

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def take(self, indices: Tensor) -> Together:
        """Those at ``indices`` (n,), which go through the first before they go through the second."""
        indices = indices.cpu()
        count = len(self._first)
        here = indices < count
        assert not bool((~here[:-1] & here[1:]).any()), "the second ones come after the first"
        return Together(self._first.take(indices[here]), self._second.take(indices[~here] - count))

    def batch(self, length: int | None = None) -> Batch:
        """Their tokens, one after the other."""
        if not len(self._second):
            return self._first.batch(length)
        if not len(self._first):
            return self._second.batch(length)
        others = iter(list(tensors_of(self._second.batch(length))))
        return map_tensors(self._first.batch(length), lambda x: torch.cat([x, next(others)]))


def as_candidates(buffer: Candidates | Batch, step: int) -> Candidates:
    """``buffer`` itself if it is a ``Candidates``; else its tensors with ids step * N + 0..N-1."""
    if all(hasattr(buffer, name) for name in ("ids", "take", "batch")):
        return cast(Candidates, buffer)
    wrapped = TensorCandidates(buffer)
    return TensorCandidates(buffer, wrapped.ids + step * len(wrapped))


def even_share(count: int, ranks: int, rank: int, unit: int = 1) -> tuple[Tensor, Tensor]:
    """(rows (m,) int64 that one of ``ranks`` works on, their weights (m,) float64) of ``count`` sequences.

    The shares are contiguous and have one size m, the smallest multiple of ``unit`` that suffices. Where that is more
    than there are, the last ranks get copies of the last sequence, of weight 0; the others' weights then make 1 the
    mean over all ranks, so that the mean of the weighted values is that of the sequences.
    """
    size = -(-count // (ranks * unit)) * unit
    places = rank * size + torch.arange(size)
    return places.clamp(max=count - 1), (places < count).double() * (ranks * size / count)


def map_tensors(batch: Batch, function: Callable[[Tensor], Tensor]) -> Any:
    """``batch`` with ``function`` applied to each of its tensors; other leaves are kept."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {name: map_tensors(value, function) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [map_tensors(value, function) for value in batch]
        return items if isinstance(batch, list) else tuple(items)
    return batch


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | tuple | list):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors_of(value)
