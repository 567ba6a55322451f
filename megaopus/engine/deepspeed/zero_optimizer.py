"""Says where DeepSpeed's ZeRO stages keep each parameter's fp32 weights and optimizer state.

Every data-parallel rank owns, of each parameter, one run of its flattened elements (possibly none). Stages 1 and 2 (and
the optimizer that DeepSpeed takes for stage 1 under bf16) cut the concatenation of a group's parameters into equal
parts; stage 3 cuts each parameter. ``ZeroOptimizer`` hides the difference. "Whole" means of this tensor-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.distributed.shards import gathered
from megaopus.engine.deepspeed.flat_matrices import FlatMatrices, Matrix
from megaopus.optim.build import ParameterState, counts_steps, set_step, state_names


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``start`` to ``start + numel`` of a flattened parameter, as this rank owns them."""

    start: int
    numel: int
    flat: Tensor
    """What the torch optimizer holds: fp32 weights of many fragments, one after the other."""
    offset: int
    """Of this fragment in ``flat``."""

    def of(self, flat: Tensor) -> Tensor:
        """(numel,) view of this fragment in ``flat``, or in a state tensor of its size."""
        return flat.detach().narrow(0, self.offset, self.numel)

    def cut(self, whole: Tensor) -> Tensor:
        """(numel,) elements of a whole parameter (any shape) that belong to this fragment."""
        return whole.reshape(-1).narrow(0, self.start, self.numel)


class ZeroOptimizer:
    """Finds fp32 weights and optimizer state under ZeRO by parameter name, as ``MixedPrecisionOptimizer`` does without.

    ``zero``: what ``deepspeed.initialize`` made of ``optimizers``; ``group_of``: parameter name -> index of its group
    among all of theirs. Methods marked collective are called by every data-parallel rank, in the same order.
    """

    def __init__(
        self,
        zero: Any,
        optimizers: Sequence[torch.optim.Optimizer],
        module: nn.Module,
        group_of: Mapping[str, int],
        group: dist.ProcessGroup,
    ):
        self._zero = zero
        self.torch_optimizers = optimizers
        """AdamW, or Muon and AdamW, over this rank's flat fp32 weights."""
        self.group = group
        held = [(optimizer, settings) for optimizer in optimizers for settings in optimizer.param_groups]
        self._held = {name: held[index] for name, index in group_of.items()}
        self._group_of = group_of
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._bf16 = any(p.dtype == torch.bfloat16 for p in module.parameters())
        self.sharded = hasattr(zero, "fp16_partitioned_groups_flat")
        """Stage 3: the model's weights are partitioned too."""
        locate = self._locate_in_parameter if self.sharded else self._locate_in_group
        self._steps: int | None = None
        self.fragments = {name: locate(name, p) for name, p in self._parameters.items()}
        self._runs = self._find_runs()
        for optimizer in optimizers:
            if isinstance(optimizer, FlatMatrices):
                optimizer.place(self._matrices(optimizer), group)

    def _find_runs(self) -> dict[str, list[tuple[int, int]]]:
        """Parameter -> (start, numel) of every data-parallel rank's fragment; collective."""
        own = torch.tensor([(f.start, f.numel) for f in self.fragments.values()], device=self._device)
        everyone = torch.stack(gathered(own, self.group, dist.get_world_size(self.group)), 1).tolist()
        return {
            name: [(start, numel) for start, numel in runs] for name, runs in zip(self.fragments, everyone, strict=True)
        }

    @property
    def _device(self) -> torch.device:
        return next(iter(self.fragments.values())).flat.device

    def _matrices(self, optimizer: torch.optim.Optimizer) -> list[Matrix]:
        """Return where the parameters of ``optimizer`` lie."""
        names = [name for name, (holder, _) in self._held.items() if holder is optimizer]
        return [
            Matrix(
                name,
                self._parameters[name],
                self.shape(name),
                self.fragments[name].flat,
                self.fragments[name].offset,
                [numel for _, numel in self._runs[name]],
            )
            for name in names
        ]

    def set_step(self, step: int, factor: float) -> float:
        """As ``optim.build.set_step``."""
        return set_step(self.torch_optimizers, step, factor)

    def main_weights(self) -> dict[str, Tensor]:
        """The whole fp32 weights: the parameters themselves where they are that, else copies (collective)."""
        if self.sharded or self._bf16:
            return {name: self.whole(name) for name in self._parameters}
        return dict(self._parameters)

    @torch.no_grad()
    def set_main_weights(self, names: Mapping[str, str], start: Callable[[str, nn.Parameter], Tensor]) -> None:
        """As ``MixedPrecisionOptimizer.set_main_weights``."""
        for name, parameter in self._parameters.items():
            fragment = self.fragments[name]
            piece = fragment.cut(start(names[name], parameter))
            fragment.flat.narrow(0, fragment.offset, fragment.numel).copy_(piece)

    def states(self) -> list[ParameterState]:
        """Each parameter's group, step and this rank's run of what the update operator needs."""
        steps, found = self.steps(), []
        for name in self._parameters:
            state = {"step": torch.tensor(float(steps))} if steps else {}
            if steps and (keys := self.keys(name)):
                state[keys[-1]] = self.local(name, keys[-1])
            found.append(ParameterState(name, *self._held[name], state))
        return found

    def matrices(self) -> list[Matrix]:
        """Those whose update is that of the whole matrix, in the order in which ranks take turns with them."""
        return [m for each in self.torch_optimizers if isinstance(each, FlatMatrices) for m in each.matrices()]

    def updated(self) -> None:
        """Say that there was an update, so that its number need not be read off the device."""
        if self._steps is not None:
            self._steps = self._steps + 1 if self._counts() else 1

    def held(self, name: str) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        """Return which optimizer updates a parameter, and by which settings."""
        return self._held[name]

    def keys(self, name: str) -> tuple[str, ...]:
        """Return what the optimizer keeps of the size of the parameter."""
        return state_names(self._held[name][0])

    def shape(self, name: str) -> torch.Size:
        """Shape of the parameter, also while it is partitioned."""
        parameter = self._parameters[name]
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def zeros(self, name: str) -> Tensor:
        """A whole fp32 tensor of zeros for the parameter."""
        return torch.zeros(self.shape(name), device=self.fragments[name].flat.device)

    def _locate_in_parameter(self, name: str, parameter: Any) -> Fragment:
        zero = self._zero
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = min(dist.get_rank(self.group) * size, parameter.ds_numel)
        numel = min(size, parameter.ds_numel - start)  # the last ranks' parts are filled up with padding
        return Fragment(start, numel, zero.fp32_partitioned_groups_flat[group], offset)

    def _locate_in_group(self, name: str, parameter: Any) -> Fragment:
        zero, place = self._zero, parameter._hp_mapping
        flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        flat = flats[self._group_of[name]]
        if place is None:
            return Fragment(0, 0, flat, 0)
        owned, address = place.lp_fragment_address, place.hp_fragment_address
        return Fragment(owned.start, owned.numel, flat, address.start)

    # -- reading ----------------------------------------------------------------------------------------------------

    def steps(self) -> int:
        """Updates that the optimizer's state has seen; where it does not count them, 1 for any number."""
        if self._steps is None:
            states = list(self._zero.optimizer.state.values())
            counted = [int(state["step"]) for state in states if "step" in state]
            self._steps = max(counted) if counted else int(any(states))
        return self._steps

    def _counts(self) -> bool:
        return any(counts_steps(optimizer) for optimizer in self.torch_optimizers)

    def local(self, name: str, key: str) -> Tensor:
        """(numel,) view of this rank's fragment: of the weights (key 'weight') or of one of ``keys``."""
        fragment = self.fragments[name]
        return fragment.of(fragment.flat if key == "weight" else self._state(name)[key])

    def own_gradient(self, name: str) -> Tensor | None:
        """(numel,) this rank's fragment of the reduced gradient, fp32, before the update; None: it has none of it."""
        from deepspeed.utils import safe_get_local_grad

        fragment, parameter = self.fragments[name], self._parameters[name]
        if not fragment.numel:
            return None
        if self.sharded:
            return safe_get_local_grad(parameter).narrow(0, 0, fragment.numel)
        found = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).reshape(-1)
        return found if found.numel() == fragment.numel else fragment.cut(found)  # under bf16 every rank has all of it

    def whole(self, name: str, key: str = "weight") -> Tensor:
        """The parameter's fp32 weights, or one of its ``keys``, in its shape; collective."""
        whole = self.zeros(name)
        self.fragments[name].cut(whole).copy_(self.local(name, key))
        dist.all_reduce(whole, group=self.group)  # each element is owned by one rank, the others add zero
        return whole

    def _state(self, name: str) -> dict[str, Tensor]:
        """The torch optimizer's state of the parameter's flat weights, made of zeros if there has been no update."""
        flat, optimizer = self.fragments[name].flat, self._held[name][0]
        state = optimizer.state[flat]
        if not state:
            state.update({key: torch.zeros_like(flat, requires_grad=False) for key in self.keys(name)})
            if counts_steps(optimizer):
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state

    # -- writing ----------------------------------------------------------------------------------------------------

    def set_steps(self, steps: int) -> None:
        """Set the number of updates behind the state."""
        self._steps = steps
        for state in map(self._state, self.fragments):
            if "step" in state:
                state["step"].fill_(steps)

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the model the fp32 weights, rounded to its own precision; collective."""
        if not self.sharded:
            self._zero.update_lp_params()
            return
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self.regather()

    def model_run(self, name: str) -> Tensor:
        """(numel,) view of this rank's fragment of the model's own weights (see ``gather_weights``)."""
        fragment, parameter = self.fragments[name], self._parameters[name]
        own = parameter.ds_tensor.view(-1) if self.sharded else parameter.detach().view(-1)
        start = 0 if self.sharded else fragment.start
        return own.detach().narrow(0, start, fragment.numel)

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Give all ranks the model's own weights as each has them in its fragments; collective."""
        if self.sharded:
            self.regather()
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self._zero
        is_bf16_optimizer = hasattr(zero, "bf16_groups_flat")
        all_gather_dp_groups(
            groups_flat=zero.bf16_groups_flat if is_bf16_optimizer else zero.bit16_groups_flat,
            partitioned_param_groups=(
                zero.bf16_partitioned_groups if is_bf16_optimizer else zero.parallel_partitioned_bit16_groups
            ),
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    @contextmanager
    def reduced(self) -> Iterator[dict[str, Tensor]]:
        """Add up, inside, what backward passes find of each parameter's gradient, over all ranks, in this rank's run.

        Yields parameter -> (numel,) fp32. A gradient is reduced as soon as it is there, and gone then: what
        ``autograd.grad`` returns is zeros without memory. Collective, and so are the passes.
        """
        total = {
            name: torch.zeros(fragment.numel, device=fragment.flat.device) for name, fragment in self.fragments.items()
        }
        handles = [
            parameter.register_hook(partial(self._reduce, name, total[name]))
            for name, parameter in self._parameters.items()
        ]
        try:
            yield total
        finally:
            for handle in handles:
                handle.remove()

    def _reduce(self, name: str, total: Tensor, gradient: Tensor) -> Tensor:
        """Add this rank's run of a gradient, summed over the ranks, to ``total``; zeros of no memory take its place."""
        whole, fragment, size = gradient.float().reshape(-1), self.fragments[name], dist.get_world_size(self.group)
        if self.sharded:
            each = self._parameters[name].ds_tensor.numel()
            padded = torch.nn.functional.pad(whole, (0, each * size - len(whole)))
            own = padded.new_empty(each)
            dist.reduce_scatter_tensor(own, padded, group=self.group)
            total += own[: fragment.numel]
        else:
            for rank, (start, numel) in enumerate(self._runs[name]):
                if numel:
                    part = whole[start : start + numel].contiguous()
                    dist.reduce(part, group_dst=rank, group=self.group)
                    if rank == dist.get_rank(self.group):
                        total += part
        return gradient.new_zeros(()).expand(gradient.shape)

    @torch.no_grad()
    def regather(self) -> None:
        """Stage 3: bring the parameters that stay whole on every rank up to date with their parts; collective."""
        self._zero._partition_all_parameters()
        if kept := self._zero.persistent_parameters:
            kept[0].all_gather(kept)


@contextmanager
def norm_limit(zero: Any, limit: float) -> Iterator[list[float]]:
    """A step inside skips the update, in DeepSpeed's own way, if the gradient norm is above ``limit``.

    Yields a list whose item is the norm once the step is done; nan if DeepSpeed found a gradient that is not finite.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    seen = [math.nan]

    def exceeds(norm: Any) -> bool:
        value = float(norm)
        seen[0] = value if math.isfinite(value) and value >= 0 else math.nan
        return not value <= limit

    def groups() -> Any:
        norms = original()
        return [torch.tensor(math.inf)] if exceeds(combine_grad_norm_groups(norms)) else norms

    def norm_of_all(*args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        return torch.tensor(math.inf) if exceeds(norm) else norm

    def gradients(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if kwargs.get("for_clipping"):
            return found
        norm = get_global_norm_of_tensors(input_tensors=found[0], mpu=zero.mpu, norm_type=zero.norm_type)
        return ([torch.full((1,), math.inf, device=found[0][0].device)], found[1]) if exceeds(norm) else found

    # Each stage takes the norm in a place of its own, and an infinite one as a reason to skip.
    hooks = {"_get_norm_groups": groups, "scaled_global_norm": norm_of_all, "get_grads_for_norm": gradients}
    name = next(name for name in hooks if hasattr(zero, name))
    original = getattr(zero, name)
    setattr(zero, name, hooks[name])
    try:
        yield seen
    finally:
        delattr(zero, name)
