"""Says what the engines share: who works on which sequences, and where dropout draws from."""

from __future__ import annotations

import hashlib

from torch import Tensor

from megaopus.distributed.mesh import Mesh
from megaopus.selection.candidates import even_share


def training_share(num: int, mesh: Mesh, micro_batch_size: int) -> Tensor:
    """(num / dp,) rows of a global batch of ``num`` sequences that this data-parallel rank trains on.

    Raises ValueError if they cannot be split evenly, or do not fall into micro-batches.
    """
    dp = mesh.shape.dp
    if num % dp:
        raise ValueError(f"{num} sequences cannot be split evenly over {dp} data-parallel ranks")
    if num // dp % micro_batch_size:
        raise ValueError(f"{num // dp} sequences per rank are not a multiple of {micro_batch_size} per micro-batch")
    return even_share(num, dp, mesh.dp_rank)[0]


def padded_share(num: int, mesh: Mesh, unit: int) -> Tensor:
    """This rank's rows of ``num`` sequences filled up, with copies of the last, to a multiple of dp x ``unit``."""
    return even_share(num, mesh.shape.dp, mesh.dp_rank, unit)[0]


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
