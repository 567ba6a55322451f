"""Counts what a step asks of a CUDA device: kernels, reads by the host, waits, messages, FLOPs and bytes moved."""

from __future__ import annotations

import math
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_cuda import roofline
from megaopus.selection.candidates import tensors_of

aten = torch.ops.aten
OURS = Path(__file__).parents[2] / "megaopus"
THEIRS = ("megatron/core/", "deepspeed/")
_LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors that one multi-tensor kernel takes, by how many lists of them it has (torch: MultiTensorApply.cuh)."""
_CHUNK, _CHUNKS = 65536, 320
"""Elements of a piece of a tensor, and pieces that one multi-tensor kernel takes (the same file)."""
_KERNELS = {"_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_efficient_attention_backward": 2}
"""Operations of several kernels each; of any other one is counted, what libraries split off is not seen."""
_OVERWRITE = ("copy_", "zero_", "fill_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_")
"""Operations that do not read what they write to."""
_PICK = ("embedding", "index_select", "gather", "index", "nll_loss_forward")
"""Those that read no more of a tensor than they give."""
_SCATTER = ("index_add_", "index_put_", "scatter_add_", "embedding_dense_backward", "nll_loss_backward")
"""Those that write no more of a tensor than they are given; the last two write all of it first."""
_DEPENDENT = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount")
"""Those whose result the host must wait for."""


class _Known(NamedTuple):
    """What is to be known of an operation, whatever it is called with."""

    name: str
    free: bool
    """It runs no kernel: a view, an allocation, a question."""
    written: tuple[int, ...]
    """Places of the arguments that it changes."""


@cache
def known(func: Any) -> _Known:
    """Read off an operation's schema what it does to its arguments."""
    name = func._schema.name.split("::")[1]
    arguments = func._schema.arguments
    written = tuple(i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write)
    returns = func._schema.returns
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    makes = name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "lift_fresh", "record_stream", "set_")
    free = views or makes or func.namespace == "prim" or name.startswith(("sym_", "is_"))
    if name.startswith("_fused_adam"):
        written = tuple(place for place in written if place != 1)  # gradients, which only a scaler changes
    return _Known(name, free, written)


class Message(NamedTuple):
    """A kind of message: what is done, by which group of ranks, and how many they are."""

    kind: str
    group: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.kind} {self.group}/{self.ranks}"


class Work:
    """What was asked of the device since this was made.

    ``launches``: operation -> kernels, copies inside the device among them. ``reads``: function -> times that it had
    the host wait for a number (or all) of a tensor; ``waits``: the same of ``synchronize`` by what is waited for;
    ``copies_in``: function -> copies from the host's memory that it waited for. ``messages``: their number, ``sizes``:
    bytes of the tensor that they work on (of all ranks together where they gather or scatter), ``sent``: bytes that a
    rank sends by a ring. ``flops``: (kind, dtype) -> FLOPs. ``moved``: operation -> bytes read and written.
    ``seconds``: kind -> least seconds of an H100 (``roofline``).
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies_in: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        """File and line -> reads, waits and copies that were asked for there."""
        self.messages: Counter[Message] = Counter()
        self.sizes: Counter[Message] = Counter()
        self.sent: Counter[Message] = Counter()
        self.flops: Counter[tuple[str, torch.dtype]] = Counter()
        self.moved: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.to_device = 0
        """Bytes that came from the host's memory."""

    def kernels(self) -> int:
        """Kernels in all."""
        return sum(self.launches.values())

    def world_reductions(self) -> int:
        """Reductions over every rank of a job of several."""
        return sum(count for key, count in self.messages.items() if key.group == "world" and "reduce" in key.kind)

    def asked(self, counter: Counter[str], what: str = "") -> None:
        """Note that something running now made the host wait."""
        function, line = _asker()
        counter[f"{what} {function}".strip()] += 1
        self.lines[f"{what} {line}".strip()] += 1

    def operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operation that has run; one without a tensor of the device is none."""
        if func.namespace == "c10d":
            self._message(func, args)
            return
        about = known(func)
        given, made = list(tensors_of((args, kwargs))), list(tensors_of(result))
        on_device = [each for each in given if device_of(each).type == "cuda"]
        made_there = [each for each in made if device_of(each).type == "cuda"]
        if about.free or not (on_device or made_there):
            return
        _refuse_mixed(about.name, given, on_device)
        if about.name in ("_to_copy", "copy_") and self._between(args, kwargs, result):
            return
        if about.name in _DEPENDENT:
            self.asked(self.reads)
        if about.name.startswith("index") and any(device_of(each).type == "cpu" for each in given):
            self.asked(self.copies_in)
        if not any(each.numel() for each in on_device + made_there):
            return
        self.launches[about.name] += _count_kernels(about.name, args)
        moved = _moved(about, args, given, made)
        self.moved[about.name] += moved
        flops, kind, dtype = _flops(func, args, kwargs, result), "memory", torch.float32
        if flops:
            kind, dtype = ("attention" if "attention" in about.name else "products"), on_device[0].dtype
            self.flops[f"{kind}{' backward' if 'backward' in about.name else ''}", dtype] += flops
        self.seconds[kind] += roofline.kernel_seconds(flops, dtype, moved)

    def _between(self, args: Any, kwargs: Any, result: Any) -> bool:
        """Count a copy between the device and the host; False: it stays on the device."""
        target, source = (args[0], args[1]) if len(args) > 1 and isinstance(args[1], Tensor) else (result, args[0])
        to, of = device_of(target).type, device_of(source).type
        if to == of:
            return False
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if to == "cuda":
            self.to_device += _bytes(source)
            self.seconds["from the host"] += _bytes(source) / roofline.HOST_BYTES
            if waits:
                self.asked(self.copies_in)
        elif waits:
            self.asked(self.reads)
        return True

    def _message(self, func: Any, args: Any) -> None:
        kind = _MESSAGES[func._schema.name.split("::")[1]]
        boxed = next(each for each in args if isinstance(each, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        if kind == "barrier":
            self.asked(self.waits, "barrier")
            return
        if any(device_of(each).type != "cuda" for each in tensors_of(args)):
            raise RuntimeError(f"{kind} of a tensor that is not on the device: NCCL takes no other")
        if (count := group.size()) == 1:
            return
        size = max(sum(_bytes(each) for each in tensors_of(arg)) for arg in args[:2])
        ranks = dist.get_process_group_ranks(group)
        label = (group.group_desc or "other").removesuffix("_GROUP").lower()
        key = Message(kind, "world" if label in ("default_pg", "undefined") and count > 1 else label, count)
        sent = round(_SHARE.get(kind, lambda n: 1.0)(count) * size)
        self.messages[key] += 1
        self.sizes[key] += size
        self.sent[key] += sent
        self.seconds["messages"] += roofline.message_seconds(sent, ranks)


_MESSAGES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
}
_SHARE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "receive": lambda n: 0.0,
}
"""What a rank sends of a message by a ring, over its size; any other is sent once."""


def device_of(tensor: Tensor) -> torch.device:
    """As ``tensor.device`` says, which asks every mode in turn for a fake tensor's."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _bytes(tensor: Tensor) -> int:
    """Of what a tensor sees, each element that it repeats once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _refuse_mixed(name: str, given: list[Tensor], on_device: list[Tensor]) -> None:
    """Raise RuntimeError for what CUDA refuses and fake tensors let through: lists of both devices."""
    if not name.startswith(("_foreach", "_fused")) or len(on_device) == len(given):
        return
    if name.startswith("_fused") or any(each.ndim and device_of(each).type == "cpu" for each in given):
        raise RuntimeError(f"{name} is given tensors of the device and of the host together")


def _count_kernels(name: str, args: Any) -> int:
    if not name.startswith(("_foreach", "_fused")):
        return _KERNELS.get(name, 1)
    lists = [each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor)]
    pieces = sum(math.ceil(each.numel() / _CHUNK) for each in lists[0])
    each_takes = _LISTS[min(5, max(1, len([one for one in lists if len(one) == len(lists[0])])))]
    more = 1 if name == "_foreach_norm" else 0  # which puts the pieces' norms together
    return max(1, math.ceil(pieces / _CHUNKS), math.ceil(len(lists[0]) / each_takes)) + more


def _moved(about: _Known, args: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that a kernel reads and writes, each once."""
    written = [each for place in about.written if place < len(args) for each in tensors_of(args[place])]
    ours = {id(each) for each in written}
    fresh = sum(_bytes(each) for each in made if id(each) not in ours)
    if about.name in _PICK:
        return 2 * fresh
    if about.name in _SCATTER:
        source = min((_bytes(each) for each in given if each.ndim and each.is_floating_point()), default=0)
        return 3 * source + fresh
    back = sum(map(_bytes, written))
    read = sum(_bytes(each) for each in given if about.name not in _OVERWRITE or id(each) not in ours)
    return read + back + fresh


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """By torch's own counter; of attention that sees no later positions half."""
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    found = formula(*args, **kwargs, out_val=result)
    causal = any(each is True for each in _causal(func, args, kwargs))
    return found // 2 if causal else found


def _causal(func: Any, args: Any, kwargs: Any) -> list[Any]:
    names = [each.name for each in func._schema.arguments]
    if "is_causal" not in names:
        return []
    place = names.index("is_causal")
    return [args[place] if place < len(args) else kwargs.get("is_causal")]


def _asker() -> tuple[str, str]:
    """(function, file:line) of ours, megatron's or deepspeed's that is running, the innermost."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        start = next((path.index(each) for each in THEIRS if each in path), None)
        if start is None and path.startswith(str(OURS)):
            start = len(str(OURS)) - len(OURS.name)
        if start is not None:
            module = path[start:].removesuffix(".py").replace("/", ".")
            return f"{module}.{frame.f_code.co_qualname}", f"{path[start:]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd", "autograd"
