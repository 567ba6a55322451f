"""Where DeepSpeed's ZeRO stages keep each parameter's fp32 weights and optimizer state.

Every data-parallel rank owns, of each parameter, one run of its flattened elements (possibly none). Stages 1 and 2 (and
the optimizer that DeepSpeed takes for stage 1 under bf16) cut the concatenation of a group's parameters into equal
parts; stage 3 cuts each parameter. ``ZeroOptimizer`` hides the difference. "Whole" means of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.optim.build import ParameterState, set_lr

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of the size of the weights."""


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
    """The fp32 weights and optimizer state under ZeRO, by parameter name, as ``optim.build.MainOptimizer`` offers them.

    ``optimizer``: what ``deepspeed.initialize`` made of a torch optimizer; ``group_of``: parameter name -> index of its
    group. Methods marked collective are called by every data-parallel rank, in the same order.
    """

    def __init__(self, optimizer: Any, module: nn.Module, group_of: Mapping[str, int], group: dist.ProcessGroup):
        self._zero = optimizer
        self._group = group
        self._group_of = group_of
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._bf16 = any(p.dtype == torch.bfloat16 for p in module.parameters())
        self.sharded = hasattr(optimizer, "fp16_partitioned_groups_flat")
        """Stage 3: the model's weights are partitioned too."""
        locate = self._locate_in_parameter if self.sharded else self._locate_in_group
        self.fragments = {name: locate(p) for name, p in self._parameters.items()}

    @property
    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW over this rank's flat fp32 weights."""
        return [self._zero.optimizer]

    def set_lr(self, factor: float) -> float:
        """Set every group's learning rate to its peak times ``factor``; returns the first group's."""
        return set_lr(self.torch_optimizers, factor)

    def main_weights(self) -> dict[str, Tensor]:
        """The whole fp32 weights: the parameters themselves where they are that, else copies (collective)."""
        if self.sharded or self._bf16:
            return {name: self.whole(name) for name in self._parameters}
        return dict(self._parameters)

    def states(self) -> list[ParameterState]:
        """Each parameter's group, step and whole second moment; collective."""
        steps, optimizer = self.steps(), self._zero.optimizer
        found = []
        for name in self._parameters:
            state = {"step": torch.tensor(float(steps)), "exp_avg_sq": self.whole(name, "exp_avg_sq")} if steps else {}
            found.append(ParameterState(name, optimizer, optimizer.param_groups[self._group_of[name]], state))
        return found

    def shape(self, name: str) -> torch.Size:
        """Shape of the parameter, also while it is partitioned."""
        parameter = self._parameters[name]
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def zeros(self, name: str) -> Tensor:
        """A whole fp32 tensor of zeros for the parameter."""
        return torch.zeros(self.shape(name), device=self.fragments[name].flat.device)

    def _locate_in_parameter(self, parameter: Any) -> Fragment:
        zero = self._zero
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = min(dist.get_rank(self._group) * size, parameter.ds_numel)
        numel = min(size, parameter.ds_numel - start)  # the last ranks' parts are filled up with padding
        return Fragment(start, numel, zero.fp32_partitioned_groups_flat[group], offset)

    def _locate_in_group(self, parameter: Any) -> Fragment:
        zero, place = self._zero, parameter._hp_mapping
        flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        if place is None:
            return Fragment(0, 0, flats[0], 0)
        owned, address = place.lp_fragment_address, place.hp_fragment_address
        return Fragment(owned.start, owned.numel, flats[place.param_group_index], address.start)

    # -- reading ----------------------------------------------------------------------------------------------------

    def steps(self) -> int:
        """Updates that the optimizer's state has seen."""
        found = [int(state["step"]) for state in self._zero.optimizer.state.values() if "step" in state]
        return max(found, default=0)

    def local(self, name: str, key: str) -> Tensor:
        """(numel,) view of this rank's fragment: of the weights (key 'weight') or of one of MOMENTS."""
        fragment = self.fragments[name]
        if key == "weight":
            return fragment.of(fragment.flat)
        return fragment.of(self._state(fragment.flat)[key])

    def whole(self, name: str, key: str = "weight") -> Tensor:
        """The parameter's fp32 weights, or one of MOMENTS, in its shape; collective."""
        whole = self.zeros(name)
        self.fragments[name].cut(whole).copy_(self.local(name, key))
        dist.all_reduce(whole, group=self._group)  # each element is owned by one rank, the others add zero
        return whole

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        """The torch optimizer's state of ``flat``, made of zeros if there has been no update."""
        state = self._zero.optimizer.state[flat]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS})
        return state

    # -- writing ----------------------------------------------------------------------------------------------------

    def set_steps(self, steps: int) -> None:
        """Set the number of updates behind the state."""
        for flat in {id(f.flat): f.flat for f in self.fragments.values()}.values():
            self._state(flat)["step"].fill_(steps)

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
