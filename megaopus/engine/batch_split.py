"""Says what the engines share: who works on which sequences, and where dropout draws from."""

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


def training_share(num: int, mesh: Mesh, micro_batch_size: int) -> Tensor:
    """As ``data_parallel_share``; raises ValueError if it does not fall into micro-batches either."""
    share = data_parallel_share(num, mesh)
    if len(share) % micro_batch_size:
        raise ValueError(f"{len(share)} sequences per rank are not a multiple of {micro_batch_size} per micro-batch")
    return share


def padded_share(num: int, mesh: Mesh, unit: int) -> Tensor:
    """This rank's rows of ``num`` sequences filled up, with copies of the last, to a multiple of dp x ``unit``."""
    multiple = mesh.shape.dp * unit
    return data_parallel_share(-(-num // multiple) * multiple, mesh).clamp(max=num - 1)


def seed_dropout(mesh: Mesh, seed: int, step: int) -> None:
    """Set dropout's random states, a function of (seed, step, pp, dp and cp rank): nothing of them needs saving.

    Tensor-parallel ranks share the default one, and have one each (megatron's tracker) for what is theirs alone: heads,
    and under sequence parallelism positions.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    part = (mesh.pp_rank * mesh.shape.dp + mesh.dp_rank) * mesh.shape.cp + mesh.cp_rank
    digest = hashlib.sha256(f"{seed}:dropout:{step}:{part}".encode()).digest()
    with mesh.megatron():
        model_parallel_cuda_manual_seed(int.from_bytes(digest[:4], "big"))
