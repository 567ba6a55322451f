"""Counts what a step asks of a CUDA device: kernels, reads by the host, waits, messages, FLOPs and bytes moved."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_cuda import roofline
from benchmarks.fake_cuda.operation import Operation, device_of
from megaopus.selection.candidates import tensors_of

aten = torch.ops.aten
OURS = Path(__file__).parents[2] / "megaopus"
THEIRS = ("megatron/core/", "deepspeed/")
_LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors that one multi-tensor kernel takes, by how many lists of them it has (torch: MultiTensorApply.cuh)."""
_CHUNK, _CHUNKS = 65536, 320
"""Elements of a piece of a tensor, and pieces that one multi-tensor kernel takes (the same file)."""
_MULTI = ("_foreach", "_fused_ad", "_fused_sgd")
"""How the names of operations on lists of tensors begin."""
_KERNELS = {"_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_efficient_attention_backward": 2}
"""Operations of several kernels each; of any other one is counted, what libraries split off is not seen."""
_OVERWRITE = ("copy_", "zero_", "fill_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_")
"""Operations that do not read what they write to."""
_PICK = ("embedding", "index_select", "gather", "index", "nll_loss_forward")
"""Those that read no more of a tensor than they give."""
_SCATTER = (
    "index_add_",
    "index_put_",
    "index_put",
    "scatter_add_",
    "embedding_dense_backward",
    "nll_loss_backward",
)
"""Those that write no more of a tensor than they are given; the last two write all of it first."""
_FLASH_BACKWARD = "_scaled_dot_product_flash_attention_backward"
_UNSTEADY = ("put_", "nll_loss2d_forward", "cumsum")
"""Those of which torch has no form for CUDA that repeats itself; cumsum of whole numbers has one."""
_DEPENDENT = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount")
"""Those whose result the host must wait for."""


class Message(NamedTuple):
    """A kind of message: what is done, by which group of ranks, and how many they are."""

    kind: str
    group: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.kind} {self.group}/{self.ranks}"


class Work:
    """Says what was asked of the device since this was made.

    ``launches``: operation -> kernels, copies inside the device among them. ``reads``: function -> times that it had
    the host wait for a number (or all) of a tensor; ``waits``: the same of ``synchronize`` by what is waited for;
    ``copies_in``: function -> copies from the host's memory that it waited for. ``messages``: their number, ``sizes``:
    bytes of the tensor that they work on (of all ranks together where they gather or scatter), ``sent``: bytes that a
    rank sends by a ring. ``flops``: (kind, dtype) -> FLOPs. ``moved``: operation -> bytes read and written.
    ``seconds``: kind -> least seconds of an H100 (``roofline``); of messages those in which nothing else is done: one
    that is asked for ahead goes on beside what follows, until somebody waits for it.
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
        self.seconds: dict[str, float] = defaultdict(float)
        self._wire = 0.0
        """When the last message has arrived."""
        self.parts: dict[str, float] = defaultdict(float)
        """Part of a step (``part``; products and attention by themselves) -> seconds; of messages nothing."""
        self.part: Callable[[], str] = lambda: ""
        self.pass_launches = 0
        """Of ``launches`` those of forward and backward passes of the model."""
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

    def operation(self, call: Operation) -> None:
        """Count an operation that has run; one without a tensor of the device is none."""
        func, args, kwargs, given = call.func, call.args, call.kwargs, call.given
        if func.namespace == "c10d":
            self._message(func, args)
            return
        name = call.schema.name
        on_device = [each for each in given if device_of(each).type == "cuda"]
        made_there = [each for each in call.made if device_of(each).type == "cuda"]
        if call.schema.free or not (on_device or made_there):
            return
        _refuse_mixed(name, given, on_device)
        if torch.are_deterministic_algorithms_enabled():
            _refuse_unsteady(name, given)
        if name in ("_to_copy", "copy_") and self._between(args, kwargs, call.result):
            return
        if name in _DEPENDENT:
            self.asked(self.reads)
        if name.startswith("index"):
            self._index(call)
        if not any(each.numel() for each in on_device + made_there):
            return
        self.launches[name] += _count_kernels(name, args)
        moved = _moved(call)
        self.moved[name] += moved
        flops, kind, dtype = _flops(call), "memory", torch.float32
        if flops:
            kind = "attention" if "attention" in name else "products"
            dtype = min((each.dtype for each in on_device), key=lambda each: each.itemsize)  # sums may be wider
            self.flops[f"{kind}{' backward' if 'backward' in name else ''}", dtype] += flops
        self._took(kind, roofline.kernel_seconds(flops, dtype, moved))

    def _took(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.parts[self.part() if kind == "memory" else kind] += seconds

    def compiled(self, name: str, tensors: list[Tensor]) -> None:
        """Count a kernel that torch.compile makes, which reads or writes each of ``tensors`` once."""
        moved = sum(_bytes(each) for each in tensors if device_of(each).type == "cuda")
        self.launches[name] += 1
        self.moved[name] += moved
        self._took("memory", roofline.kernel_seconds(0, torch.float32, moved))

    def _index(self, call: Operation) -> None:
        """Count what has the host wait: an index of its own that goes to the device, a mask that is to be counted."""
        places = [each for each in tensors_of(call.args[1:]) if not each.is_floating_point()]
        if any(each.ndim and device_of(each).type == "cpu" for each in places):
            self.asked(self.copies_in)
        # one number is put by a kernel that takes a mask as it is
        filled = call.schema.name in ("index_put_", "index_put") and call.args[2].numel() == 1
        if any(each.dtype == torch.bool for each in places) and not filled:
            self.asked(self.reads)

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
        self._wire = max(self._wire, self._now()) + roofline.message_seconds(sent, ranks)
        names = [each.name for each in func._schema.arguments]
        place = next((names.index(each) for each in ("async_op", "asyncOp") if each in names), len(names))
        if not (args[place] if place < len(args) else place < len(names)):  # what has no such argument is waited for
            self.waited()

    def waited(self) -> None:
        """Note that work goes on only when every message so far has arrived."""
        self.seconds["messages"] += max(0.0, self._wire - self._now())

    def _now(self) -> float:
        return sum(self.seconds.values())


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


def _bytes(tensor: Tensor) -> int:
    """Of what a tensor sees, each element that it repeats once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _refuse_mixed(name: str, given: list[Tensor], on_device: list[Tensor]) -> None:
    """Raise RuntimeError for what CUDA refuses and fake tensors let through: lists of both devices."""
    if not name.startswith(_MULTI) or len(on_device) == len(given):
        return
    if name.startswith("_fused") or any(each.ndim and device_of(each).type == "cpu" for each in given):
        raise RuntimeError(f"{name} is given tensors of the device and of the host together")


def _refuse_unsteady(name: str, given: list[Tensor]) -> None:
    """Raise RuntimeError, as torch does on CUDA while it must repeat itself, for what has no such form."""
    if name in _UNSTEADY and (name != "cumsum" or given[0].is_floating_point()):
        raise RuntimeError(f"{name} on CUDA does not have a deterministic implementation")


def query_sums(query: Tensor) -> int:
    """Bytes of fp32 sums of the queries' gradient that flash attention's backward pass keeps (flash_api.cpp, mha_bwd).

    One, which blocks add to as they come; where torch must repeat itself as many as keep every multiprocessor busy.
    """
    batch, heads = query.shape[:2]
    sums = -(-roofline.MULTIPROCESSORS // (batch * heads)) if torch.are_deterministic_algorithms_enabled() else 1
    return 4 * query.numel() * sums


def _count_kernels(name: str, args: Any) -> int:
    if not name.startswith(_MULTI):
        return _KERNELS.get(name, 1)
    lists = [each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor)]
    pieces = sum(math.ceil(each.numel() / _CHUNK) for each in lists[0])
    each_takes = _LISTS[min(5, max(1, len([one for one in lists if len(one) == len(lists[0])])))]
    more = 1 if name == "_foreach_norm" else 0  # which puts the pieces' norms together
    return max(1, math.ceil(pieces / _CHUNKS), math.ceil(len(lists[0]) / each_takes)) + more


def _moved(call: Operation) -> int:
    """Bytes that a kernel reads and writes, each once."""
    name, written = call.schema.name, call.written()
    ours = {id(each) for each in written}
    fresh = sum(_bytes(each) for each in call.made if id(each) not in ours)
    if name in _PICK:
        return 2 * fresh
    if name in _SCATTER:
        source = min((_bytes(each) for each in call.given if each.ndim and each.is_floating_point()), default=0)
        return 3 * source + fresh
    read = sum(_bytes(each) for each in call.given if name not in _OVERWRITE or id(each) not in ours)
    if name == _FLASH_BACKWARD:  # more than one sum is set to zero first, and read at the end
        read += 2 * (query_sums(call.args[1]) - 4 * call.args[1].numel())
    return read + sum(map(_bytes, written)) + fresh


def _flops(call: Operation) -> int:
    """By torch's own counter; of attention that sees no later positions what it sees."""
    formula = flop_registry.get(call.func._overloadpacket)
    if formula is None:
        return 0
    args = [each for each in call.args if not isinstance(each, torch.dtype)]  # of a wider result
    found = formula(*args, **call.kwargs, out_val=call.result)
    names = [each.name for each in call.func._schema.arguments]
    place = names.index("is_causal") if "is_causal" in names else len(names)
    causal = call.args[place] if place < len(call.args) else call.kwargs.get("is_causal", False)
    if not causal:
        return found
    queries, keys = (each.shape[-2] for each in call.args[int("backward" in call.schema.name) :][:2])
    return found * (2 * keys - queries) // (2 * keys)  # the last query sees all keys


def _asker() -> tuple[str, str]:
    """(function, file:line) of ours, megatron's or deepspeed's that is running, the innermost."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        start = len(str(OURS)) - len(OURS.name) if path.startswith(str(OURS)) else None
        if start is None:
            start = next((path.index(each) for each in THEIRS if each in path), None)
        if start is not None:
            module = path[start:].removesuffix(".py").replace("/", ".")
            return f"{module}.{frame.f_code.co_qualname}", f"{path[start:]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd", "autograd"
