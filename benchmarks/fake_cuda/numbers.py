"""Remembers the numbers of small fake tensors, so that code which reads them off the device runs as it is."""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.fake_cuda.operation import Operation
from megaopus.selection.candidates import tensors_of

aten = torch.ops.aten
MOST = 64
"""Elements of a tensor whose numbers are kept."""


class Numbers:
    """Does what is done to small fake tensors of known numbers to real ones on the CPU as well.

    Known are those that Python made (``torch.tensor``, ``zeros``, ``arange``) and what follows from them alone. A
    collective leaves them as they are: the other ranks are thought to say what this one does.
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lost: dict[int, UntypedStorage] = {}
        """Storages into which something unknown was written, kept so that no other takes their place."""

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return a real tensor with the numbers of a fake one; None: they are not known."""
        found = self._known.get(tensor)
        return None if found is None or found.untyped_storage()._cdata in self._lost else found

    def follow(self, operation: Operation) -> None:
        """Take note of an operation on fake tensors."""
        func, given, made = operation.func, operation.given, operation.made
        if func.namespace == "c10d":
            if func is torch.ops.c10d._allgather_base_.default and (own := self.of(operation.args[1])) is not None:
                with _disable_current_modes():
                    self._known[operation.args[0]] = own.repeat(operation.args[0].numel() // own.numel())
            return
        if func is aten.lift_fresh.default and not isinstance(given[0], FakeTensor):  # a list became a tensor
            if given[0].numel() <= MOST:
                self._known[operation.result] = given[0]
            return
        known = all(self.of(each) is not None for each in given) and not operation.schema.random
        if known and operation.schema.written:
            self._repeat(operation)
        elif known and made and not operation.schema.name.startswith("empty"):
            if all(each.numel() <= MOST for each in made):
                self._repeat(operation)
        else:
            for each in operation.written():
                if (lost := self._known.get(each)) is not None:
                    self._lost[lost.untyped_storage()._cdata] = lost.untyped_storage()

    def nonzero(self, tensor: Tensor) -> Tensor | None:
        """``tensor.nonzero()``, real; None where the numbers are not known."""
        known = self.of(tensor)
        if known is None:
            return None
        with _disable_current_modes():
            return known.nonzero()

    def learn(self, tensor: Tensor, numbers: Tensor) -> Tensor:
        """Say which numbers a fake tensor has; gives it."""
        self._known[tensor] = numbers
        return tensor

    def _repeat(self, operation: Operation) -> None:
        with _disable_current_modes():
            here = {key: torch.device("cpu") if key == "device" else value for key, value in operation.kwargs.items()}
            args, here = tree_map_only(Tensor, self.of, (operation.args, here))
            real = list(tensors_of(operation.func(*args, **here)))
        for fake, number in zip(operation.made, real, strict=True):
            if self._known.get(fake) is not number:
                self._known[fake] = number
