"""Says what the devices of a job and the links between them do, as assumed or as measured steps have it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

TFLOPS, MFU = 989.0, 0.4
"""Of a GPU, where nothing else is told: an H100's dense bf16 peak (data sheet), and a share of it that large matrices
often reach, messages and idle time apart: not measured here."""
NVLINK_BYTES, NETWORK_BYTES = 450e9, 50e9
"""Bytes a second each way of a GPU, inside a node and between nodes: a DGX H100's data sheet."""
CPU_FLOPS = 35e9
"""FLOP/s of one core in fp32: of the order of a server's, not measured by whoever plans."""
COEFFICIENTS = ("flop_s", "pass_s", "number_s", "update_s", "inside_s", "between_s", "message_s")
"""Fields of ``Machine`` that a calibration finds."""
_UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
TIGHT = 0.9
"""Share of the memory beyond which a peak is called tight: the allocator's fragments come on top of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Holds the seconds of each kind of work on one rank's device."""

    flop_s: float
    """Of a FLOP of a matrix product."""
    pass_s: float
    """Of one layer's forward or backward pass, beside its FLOPs: its launches and small operations."""
    number_s: float
    """Of the update of one parameter."""
    update_s: float
    """Of an update, beside its parameters."""
    inside_s: float
    """Of a byte sent to another rank of the node."""
    between_s: float
    """Of a byte sent to another node."""
    message_s: float
    """Of a message, beside its bytes."""
    scoring: float = 1.0
    """Seconds of selection over those that its FLOPs would take as training."""
    cores: int | None = None
    """Cores that all ranks share; None: each has a device of its own."""
    told: str = "assumed"
    """Where the figures come from."""

    def scaled(self, factors: dict[str, float]) -> Machine:
        """Multiply some of the seconds."""
        return replace(self, **{name: getattr(self, name) * factor for name, factor in factors.items()})


def gpu(
    tflops: float = TFLOPS, mfu: float = MFU, inside: float = NVLINK_BYTES, between: float = NETWORK_BYTES
) -> Machine:
    """Describe a GPU of so many TFLOP/s; the rest is assumed."""
    return Machine(
        flop_s=1 / (tflops * 1e12 * mfu),
        pass_s=2e-4,  # tens of kernels, whose launches the host needs some microseconds each for
        number_s=30 / 3.35e12,  # gradient, moments, both copies of the weight: bytes over an H100's bandwidth
        update_s=5e-3,
        inside_s=1 / inside,
        between_s=1 / between,
        message_s=2e-5,
    )


def cpu(cores: int, tflops: float | None = None, mfu: float = 1.0) -> Machine:
    """Describe ranks on the cores of one machine; all of it is assumed until steps are measured."""
    return Machine(
        flop_s=1 / (tflops * 1e12 * mfu) if tflops else 1 / CPU_FLOPS,
        pass_s=1.5e-3,
        number_s=5e-9,
        update_s=2e-2,
        inside_s=1e-9,
        between_s=1e-9,
        message_s=2e-4,
        cores=cores,
    )


def parse_memory(text: str) -> int:
    """Read a size as 80GB (10^9 bytes each) or 80GiB (2^30). Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"{text}: not a size of memory, as 80GB (10^9 bytes each) or 80GiB (2^30)")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def verdict(peak: int, memory: int) -> str:
    """Say whether an estimated peak goes into the memory of a device: fits, tight or no."""
    return "no" if peak > memory else "tight" if peak > TIGHT * memory else "fits"
