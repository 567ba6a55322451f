"""Counts the bytes of one device's tensors, fake or real, and tells what was alive when there were most."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaopus.selection.candidates import tensors_of

aten = torch.ops.aten
BLOCK = 512
"""CUDA's allocator hands out multiples of this many bytes."""
OURS = Path(__file__).parents[2] / "megaopus"


class DeviceMeter(TorchDispatchMode):
    """Context manager: ``bytes`` alive now and ``peak`` of tensors on ``device``, each storage counted once.

    Reads of fake values to the host are answered: numbers are 1, ``any``, ``all`` and ``<`` are true, ``>`` is false,
    as of gradients that are finite and utilities that differ; a mask takes all. Not seen: what kernels take inside
    themselves, but for ``_inside``.
    """

    def __init__(self, device: str, trace: bool = False):
        """``trace``: remember which operation and line made each tensor, for ``at_peak``."""
        super().__init__()
        self.bytes = self.peak = 0
        self.at_peak: Counter[tuple[str, str]] = Counter()
        """(operation, line of ours or of megatron) -> bytes alive at the peak."""
        self._device, self._trace = device, trace
        self._alive: dict[int, tuple[weakref.ref[UntypedStorage], int, tuple[str, str]]] = {}
        self._true: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._block = BLOCK if device == "cuda" else 1

    def reset_peak(self) -> None:
        """Begin anew with what is alive now."""
        self.peak = self.bytes
        self.at_peak.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls: autograd asks
            return _device_of(args[0])
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._answer(args[0])
        if func is aten.index.Tensor and any(each is not None and each.dtype == torch.bool for each in args[1]):
            func, args = aten.clone.default, (args[0],)  # a mask of what is finite: all is
        given = {tensor.untyped_storage()._cdata for tensor in self._tensors((args, kwargs))}
        result = func(*args, **kwargs)
        self._reached(self.bytes + _inside(func, args))
        for tensor in self._tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._alive:  # neither a view nor in place
                self._count(storage, func)
        if func in (aten.any.default, aten.all.default, aten.lt.Tensor):
            self._true.add(result)
        return result

    def _tensors(self, tree: Any) -> list[Tensor]:
        return [t for t in tensors_of(tree) if t.layout == torch.strided and _device_of(t).type == self._device]

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
        if value.dtype == torch.bool:
            return any(value is each or value._base is each for each in self._true)
        return 1.0 if value.dtype.is_floating_point else 1


def _device_of(tensor: Tensor) -> torch.device:
    """As ``tensor.device`` says, which asks every mode in turn for a fake tensor's."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


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
    return 4 * query.numel() + copies


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
