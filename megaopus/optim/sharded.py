"""AdamW with its state sharded over the ranks that hold the same weights: megatron's DistributedOptimizer.

These are the data- and context-parallel ranks, of an expert those that have it. Each keeps the moments (and, under
bf16, the fp32 main weights) of a contiguous piece of the gradient buffer, which pays no heed to where parameters begin.
Selection reads its runs of parameters; checkpoints have whole parameters, as those of the unsharded optimizer, so that
either can go on from the other's at any layout. megatron's own formats do not restore without Apex or Transformer
Engine. Import only after ``distributed.cpu.prepare_megatron``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import deal
from megaopus.optim.late_gather import LateGather

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "param"
"""megatron's key for the fp32 main weights among a parameter's state."""


class ShardedAdamW(DistributedOptimizer):
    """``optimizer``'s AdamW over the pieces that this rank owns; ``ddp``: the rank's wrapped model chunks."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: Any,
        ddp: Sequence[Any],
        mesh: Mesh,
        init_state: Callable[..., None],
        late: LateGather | None = None,
    ):
        """``late``: what gathers updated weights while other things are done; None: the update ends with it."""
        self._late = late
        self._groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self._group_of = {parameter: index for index, group in enumerate(self._groups) for parameter in group}
        super().__init__(
            optimizer,
            config,
            None,
            init_state,
            model_chunks=list(ddp),
            per_model_buffers=dict(enumerate(kind for c in ddp for kind in (c.buffers, c.expert_parallel_buffers))),
            data_parallel_group=mesh.dp_cp_group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=0,
        )
        self.tp_group = mesh.tp_group
        self.grad_stats_parallel_group = dist.group.WORLD
        self.updates = 0
        """So far; the same on every rank, also where a rank owns no piece."""

    def step_with_ready_grads(self) -> bool:
        """Update, and count it on the host."""
        done: bool
        if self._late is None:
            done = super().step_with_ready_grads()
        else:
            self._late.settle()
            done = super(DistributedOptimizer, self).step_with_ready_grads()  # without the gathering at its end
            self._late.start()
        self.updates += 1
        return done

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield (parameter, gradient of this rank's run of it) for those that it has one of; for the update."""
        for runs, group in zip(self.opt_group_ranges, self.optimizer.param_groups, strict=True):
            for parameter, piece in zip(runs["params"], group["params"], strict=True):
                if piece.grad is not None:
                    yield parameter, piece.grad

    def group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The settings that ``parameter`` is updated with."""
        return self.optimizer.param_groups[self._group_of[parameter]]

    def own_piece(self, parameter: nn.Parameter) -> slice | None:
        """Say which run of the flattened ``parameter`` this rank owns; None: nothing of it."""
        if parameter not in self.model_param_gbuf_map:
            return None
        owned = self._get_model_param_range_map(parameter)["param"]
        return slice(owned.start, owned.end)

    def piece(self, parameter: nn.Parameter, key: str) -> Tensor:
        """(numel,) this rank's run of ``exp_avg``, ``exp_avg_sq`` or ``param`` of a parameter; empty: it has none.

        The moments exist only once there was an update.
        """
        if parameter not in self.model_param_gbuf_map:
            return torch.empty(0, device=self.buffers[0].grad_data.device)
        return self._get_main_param_and_optimizer_states(parameter)[key].detach()

    def gather_weights(self) -> None:
        """Bring the model's weights up to date with the runs of all ranks, as after an update. Collective."""
        self.settle()
        for chunk in self.model_chunks:
            chunk.start_param_sync()

    def settle(self) -> None:
        """Wait until all weights of the last update are there."""
        if self._late is not None:
            self._late.settle()

    @torch.no_grad()
    def gather_into_gradients(self, read: Mapping[nn.Parameter, Callable[[], Tensor]]) -> dict[nn.Parameter, Tensor]:
        """Put runs of all ranks together in the buffer that training has its gradients in; views of it. Collective.

        ``read``: parameter -> what gives this rank's run, (numel,) fp32, which does not lie in that buffer.
        """
        from megatron.core.distributed.param_and_grad_buffer import dist_all_gather_func, shard_buffer

        found: dict[nn.Parameter, Tensor] = {}
        for buffer, index, pieces in self._buckets():
            bucket, group = buffer.buckets[index], buffer.data_parallel_group
            own = shard_buffer(bucket.grad_data, dist.get_world_size(group))[dist.get_rank(group)]
            for parameter, ranges in pieces.items():
                if parameter in read:
                    own[ranges["gbuf_local"].start : ranges["gbuf_local"].end] = read[parameter]()
            dist_all_gather_func(bucket.grad_data, own, group=group)
            for parameter, (start, end, where) in buffer.param_index_map.items():
                if where == index and parameter in read:
                    run = bucket.grad_data[start - bucket.offset : end - bucket.offset]
                    found[parameter] = run.view(parameter.shape)
        return found

    def whole(self, key: str) -> dict[nn.Parameter, Tensor]:
        """``exp_avg``, ``exp_avg_sq`` or ``param`` (fp32 weights) of each whole local parameter, fp32. Collective.

        The moments exist only once there was an update.
        """
        return {parameter: value.clone() for parameter, value in self._gathered(key)}

    @torch.no_grad()
    def _gathered(self, key: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield what ``whole`` has, as views of a bucket that go with it."""
        for buffer, index, pieces in self._buckets():
            bucket = buffer.buckets[index]
            flat = torch.empty_like(bucket.grad_data, dtype=torch.float32)
            parts = list(flat.chunk(dist.get_world_size(buffer.data_parallel_group)))
            local = torch.zeros_like(parts[0])
            for parameter, ranges in pieces.items():
                piece = self._get_main_param_and_optimizer_states(parameter)[key]
                local[ranges["gbuf_local"].start : ranges["gbuf_local"].end] = piece
            dist.all_gather(parts, local, group=buffer.data_parallel_group)
            for parameter, (start, end, where) in buffer.param_index_map.items():
                if where == index:
                    part = flat[start - bucket.offset : end - bucket.offset]
                    yield parameter, part.view(parameter.shape)

    def saves(self, parameter: nn.Parameter) -> bool:
        """Return whether this one of the ranks that share it saves a whole parameter: all save about as much."""
        return parameter in self._saved

    @cached_property
    def _saved(self) -> set[nn.Parameter]:
        sharing = {p: buffer.data_parallel_group for buffer in self.buffers for p in buffer.param_index_map}
        saved: set[nn.Parameter] = set()
        for group in dict.fromkeys(sharing.values()):
            shared = [parameter for parameter in self._group_of if sharing[parameter] is group]
            takers = deal([parameter.numel() for parameter in shared], dist.get_world_size(group))
            saved |= {p for p, taker in zip(shared, takers, strict=True) if taker == dist.get_rank(group)}
        return saved

    def sharded_like(self, parameter: nn.Parameter, tensor: Any, is_loading: bool) -> Any:
        """Give megatron's sharded ``tensor`` of a parameter as that of what this rank has of it.

        Of the ranks that have one for a parameter a single one counts: who saves it, and who reads its beginning.
        """
        owned = self.own_piece(parameter)
        first = self.saves(parameter) if not is_loading else owned is not None and owned.start == 0
        return replace(tensor, replica_id=(*tensor.replica_id[:-1], 0)) if first else tensor

    def set_main_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set this rank's piece of a parameter's fp32 weights, if it has one."""
        for _, _, pieces in self._buckets():
            if (ranges := pieces.get(parameter)) is not None:
                piece = whole.reshape(-1)[ranges["param"].start : ranges["param"].end]
                self._get_main_param_and_optimizer_states(parameter)[MAIN].copy_(piece)

    def _buckets(self) -> Iterator[tuple[Any, int, dict[nn.Parameter, dict[str, Any]]]]:
        """(buffer, bucket's number, parameter -> ranges of the piece of it that this rank owns)."""
        for buffer, by_dtype in zip(self.buffers, self.gbuf_ranges, strict=True):
            for index, ranges in enumerate(chain.from_iterable(by_dtype.values())):
                yield buffer, index, ranges["param_map"]

    # -- checkpoints: in the form of the unsharded optimizer ----------------------------------------------------------

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **unused: Any
    ) -> dict[str, Any]:
        """State for megatron's dist_checkpointing, of whole parameters on the CPU. Collective.

        Of those that this rank ``saves``, or for loading of those that it owns a piece of.
        """
        parameters, steps = list(chain.from_iterable(self._groups)), self.updates
        moments = MOMENTS if is_loading or steps else ()
        keys = (*moments, MAIN) if self.config.bf16 else moments
        found: dict[str, dict[nn.Parameter, Tensor]]
        if is_loading:
            self.init_state_fn(self.optimizer)
            mine = [parameter for parameter in parameters if parameter in self.model_param_gbuf_map]
            found = {key: {p: torch.empty(p.shape, dtype=torch.float32) for p in mine} for key in keys}
        else:
            mine = [parameter for parameter in parameters if self.saves(parameter)]
            found = {
                key: {p: value.to("cpu", copy=True) for p, value in self._gathered(key) if self.saves(p)}
                for key in keys
            }
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        tensors = get_param_id_to_sharded_param_map(model_sharded_state_dict, parameters)
        for parameter, number in numbers.items():
            tensors[number] = self.sharded_like(parameter, tensors[number], is_loading)
        groups = [
            {**settings, "params": [numbers[p] for p in group]}
            for settings, group in zip(self.optimizer.param_groups, self._groups, strict=True)
        ]
        state: dict[Any, Any] = {numbers[p]: {key: found[key][p] for key in moments} for p in mine}
        inner: dict[str, Any] = {"state": state, "param_groups": groups}
        optim_state_to_sharding_state(inner, tensors)
        if steps:
            inner["state"]["common_step"] = torch.tensor(float(steps))
        if not self.config.bf16:
            return inner
        main = {
            numbers[p]: make_sharded_optimizer_tensor(tensors[numbers[p]], value, "optimizer.state.fp32_param")
            for p, value in found[MAIN].items()
        }
        return {"optimizer": inner, "main": main}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's pieces out of whole parameters, as ``sharded_state_dict`` lays them out."""
        inner = state_dict["optimizer"] if self.config.bf16 else state_dict
        found: dict[nn.Parameter, dict[str, Tensor]] = {}
        for number, parameter in enumerate(chain.from_iterable(self._groups)):
            if parameter in self.model_param_gbuf_map:
                found[parameter] = dict(inner["state"][number])
                if self.config.bf16:
                    found[parameter][MAIN] = state_dict["main"][number]
        step = float(inner["state"]["common_step"])
        self.updates = int(step)
        for _, _, pieces in self._buckets():
            for parameter, ranges in pieces.items():
                mine = self._get_main_param_and_optimizer_states(parameter)
                for key, value in found[parameter].items():
                    mine[key].copy_(value.view(-1)[ranges["param"].start : ranges["param"].end])
                mine["step"].fill_(step)
