"""Counts the bytes of one device's tensors, fake or real, and has what runs there counted (``work.Work``)."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.fake_cuda.numbers import Numbers
from benchmarks.fake_cuda.operation import Operation, device_of
from benchmarks.fake_cuda.work import OURS, Work, query_sums
from megaopus.selection.candidates import tensors_of

aten = torch.ops.aten
BLOCK = 512
"""CUDA's allocator hands out multiples of this many bytes."""


class DeviceMeter(TorchDispatchMode):
    """Context manager: ``bytes`` alive now and ``peak`` of tensors on ``device``, each storage counted once.

    Reads of fake values to the host are answered: as they are where ``Numbers`` knows them, else numbers are 1,
    ``any``, ``all`` and ``<`` are true, ``>`` is false, as of gradients that are finite and utilities that differ; a
    mask takes all; loads of experts are even. Not seen: what kernels take inside themselves, but for ``_inside``.
    """

    def __init__(self, device: str, trace: bool = False):
        """``trace``: remember which operation and line made each tensor, for ``at_peak``."""
        super().__init__()
        self.bytes = self.peak = 0
        self.at_peak: Counter[tuple[str, str]] = Counter()
        """(operation, line of ours or of megatron) -> bytes alive at the peak."""
        self.work = Work()
        """What ran on a CUDA device; to be replaced by another to begin anew."""
        self._numbers = Numbers()
        self._device, self._trace = device, trace
        self._alive: dict[int, tuple[weakref.ref[UntypedStorage], int, tuple[str, str]]] = {}
        self._true: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._block = BLOCK if device == "cuda" else 1
        self._in_kernel = False
        self._maps: dict[int, int] = {}
        """Elements of a map of tokens to experts -> how many of them are true."""

    def routed(self, chosen: Tensor, each: int) -> None:
        """Take note of a map of tokens to experts (M, E): ``each`` of a token are true, and of an expert as many."""
        self._maps[chosen.numel()] = len(chosen) * each

    def reset_peak(self) -> None:
        """Begin anew with what is alive now."""
        self.peak = self.bytes
        self.at_peak.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_kernel:
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # half of all calls: autograd asks
            return device_of(args[0])
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self._asked(args[0])
            return self._answer(args[0])
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
            return self._nonzero(args[0])
        if func is aten.equal.default and isinstance(args[0], FakeTensor):
            self._asked(args[0])
            return True
        if func is aten.index.Tensor and any(each is not None and each.dtype == torch.bool for each in args[1]):
            self._asked(args[0])
            func, args = aten.clone.default, (args[0],)  # a mask of what is finite: all is
        given = list(tensors_of((args, kwargs)))
        there = {tensor.untyped_storage()._cdata for tensor in self._there(given)}
        result = func(*args, **kwargs)
        made = list(tensors_of(result))
        if func is aten.sum.dim_IntList and args[0].dtype == torch.bool and args[0].numel() in self._maps:
            self._spread(result, self._maps[args[0].numel()])
        self._reached(self.bytes + _inside(func, args))
        self._count_new(made, there, func)
        if func in (aten.any.default, aten.all.default, aten.lt.Tensor):
            self._true.add(result)
        if self._device == "cuda":
            operation = Operation(func, args, kwargs, given, result, made)
            self.work.operation(operation)
            self._numbers.follow(operation)
        return result

    def one_kernel(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` as what torch.compile makes of it would run: what it is given is read once, and so on.

        One kernel, whose own values are not in memory; an estimate, and the least, where torch makes several.
        """
        if self._in_kernel:  # torch.compile makes one kernel of what a function calls, too
            return function(*args, **kwargs)
        given = list(tensors_of((args, kwargs)))
        there = {tensor.untyped_storage()._cdata for tensor in self._there(given)}
        self._in_kernel = True
        try:
            result = function(*args, **kwargs)
        finally:
            self._in_kernel = False
        made = list(tensors_of(result))
        self._count_new(made, there, function.__name__)
        if self._device == "cuda":
            self.work.compiled(function.__name__.lstrip("_"), [*given, *made])
        return result

    def tolist(self, tensor: Tensor) -> Any:
        """Give what ``tensor.tolist()`` gives: one read, of a tensor on the device, whatever it holds."""
        self._asked(tensor)
        numbers = self._numbers.of(tensor)
        if numbers is not None:
            with _disable_current_modes():
                return numbers.tolist()
        found: Any = self._answer(tensor)
        for size in reversed(tensor.shape):
            found = [found] * size
        return found

    def _asked(self, tensor: Tensor) -> None:
        if device_of(tensor).type == "cuda":
            self.work.asked(self.work.reads)

    def _nonzero(self, tensor: Tensor) -> Tensor:
        self._asked(tensor)
        numbers = self._numbers.nonzero(tensor)
        if numbers is None:  # all of them
            return torch.empty(tensor.numel(), tensor.ndim, dtype=torch.int64, device=device_of(tensor))
        made = torch.empty(numbers.shape, dtype=torch.int64, device=device_of(tensor))
        return self._numbers.learn(made, numbers)

    def _spread(self, counts: Tensor, total: int) -> None:
        assert total % counts.numel() == 0, "tokens do not spread evenly over experts"
        with _disable_current_modes():
            numbers = torch.full(counts.shape, total // counts.numel(), dtype=counts.dtype)
        self._numbers.learn(counts, numbers)

    def _there(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t for t in tensors if t.layout == torch.strided and device_of(t).type == self._device]

    def _count_new(self, made: list[Tensor], there: set[int], func: Any) -> None:
        """Count what is neither a view of what was ``there`` nor that itself, changed in place."""
        for tensor in self._there(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in there and storage._cdata not in self._alive:
                self._count(storage, func)

    def _count(self, storage: UntypedStorage, func: Any) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // self._block) * self._block
        label = (str(func), _line()) if self._trace else ("", "")

        def freed(_: Any) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = (weakref.ref(storage, freed), size, label)
        self.bytes += size
        self._reached(self.bytes)

    def _reached(self, total: int) -> None:
        if total <= self.peak:
            return
        self.peak = total
        if self._trace:
            self.at_peak = Counter()
            for _, size, label in self._alive.values():
                self.at_peak[label] += size

    def _answer(self, value: Tensor) -> bool | int | float:
        numbers = self._numbers.of(value)
        if numbers is not None and numbers.numel() == 1:
            with _disable_current_modes():
                return numbers.item()
        if value.dtype == torch.bool:
            return any(value is each or value._base is each for each in self._true)
        return 1.0 if value.dtype.is_floating_point else 1


def _inside(func: Any, args: Any) -> int:
    """Bytes that a kernel takes while it runs, where they are many.

    Flash attention's backward pass adds up the queries' gradient in fp32, and gives shared key/value heads one gradient
    for each query head before it sums them (flash_api.cpp, mha_bwd).
    """
    if func is not aten._scaled_dot_product_flash_attention_backward.default:
        return 0
    query, key = args[1], args[2]
    shared = key.shape[1] != query.shape[1]
    copies = 2 * query.shape[1] * key.numel() // key.shape[1] * key.element_size() if shared else 0
    return query_sums(query) + copies


def _line() -> str:
    """The innermost line of ours and of megatron-core that is running."""
    frame = sys._getframe(2)
    found: list[str] = []
    while frame is not None and len(found) < 2:
        name = frame.f_code.co_filename
        if (str(OURS) in name or "megatron/core" in name) and "fake_cuda" not in name:
            found.append(f"{Path(name).name}:{frame.f_lineno}")
            if str(OURS) in name:
                break
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)
