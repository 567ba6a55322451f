"""Puts a CUDA device that does nothing, and a process group that sends nothing, into a process without either."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # before names of torch.cuda are replaced, which it looks up
import torch.distributed as dist
from torch import Tensor, nn
from torch import library as torch_library
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.fake_cuda.meter import DeviceMeter
from megaopus.distributed.cpu import prepare_megatron
from megaopus.distributed.determinism import VARIABLES

SOURCE = Path(__file__).with_name("idle_device.cpp")
CAPACITY = 80 << 30
"""Bytes that the device says it has."""


def missing() -> str | None:
    """Say what this machine lacks to make a CUDA device that does nothing; None: it lacks nothing."""
    if torch.cuda.is_available():
        return "torch sees a real CUDA device, which fake tensors would be mixed up with"
    return None if shutil.which("g++") else "g++ is needed to compile the device"


@cache
def install() -> None:
    """Compile the device, unless that was done before with this torch, and put it into this process for good."""
    root = Path(torch.__file__).parent
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megaopus"
    library = folder / f"idle_device-{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / library.name
            includes = [f"-I{root / 'include'}"]
            libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
            command = ["g++", "-shared", "-fPIC", "-std=c++20", "-DNDEBUG", *includes, str(SOURCE), *libraries]
            subprocess.run([*command, "-o", str(made)], check=True)
            made.replace(library)
    ctypes.CDLL(str(library)).install_idle_cuda()


@cache
def _know_coalesced() -> torch_library.Library:
    """Let fake tensors go through the collectives of several tensors, which torch has left out of its list."""

    known = torch_library.Library("c10d", "IMPL")
    for name in ("allreduce_", "allgather_into_tensor_", "reduce_scatter_tensor_"):
        known.impl(f"{name}coalesced_", lambda *args: FakeWork().boxed(), "Meta")
    return known  # to be kept: it ends with its last reference


@cache
def _know_fused() -> torch_library.Library:
    """Let be one kernel what is one on CUDA: a build without it takes norms apart, and keeps every piece.

    These are all that torch has both a CUDA kernel and a composition of differentiable operations for.
    """

    def never(*args: Any) -> Any:
        raise AssertionError("fake tensors run no kernel")

    known = torch_library.Library("aten", "IMPL")
    for name in ("silu_backward", "_fused_rms_norm"):  # the latter since torch 2.9
        if hasattr(torch.ops.aten, name):
            known.impl(name, never, "CUDA")
    return known


_meters: list[DeviceMeter] = []
"""Of the device that is there now: the last."""


def _waited(what: str) -> None:
    work = _meters[-1].work
    work.asked(work.waits, what)


class _Event:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        _waited("event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any):
        self.device, self.cuda_stream = torch.device("cuda", 0), 0

    def synchronize(self) -> None:
        _waited("stream")

    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _cuda_names(meter: DeviceMeter) -> Mapping[str, Any]:
    """Answer as torch.cuda would for the idle device: its memory is that of ``meter``."""
    idle = ("set_device", "empty_cache", "_lazy_init")
    return {
        "synchronize": lambda device=None: _waited("device"),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": lambda stream: nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "default_generators": (torch.Generator(),),
        "mem_get_info": lambda device=None: (max(0, CAPACITY - meter.bytes), CAPACITY),
        "memory_allocated": lambda device=None: meter.bytes,
        "memory_reserved": lambda device=None: meter.bytes,
        "max_memory_allocated": lambda device=None: meter.peak,
        "max_memory_reserved": lambda device=None: meter.peak,
        "reset_peak_memory_stats": lambda device=None: meter.reset_peak(),
        **{name: lambda *args, **kwargs: None for name in idle},  # each its own: torch.compile tells them apart
    }


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply with a new parameter in place of the old, which fake tensors cannot change places with."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            found = None if parameter is None else function(parameter)
            if parameter is None or found is None or found is parameter:
                continue
            made = nn.Parameter(found.detach(), parameter.requires_grad)
            vars(made).update({key: value for key, value in vars(parameter).items() if key not in vars(made)})
            module._parameters[name] = made
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else function(buffer)
    return module


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by the kernel that torch takes on CUDA, which a build without CUDA never takes.

    Flash attention for 16 bits without a mask; the memory-efficient one for fp32 and masks, which knows no shared
    key/value heads: products of whole matrices then, and for fp64.
    """
    aten = torch.ops.aten
    if attn_mask is None and query.element_size() == 2:
        found = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
        return found[0]
    if not enable_gqa and query.dtype != torch.float64:
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=query.dtype, device=query.device).masked_fill_(~bias, -torch.inf)
        if bias is not None:
            bias = bias.expand(*query.shape[:2], *bias.shape[-2:])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Let a ``Mesh`` made inside be ``rank`` of a job of ``world_size`` ranks, whose collectives send nothing.

    What a rank is told is what it said: the others are thought to be as it is.
    """
    _know_coalesced()
    make_group = dist.new_group

    def start(backend: str | None = None, **kwargs: Any) -> None:
        real_start("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def new_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return make_group(*args, **kwargs)

    real_start = dist.init_process_group
    place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody calls there
    place |= {name: values[0] for name, values in VARIABLES.items()}  # of libraries that are not there
    with ExitStack() as stack:
        # megatron decorates functions with it, which run as they are under fake_tensors: saves seconds of imports
        stack.enter_context(mock.patch.object(torch, "compile", lambda made=None, **options: made or (lambda f: f)))
        stack.enter_context(mock.patch.dict(os.environ, place))
        stack.enter_context(mock.patch.object(dist, "init_process_group", start))
        stack.enter_context(mock.patch.object(dist, "new_group", new_group))
        # whose sums over ranks are not known: numbers that collectives give are what this rank said
        stack.enter_context(mock.patch("megaopus.engine.base.alike", return_value=True))
        yield


def _arrived(work: FakeWork, *timeout: Any) -> bool:
    """Wait for a message, as ``Work.wait`` does."""
    _meters[-1].work.waited()
    return True


def _compiled_functions(meter: DeviceMeter) -> Mapping[str, Any]:
    """Return what torch.compile would make kernels of, each as one: ours, and those that megatron has compiled."""
    prepare_megatron(on_cpu=False)
    from megatron.core.fusions import fused_bias_swiglu as swiglu

    theirs = {
        f"{swiglu.__name__}.{each}": partial(
            meter.one_kernel, getattr(found := getattr(swiglu, each), "_torchdynamo_orig_callable", found)
        )
        for each in ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back")
    }
    ours = {
        "megaopus.models.fused.compiled": lambda function: partial(meter.one_kernel, function),
        "megaopus.models.fused._adds_wider": lambda dtype, device: True,
        "megaopus.engine.base.missing_compiler": lambda on_cpu: None,
    }
    return theirs | ours


def _routing(meter: DeviceMeter) -> Mapping[str, Any]:
    """Return what tells ``meter`` where tokens go, which no fake tensor says: to all experts alike."""
    from megaopus.models.experts import Router

    def routing(self: Router, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, chosen = route(self, *args, **kwargs)
        meter.routed(chosen, self.topk)
        return weights, chosen

    route = Router.routing
    return {"megaopus.models.experts.Router.routing": routing}


@contextmanager
def fake_tensors(device: str) -> Iterator[DeviceMeter]:
    """Make every tensor inside a fake one, on an idle CUDA device where ``device`` is "cuda"; yields what they take."""
    meter = DeviceMeter(device)
    with ExitStack() as stack:
        if device == "cuda":
            install()
            _know_fused()
            for name, value in _cuda_names(meter).items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(mock.patch.object(torch._C, "_cuda_getDevice", int, create=True))
            stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self: self))
            stack.enter_context(mock.patch.object(FakeWork, "wait", _arrived))
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
            # else it would make a real tensor on the device
            stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True)))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, function in {**_compiled_functions(meter), **_routing(meter)}.items():
            stack.enter_context(mock.patch(name, function))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda self: meter.tolist(self)))
        stack.enter_context(mock.patch.object(FakeTensor, "numpy", lambda self: np.array(meter.tolist(self))))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
        _meters.append(meter)
        stack.callback(_meters.pop)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(meter)
        yield meter
