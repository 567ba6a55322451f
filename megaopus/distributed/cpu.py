"""megatron-core on CPU: the names it hard-codes for CUDA, answered for the CPU while an engine call runs.

megatron-core allocates with ``device="cuda"``, asks ``torch.cuda`` for the current device and its random state, and
compares ``Tensor.type()`` with CUDA type names. ``cpu_mode`` answers these on a machine without a GPU; on CUDA it is
never entered.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_RNG_NAME = "model-parallel-rng"
_depth = 0


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in calls; it is not active inside a backward pass (the patched names below are)."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        elif kwargs is None:
            kwargs = {}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _patched_names() -> dict[str, Any]:
    """torch.cuda names that megatron-core calls, as a machine with one CPU "device" answers them."""
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None, wait_event=lambda event: None)
    return {
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda device: None,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }


@contextmanager
def cpu_mode() -> Iterator[None]:
    """Run megatron-core code on the CPU inside; torch.cuda is as before outside. May be nested."""
    global _depth
    if _depth:
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
        return
    names = _patched_names()
    saved = {name: getattr(torch.cuda, name) for name in names}
    for name, value in names.items():
        setattr(torch.cuda, name, value)
    _depth = 1
    try:
        with _CudaMeansCpu():
            yield
    finally:
        _depth = 0
        for name, value in saved.items():
            setattr(torch.cuda, name, value)


@contextmanager
def plain_calls() -> Iterator[None]:
    """Forward passes inside ``cpu_mode``: torch calls are not looked at, which costs more than the small ones take.

    The patched names still answer, and a backward pass (so any recomputed forward) knows no more than they do.
    """
    with torch._C.DisableTorchFunction():
        yield


def prepare_megatron(on_cpu: bool) -> None:
    """Import megatron-core once, quietly; on CPU without torch.compile fusers and with a CPU random-state tracker."""
    # megatron calls collectives by names that torch >= 2.13 renames; a user can do nothing about it
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if on_cpu:
        keep_freed_memory()
        for begins in ("When using async grad allreduce", "When using sequence parallelism"):  # concerns CUDA streams
            warnings.filterwarnings("ignore", begins, UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Transformer Engine and Apex are not installed", once per module
        if not on_cpu:
            import megatron.core.parallel_state  # noqa: F401

            return
        with _nothing_compiled(), _not_imported("wandb"):  # two of six seconds, and a run on CPU needs neither
            from megatron.core import jit

            jit.disable_jit_fuser()
        from megatron.core.tensor_parallel import random as megatron_random

        if not isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, _cpu_tracker(megatron_random)):
            megatron_random._CUDA_RNG_STATE_TRACKER = _cpu_tracker(megatron_random)()
            megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
            # Activation recomputation saves and restores the device's random state through these.
            megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
            megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Make torch.compile give back what it gets: megatron-core's functions are decorated with it when imported."""
    before = torch.compile
    torch.compile = lambda model=None, **options: model or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


@contextmanager
def _not_imported(name: str) -> Iterator[None]:
    """Let a package be missing for those that try to import it, unless it is there already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks of up to 32 MB for reuse instead of returning them to the kernel at once.

    Activations come and go many times a second: fetched anew each time, their page faults cost a tenth of a step.
    Does nothing under another C library. 32 MB is the largest threshold that glibc accepts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 1 << 30)
        mallopt(m_top_pad, 256 << 20)


def _cpu_tracker(megatron_random: Any) -> type:
    """A tracker of named random states over the CPU generator (cached: one class per process)."""
    cached = getattr(megatron_random, "_megaopus_cpu_tracker", None)
    if cached is not None:
        return cached

    class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or seed {seed} is already there")
            self.seeds_.add(seed)
            outer = torch.get_rng_state()
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

        @contextmanager
        def fork(self, name: str = _RNG_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    megatron_random._megaopus_cpu_tracker = CpuRngStatesTracker
    return CpuRngStatesTracker
