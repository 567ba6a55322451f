"""Chooses what is measured of each step besides what the training loop times itself.

A new per-step metric is a field of ``record.types.StepRecord`` and a meter here.
"""

from __future__ import annotations

from collections.abc import Mapping

from megaopus.config.run_config import RunConfig
from megaopus.distributed.mesh import Mesh
from megaopus.planning.memory import memory, precisions
from megaopus.record.recorder import Meter
from megaopus.training.memory import PeakMemory


def step_meters(config: RunConfig, mesh: Mesh, vocab_size: int) -> list[Meter]:
    """Make the meters of a run; ``vocab_size`` is the model's before padding."""
    estimate = sum(size for size, _ in rank_memory(config, mesh, vocab_size).values())
    return [PeakMemory(mesh.device, estimate)]


def rank_memory(config: RunConfig, mesh: Mesh, vocab_size: int) -> Mapping[str, tuple[int, str]]:
    """Estimate what -> (bytes, the assumption behind it) of this rank, as ``check`` does of the largest."""
    (precision,) = precisions(config, mesh.device.type)
    return memory(config, vocab_size, mesh.shape.world_size, precision, mesh.pp_rank)
