"""Chooses what is measured of each step besides what the training loop times itself.

A new per-step metric is a field of ``record.types.StepRecord`` and a meter here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from megaopus.config.run_config import RunConfig
from megaopus.distributed.mesh import Mesh
from megaopus.models.flops import training_flops_per_token
from megaopus.planning.memory import PROCESS_ROW, memory, precisions, rows_at_peak
from megaopus.record.recorder import Meter
from megaopus.record.types import StepRecord
from megaopus.training.memory import PeakMemory

PEAK_TFLOPS: Mapping[str, float] = {
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H800 PCIe": 756,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A10": 125,
    "MI300X": 1307,
}
"""Dense bf16 TFLOP/s of a GPU by words of its name, the more special first.

From the data sheets under nvidia.com/en-us/data-center and amd.com/en/products/accelerators ("BFLOAT16 Tensor Core",
"peak bfloat16"); half of what they give where that is with sparsity.
"""


def step_meters(config: RunConfig, mesh: Mesh, vocab_size: int) -> list[Meter]:
    """Make the meters of a run; ``vocab_size`` is the model's before padding."""
    rows = rank_memory(config, mesh, vocab_size)
    # beside the memory of the process on CPU, of tensors on CUDA
    estimate = sum(size for what, (size, _) in rows.items() if mesh.on_cpu or what != PROCESS_ROW)
    tokens = config.train.global_batch_size * config.data.seq_len
    flops = training_flops_per_token(config.model, vocab_size, config.data.seq_len) * tokens
    peak = None if mesh.on_cpu else peak_tflops(torch.cuda.get_device_name(mesh.device))
    return [PeakMemory(mesh.device, estimate), Throughput(flops, mesh.shape.world_size, peak)]


def rank_memory(config: RunConfig, mesh: Mesh, vocab_size: int) -> Mapping[str, tuple[int, str]]:
    """Estimate what -> (bytes, the assumption behind it) of this rank at its peak, as ``check`` does of the largest."""
    (precision,) = precisions(config, mesh.device.type)
    world_size, device = mesh.shape.world_size, mesh.device.type
    return rows_at_peak(memory(config, vocab_size, world_size, precision, mesh.pp_rank, device))


class Throughput:
    """Measures model FLOPs per second and rank: those of training, whatever selection and recomputing cost besides."""

    def __init__(self, flops_per_step: float, ranks: int, peak: float | None):
        """``peak``: TFLOP/s that a rank's device can do; None: not known."""
        self._tflops, self._peak = flops_per_step / ranks / 1e12, peak

    def __call__(self, record: StepRecord) -> dict[str, float | None]:
        """Give the throughput of a step; None where no time has passed."""
        rate = self._tflops / record.step_s if record.step_s > 0 else None
        share = None if rate is None or self._peak is None else rate / self._peak
        return {"tflops_per_second": rate, "model_flops_utilisation": share}


def peak_tflops(device_name: str) -> float | None:
    """Look up a GPU's dense bf16 peak by torch's name of it; None if it is not in the table, or is a part of a GPU."""
    words = re.split(r"[\s-]+", device_name)
    if "MIG" in words:
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words)), None)
