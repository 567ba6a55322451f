"""Gathers the weights that ranks have updated pieces of while other things are done, until somebody needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn


class LateGather:
    """Begins to gather all buckets after an update; a part of the model waits for its own before its forward pass.

    What reads weights elsewhere calls ``settle`` first.
    """

    def __init__(self, ddp: Sequence[Any]):
        """``ddp``: this rank's chunks of the model, wrapped in megatron's DDP with a sharded optimizer."""
        from megatron.core.distributed.param_and_grad_buffer import dist_all_gather_func, shard_buffer

        self._gather = dist_all_gather_func
        self._waiting: dict[int, dist.Work] = {}
        """Number of a bucket -> what gathers it."""
        # megatron fills buckets from a model's end, so that the last has the weights that are used first
        buckets = [
            (bucket, group.intra_distributed_optimizer_instance_group)
            for chunk in ddp
            for group in (*reversed(chunk.bucket_groups), *reversed(chunk.expert_parallel_bucket_groups))
            for bucket in group.buckets
        ]
        self._buckets = [
            (
                bucket.param_data,
                shard_buffer(bucket.param_data, dist.get_world_size(group))[dist.get_rank(group)],
                group,
            )
            for bucket, group in buckets
        ]
        """Weights, this rank's shard of them, and the ranks that have the others."""
        of = {parameter: number for number, (bucket, _) in enumerate(buckets) for parameter in bucket.params_list}
        for chunk in ddp:
            rest = set(chunk.module.parameters())
            for part in _parts(chunk.module):
                parameters = list(part.parameters())
                rest -= set(parameters)
                part.register_forward_pre_hook(self._before(sorted({of[each] for each in parameters})))
            if rest:
                raise AssertionError(f"{len(rest)} weights are in no part of the model that waits for them")

    def start(self) -> None:
        """Begin to gather what this rank and the others have updated, after ``settle``. Collective."""
        for number, (weights, own, group) in enumerate(self._buckets):
            if (work := self._gather(weights, own, group=group, async_op=True)) is not None:
                self._waiting[number] = work

    def settle(self) -> None:
        """Wait until all weights are there."""
        while self._waiting:
            self._wait(next(iter(self._waiting)))

    def _wait(self, number: int) -> None:
        if (work := self._waiting.pop(number, None)) is not None:
            work.wait()

    def _before(self, numbers: list[int]) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if self._waiting:
                for number in numbers:
                    self._wait(number)

        return hook


def _parts(chunk: Any) -> Iterator[nn.Module]:
    """Yield what a GPTModel calls one after the other."""
    for name in ("embedding", "output_layer"):
        if (part := getattr(chunk, name, None)) is not None:
            yield part
    yield from chunk.decoder.layers
    if (norm := getattr(chunk.decoder, "final_layernorm", None)) is not None:
        yield norm
