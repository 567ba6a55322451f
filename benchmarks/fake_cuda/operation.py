"""Says what an operation that ran on fake tensors was, and what it did to them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megaopus.selection.candidates import tensors_of


class Schema(NamedTuple):
    """Says what is to be known of an operation, whatever it is called with."""

    name: str
    free: bool
    """It runs no kernel: a view, an allocation, a question."""
    written: tuple[int, ...]
    """Places of the arguments that it changes."""
    random: bool


class Operation(NamedTuple):
    """A call of an operation: what it was given and gave, and the tensors in both."""

    func: Any
    args: Any
    kwargs: Any
    given: list[Tensor]
    result: Any
    made: list[Tensor]

    @property
    def schema(self) -> Schema:
        """Return what is known of such calls."""
        return _schema(self.func)

    def written(self) -> list[Tensor]:
        """The tensors that it changed."""
        return [each for place in self.schema.written for each in tensors_of(self.args[place : place + 1])]


@cache
def _schema(func: Any) -> Schema:
    name = func._schema.name.split("::")[1]
    aliases = [each.alias_info for each in func._schema.arguments]
    written = tuple(place for place, alias in enumerate(aliases) if alias is not None and alias.is_write)
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    makes = name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "lift_fresh", "record_stream", "set_")
    free = views or makes or func.namespace == "prim" or name.startswith(("sym_", "is_"))
    if name.startswith("_fused_adam"):
        written = tuple(place for place in written if place != 1)  # gradients, which only a scaler changes
    return Schema(name, free, written, torch.Tag.nondeterministic_seeded in func.tags)


def device_of(tensor: Tensor) -> torch.device:
    """As ``tensor.device`` says, which asks every mode in turn for a fake tensor's."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
