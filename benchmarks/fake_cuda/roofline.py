"""Says how long an H100 takes for work at the least: by the data sheet's peaks, as nothing real comes to.

NVIDIA H100 Tensor Core GPU data sheet, SXM5: dense rates, half of those that it gives with sparsity.
"""

from __future__ import annotations

import torch

BF16_FLOPS = 989.4e12
TF32_FLOPS = 494.7e12
FP32_FLOPS = 66.9e12
"""Outside tensor cores, which torch keeps fp32 products out of unless it is told otherwise."""
FP64_FLOPS = 66.9e12
MEMORY_BYTES = 3.35e12
"""A second from and to HBM3."""
NVLINK_BYTES = 450e9
"""A second each way inside a node (900 GB/s both)."""
NETWORK_BYTES = 50e9
"""A second each way between nodes: one 400 Gb/s adapter for each GPU (DGX H100 data sheet)."""
HOST_BYTES = 64e9
"""A second each way over PCIe 5 (128 GB/s both)."""
NODE = 8
"""GPUs of a node."""
MULTIPROCESSORS = 132
_PEAKS = {
    torch.bfloat16: BF16_FLOPS,
    torch.float16: BF16_FLOPS,
    torch.float32: FP32_FLOPS,
    torch.float64: FP64_FLOPS,
}


def kernel_seconds(flops: float, dtype: torch.dtype, moved: float) -> float:
    """Seconds of a kernel that makes ``flops`` and moves so many bytes from and to memory, whichever takes longer."""
    return max(flops / _PEAKS.get(dtype, FP32_FLOPS), moved / MEMORY_BYTES)


def message_seconds(sent: float, ranks: list[int]) -> float:
    """Seconds to send so many bytes to others of ``ranks``: over NVLink where all are of one node."""
    inside = max(ranks) // NODE == min(ranks) // NODE
    return sent / (NVLINK_BYTES if inside else NETWORK_BYTES)


def bubble(pp: int, micro_batches: int, vpp: int) -> float:
    """Idle share of a pipeline beside its work: (pp - 1) / (vpp x micro-batches) (Narayanan et al., 2104.04473)."""
    return (pp - 1) / (vpp * micro_batches)
