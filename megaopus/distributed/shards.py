"""Says how tensor-parallel ranks share a parameter, read off the marks that megatron leaves on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_split(parameter: Tensor) -> bool:
    """Return whether tensor-parallel ranks hold parts of the parameter; else each holds all of it."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def is_expert(parameter: Tensor) -> bool:
    """Return whether the parameter is an expert's, which other ranks share than the rest of a model."""
    return bool(getattr(parameter, "of_expert", False))


def mark_expert(parameter: Tensor) -> None:
    """Note that the parameter is an expert's."""
    parameter.of_expert = True  # type: ignore[attr-defined]


def part_of(whole: Tensor, parameter: Tensor, rank: int, size: int) -> Tensor:
    """Rank ``rank``'s part of a tensor that ``size`` ranks share as they do ``parameter``; leading axes may be more.

    A gated MLP's matrix is [gate; up] (``partition_stride`` 2), each split on its own.
    """
    if size == 1 or not is_split(parameter):
        return whole
    dim = _dim(parameter)
    blocks = whole.chunk(parameter.partition_stride, dim)  # type: ignore[attr-defined]
    parts = [block.chunk(size, dim)[rank] for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def whole_of(part: Tensor, parameter: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of which ``part`` is this rank's (see ``part_of``), on every rank. Collective where it is split."""
    size = group_size(group)
    if size == 1 or not is_split(parameter):
        return part
    assert group is not None
    dim = _dim(parameter)
    parts = [p.chunk(parameter.partition_stride, dim) for p in gathered(part, group, size)]  # type: ignore[attr-defined]
    return torch.cat([block for blocks in zip(*parts, strict=True) for block in blocks], dim)


def gathered(part: Tensor, group: dist.ProcessGroup, size: int) -> list[Tensor]:
    """Equally shaped tensors of the ``size`` ranks of a group, in rank order."""
    if size == 1:
        return [part]
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def sum_parts(value: Tensor, parameter: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks of what each found in its part of ``parameter``. Collective where it is split."""
    if group_size(group) == 1 or not is_split(parameter):
        return value
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """Say which of ``ranks`` takes each of several things, the largest first, so that all have about as much."""
    loads, takers = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        takers[number] = loads.index(min(loads))
        loads[takers[number]] += sizes[number]
    return takers


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of a group; None is a rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def _dim(parameter: Tensor) -> int:
    """From the end, so that it holds behind more leading axes. ZeRO-3 keeps the shape of its empty parameters apart."""
    return parameter.partition_dim - len(getattr(parameter, "ds_shape", parameter.shape))  # type: ignore[attr-defined]
