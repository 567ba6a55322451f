"""Says where DeepSpeed's ZeRO stages keep each parameter's fp32 weights and optimizer state.

Every data-parallel rank owns, of each parameter, one run of its flattened elements (possibly none). Stages 1 and 2 (and
the optimizer that DeepSpeed takes for stage 1 under bf16) cut the concatenation of a group's parameters into equal
parts; stage 3 cuts each parameter. ``ZeroOptimizer`` hides the difference. "Whole" means of this tensor-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.distributed.collectives import gathered
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
        self._group = group
        held = [(optimizer, settings) for optimizer in optimizers for settings in optimizer.param_groups]
        self._held = {name: held[index] for name, index in group_of.items()}
        self._group_of = group_of
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._bf16 = any(p.dtype == torch.bfloat16 for p in module.parameters())
        self.sharded = hasattr(zero, "fp16_partitioned_groups_flat")
        """Stage 3: the model's weights are partitioned too."""
        locate = self._locate_in_parameter if self.sharded else self._locate_in_group
        self.fragments = {name: locate(name, p) for name, p in self._parameters.items()}
        for optimizer in optimizers:
            if isinstance(optimizer, FlatMatrices):
                optimizer.place(self._matrices(optimizer), group)

    def _matrices(self, optimizer: torch.optim.Optimizer) -> list[Matrix]:
        """Return where the parameters of ``optimizer`` lie; collective."""
        names = [name for name, (holder, _) in self._held.items() if holder is optimizer]
        fragments = [self.fragments[name] for name in names]
        numels = torch.tensor([f.numel for f in fragments], device=fragments[0].flat.device)
        counts = torch.stack(gathered(numels, self._group, dist.get_world_size(self._group)), 1).tolist()
        return [
            Matrix(self._parameters[name], self.shape(name), fragment.flat, fragment.offset, count)
            for name, fragment, count in zip(names, fragments, counts, strict=True)
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
        """Each parameter's group, step and, whole, what the update operator needs; collective."""
        steps = self.steps()
        found = []
        for name in self._parameters:
            state = {"step": torch.tensor(float(steps))} if steps else {}
            if steps and (keys := self.keys(name)):
                state[keys[-1]] = self.whole(name, keys[-1])
            found.append(ParameterState(name, *self._held[name], state))
        return found

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
        start = min(dist.get_rank(self._group) * size, parameter.ds_numel)
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
        states = list(self._zero.optimizer.state.values())
        counted = [int(state["step"]) for state in states if "step" in state]
        return max(counted) if counted else int(any(states))

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
        dist.all_reduce(whole, group=self._group)  # each element is owned by one rank, the others add zero
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

    def shards(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Stage 3: (numel,) view of this rank's fragment of the model's own weights (see ``regather``)."""
        return {n: self._parameters[n].ds_tensor.detach().narrow(0, 0, self.fragments[n].numel) for n in names}

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
