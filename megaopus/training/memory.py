"""Measures the memory that a rank takes, and explains an error that says there is not enough."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from megaopus.errors import EngineError
from megaopus.record.formatting import format_bytes
from megaopus.record.types import StepRecord

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""What torch says, in an error of no type of its own, where CUDA or the host refuses memory."""


class PeakMemory:
    """Measures, once a step, the most memory that this process held since the step before."""

    def __init__(self, device: torch.device, estimate: int):
        """``estimate``: bytes that the rank was expected to take; stands beside what is measured."""
        self._device, self._estimate = device, estimate

    def __call__(self, record: StepRecord) -> dict[str, int | None]:
        """Give the memory metrics of the step, in bytes, and begin the next one's peak on CUDA."""
        found = peak_memory(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return {**found, "memory_estimate": self._estimate}


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Give the peaks in bytes: of CUDA's tensors and allocator since their last reset, of the process in its life."""
    cuda = device.type == "cuda"
    return {
        "memory_allocated": torch.cuda.max_memory_allocated(device) if cuda else None,
        "memory_reserved": torch.cuda.max_memory_reserved(device) if cuda else None,
        "memory_resident": resident_peak(),
    }


def resident_peak(status: Path = Path("/proc/self/status")) -> int:
    """Give the most bytes of the host's memory that this process held in its life.

    Linux's own mark, which a new program starts anew; elsewhere that of getrusage, which may be a parent's.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def out_of_memory_explained(
    device: torch.device, rank: int, estimate: Callable[[], Mapping[str, tuple[int, str]]]
) -> Iterator[None]:
    """Raise an EngineError with measured and estimated memory where the body runs out of it; other errors pass.

    ``estimate``: what -> (bytes, the assumption behind it) of this rank; called only then.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(_explanation(error, device, rank, estimate())) from error


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an error of Python, numpy or torch means that the device or the host has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def _explanation(error: Exception, device: torch.device, rank: int, estimate: Mapping[str, tuple[int, str]]) -> str:
    peaks = {name.removeprefix("memory_"): size for name, size in peak_memory(device).items() if size is not None}
    measured = ", ".join(f"{name} {format_bytes(size)}" for name, size in peaks.items())
    parts = sorted(((size, what) for what, (size, _) in estimate.items()), reverse=True)
    total = format_bytes(sum(size for size, _ in parts))
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"out of memory on rank {rank} ({device.type}): {said}\n"
        f"  measured peak: {measured}\n"
        f"  estimated, as by check: {total} = {' + '.join(f'{what} {format_bytes(size)}' for size, what in parts)}\n"
        "  -> activations and logits: a smaller train.micro_batch_size (the batch stays), engine.recompute=true, or "
        "parallel.cp; weights and optimizer: parallel.tp or parallel.pp, parallel.distributed_optimizer=true or "
        "engine=deepspeed; scoring: a smaller selection.score_micro_batch_size or selection.proxy_micro_batch_size"
    )
