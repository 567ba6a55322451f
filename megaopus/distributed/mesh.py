"""Process group and the mesh of ranks: pp x dp x cp x tp, tensor-parallel ranks fastest.

Experts are spread over the ranks of a stage anew: dp x ep x tp of their own, tensor-parallel ranks fastest again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.cpu import cpu_mode, prepare_megatron
from megaopus.distributed.determinism import deterministic_torch, set_variables
from megaopus.distributed.launcher import place
from megaopus.distributed.shards import is_expert, part_of, whole_of
from megaopus.errors import EngineError

T = TypeVar("T")


class Coordinates(NamedTuple):
    """Says where a rank is along each axis of the mesh."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    """Says where a rank is along each axis of the mesh of experts."""

    expert_tp: int
    ep: int
    expert_dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Degrees of parallelism of a job; pure arithmetic, no process group."""

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.expert_tp * self.ep * self.pp)

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Give the place of a rank among those that share experts, in megatron-core's order, expert_tp fastest."""
        return ExpertCoordinates(*_along(rank, (self.expert_tp, self.ep, self.expert_dp, self.pp)))

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a rank in megatron-core's default order tp-cp-dp-pp, tp fastest."""
        return Coordinates(*_along(rank, (self.tp, self.cp, self.dp, self.pp)))


def _along(rank: int, degrees: Sequence[int]) -> Iterator[int]:
    """Yield the place of a rank along each of the axes, the fastest first."""
    for degree in degrees:
        yield rank % degree
        rank //= degree


class Mesh:
    """torch.distributed and megatron's process groups, alive between ``Mesh(...)`` and ``close()``.

    ``deterministic``: the same gives the same bits again, on CUDA too (``determinism``), of all that this process has
    torch do meanwhile. Raises ``EngineError`` if the world size is not a multiple of tp x cp x pp, or of what experts
    take of a stage, or the device is missing, ``ConfigError`` for what a launcher left over in the environment, or what
    there makes CUDA differ.
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        device: str = "auto",
        timeout_minutes: float = 10.0,
        deterministic: bool = False,
    ):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError("engine.device=cuda, but torch sees no CUDA device: use engine.device=cpu or auto")
        if dist.is_initialized():
            raise EngineError("a process group is already alive in this process: close the other Mesh first")
        self.rank, local_rank, world_size, launched = place()
        self.shape = MeshShape(
            world_size, parallel.tp, parallel.pp, parallel.cp, parallel.ep, parallel.derived_expert_tp()
        )
        _check_shape(self.shape)
        self.on_cpu, self.deterministic = device == "cpu", deterministic
        if deterministic and not self.on_cpu:
            set_variables(torch.cuda.is_initialized())
        self.device = torch.device("cpu") if self.on_cpu else _taken(local_rank)
        prepare_megatron(self.on_cpu)
        self._join(launched, timeout_minutes)
        from megatron.core import parallel_state

        with self.megatron():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tp,
                pipeline_model_parallel_size=parallel.pp,
                virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
                context_parallel_size=parallel.cp,
                expert_model_parallel_size=parallel.ep,
                expert_tensor_parallel_size=self.shape.expert_tp,
                distributed_timeout_minutes=timeout_minutes,  # else its groups wait 30 minutes
                create_gloo_process_groups=False,  # nothing uses them
            )
        self.dp_group = parallel_state.get_data_parallel_group()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.model_parallel_group = parallel_state.get_model_parallel_group()
        self.ep_group = parallel_state.get_expert_model_parallel_group()
        self.expert_tp_group = parallel_state.get_expert_tensor_parallel_group()
        self.expert_dp_group = parallel_state.get_expert_data_parallel_group()
        _, self.ep_rank, self.expert_dp_rank, _ = self.shape.expert_coordinates(self.rank)
        self.tp_rank, self.cp_rank, self.dp_rank, self.pp_rank = self.shape.coordinates(self.rank)
        groups = (self.tp_group, self.cp_group, self.dp_group, self.pp_group)
        assert tuple(dist.get_rank(group) for group in groups) == self.shape.coordinates(self.rank)
        groups = (self.expert_tp_group, self.ep_group, self.expert_dp_group, self.pp_group)
        assert tuple(dist.get_rank(group) for group in groups) == self.shape.expert_coordinates(self.rank)
        self._told_local_rank = not launched
        if not launched:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it wherever it is
        self._until_closed = ExitStack()
        if deterministic:
            self._until_closed.enter_context(deterministic_torch())

    def _join(self, launched: bool, timeout_minutes: float) -> None:
        """Make the process group of all ranks."""
        given: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
        if not launched:
            given |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if self.on_cpu:
            dist.init_process_group("gloo", **given)
        else:  # of a rank that names its device groups are made by splitting one, and no barrier guesses it
            dist.init_process_group("nccl", device_id=self.device, **given)

    def megatron(self) -> AbstractContextManager[None]:
        """Context in which megatron-core may be called."""
        return cpu_mode() if self.on_cpu else nullcontext()

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.shape.pp - 1

    def tensor_group(self, parameter: Tensor) -> dist.ProcessGroup:
        """Give the ranks that hold parts of a parameter, where it is split."""
        return self.expert_tp_group if is_expert(parameter) else self.tp_group

    def sharing_group(self, parameter: Tensor) -> dist.ProcessGroup:
        """Give the ranks that hold the same numbers of a parameter that is trained on what each of them reads."""
        return self.expert_dp_group if is_expert(parameter) else self.dp_cp_group

    def parts(self, parameter: Tensor) -> int:
        """Count those of its ``tensor_group``."""
        return self.shape.expert_tp if is_expert(parameter) else self.shape.tp

    def part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Cut this rank's part out of a tensor that ranks share as they do ``parameter``."""
        return part_of(whole, parameter, dist.get_rank(self.tensor_group(parameter)), self.parts(parameter))

    def whole(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Put the whole together of which ``part`` is this rank's. Collective where it is split."""
        return whole_of(part, parameter, self.tensor_group(parameter))

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on one."""
        return self.total(torch.tensor([float(flag)]))[0] > 0

    def to_device(self, values: Tensor) -> Tensor:
        """Copy ``values`` from the host to this rank's device, for which the host does not wait."""
        return values if self.on_cpu else values.pin_memory().to(self.device, non_blocking=True)

    def total(self, parts: Tensor) -> list[float]:
        """Sum ``parts`` (k,) of each rank over all ranks; one message, and one wait for the device."""
        parts = parts if parts.device == self.device else self.to_device(parts)
        if self.shape.world_size > 1:
            parts = parts.clone()
            dist.all_reduce(parts)
        return parts.tolist()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.shape.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.shape.world_size
        dist.all_gather_object(found, value)
        return found

    def close(self) -> None:
        """Destroy every process group, and let torch be as it was."""
        from megatron.core import parallel_state

        self._until_closed.close()
        if self._told_local_rank:
            os.environ.pop("LOCAL_RANK", None)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _taken(local_rank: int) -> torch.device:
    """Take this rank's GPU."""
    device = torch.device("cuda", _gpu_of(local_rank, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _gpu_of(local_rank: int, visible: int) -> int:
    """Say which GPU a rank takes: the only one that it sees, as where a launcher bound it, else that of its place."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise EngineError(
            f"rank {local_rank} of this node sees {visible} GPUs: launch as many processes a node as GPUs"
        )
    return local_rank


def _check_shape(shape: MeshShape) -> None:
    """Raise EngineError unless there are as many ranks as the layout takes, or a multiple."""
    taken = shape.tp * shape.cp * shape.pp
    if shape.world_size % taken:
        raise EngineError(
            f"{shape.world_size} ranks cannot be split into tp={shape.tp} x cp={shape.cp} x pp={shape.pp}: "
            f"launch a multiple of {taken} processes"
        )
    of_stage = shape.world_size // shape.pp
    if of_stage % (shape.ep * shape.expert_tp):
        raise EngineError(
            f"{of_stage} ranks of a stage cannot be split into ep={shape.ep} x expert_tp={shape.expert_tp}:"
            " change parallel.ep, or the number of processes"
        )
