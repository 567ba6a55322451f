"""What the engines share: who works on which sequences, and where dropout draws from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megaopus.distributed.mesh import Mesh


def data_parallel_share(num: int, mesh: Mesh) -> Tensor:
    """(num / dp,) rows of a global batch of ``num`` sequences that this data-parallel rank works on.

    Raises ValueError if they cannot be split evenly.
    """
    dp = mesh.shape.dp
    if num % dp:
        raise ValueError(f"{num} sequences cannot be split evenly over {dp} data-parallel ranks")
    return torch.arange(num).view(dp, -1)[mesh.dp_rank]


def seed_dropout(mesh: Mesh, seed: int, step: int) -> None:
    """Dropout's random states as a function of (seed, step, dp and cp rank): nothing of them needs saving."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    part = mesh.dp_rank * mesh.shape.cp + mesh.cp_rank
    digest = hashlib.sha256(f"{seed}:dropout:{step}:{part}".encode()).digest()
    with mesh.megatron():
        model_parallel_cuda_manual_seed(int.from_bytes(digest[:4], "big"))
