"""Run a function on several gloo ranks; a minimal engine to run it on."""

from __future__ import annotations

import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.deepspeed.engine import DeepSpeedEngine
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig

ENGINES = {"megatron": MegatronEngine, "deepspeed": DeepSpeedEngine}
TINY = ModelConfig(num_layers=2, hidden_size=32, num_heads=4)
LLAMA = replace(
    TINY,
    num_kv_heads=2,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tied=False,
    qk_norm=True,
)
MODELS = {
    "gpt2": TINY,
    "llama": LLAMA,
    "gpt2-4-layers": replace(TINY, num_layers=4),
    "llama-4-layers": replace(LLAMA, num_layers=4),
}


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180) -> list[Any]:
    """``function(*args)`` on each of ``world_size`` processes with torchrun's environment; results by rank.

    ``function`` must be importable (a module-level function); one rank runs in this process. A failure on a rank is
    raised with that rank's traceback, a silent rank after ``timeout_s``. One process group per call: a second one on
    the same port could meet the first one's store.
    """
    if world_size == 1:
        return [function(*args)]
    context = mp.get_context("spawn")
    (port,) = free_ports(1)
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world_size, port, sender, function, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    deadline = time.monotonic() + timeout_s
    try:
        return [_receive(rank, pipe, deadline) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_layouts(
    world_sizes: dict[str, int], function: Callable[..., Any], *args: Any, timeout_s: float = 300
) -> dict[str, list[Any]]:
    """``function(layout, *args)`` on each rank of every layout (name -> ranks); results by layout, then rank.

    Starting a process takes longer than its work: one start for each world size, a process group for each layout.
    """
    found: dict[str, list[Any]] = {}
    for world_size in sorted(set(world_sizes.values())):
        names = [layout for layout, size in world_sizes.items() if size == world_size]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        results = run_ranks(world_size, _one_after_another, function, ports, args, timeout_s=timeout_s)
        found |= {layout: [result[layout] for result in results] for layout in names}
    return found


def _one_after_another(function: Callable[..., Any], ports: dict[str, int], args: tuple) -> dict[str, Any]:
    found = {}
    for layout, port in ports.items():
        os.environ["MASTER_PORT"] = str(port)
        found[layout] = function(layout, *args)
    return found


def _receive(rank: int, pipe: Any, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise AssertionError(f"rank {rank} did not answer in time")
    try:
        error, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died without a word") from None
    if error is not None:
        raise AssertionError(f"rank {rank} failed:\n{error}")
    return value


def _rank(rank: int, world_size: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        answer = (None, function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(answer))  # plain pickle: no shared memory with a dying process


def free_ports(count: int) -> list[int]:
    """Free ports below those that outgoing connections are given: nobody takes one before it is used."""
    found: list[int] = []
    for port in random.Random(os.getpid()).sample(range(12_000, 30_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"fewer than {count} free ports")


def tiny_engine(
    mesh: Mesh,
    *,
    model: ModelConfig = TINY,
    optim: OptimConfig | None = None,
    parallel: ParallelConfig | None = None,
    engine: EngineConfig | None = None,
    seq_len: int = 16,
    micro_batch_size: int = 2,
    vocab_size: int = 128,
) -> Any:
    """A two-layer GPT on ``mesh``; the engine is the one that ``engine`` names."""
    engine = engine or EngineConfig(device="cpu", precision="fp32")
    return ENGINES[engine.name](
        mesh,
        model=model,
        optim=optim or OptimConfig(),
        engine=engine,
        parallel=parallel or ParallelConfig(),
        vocab_size=vocab_size,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        total_steps=100,
        seed=0,
    )


def save_engine(engine: Any, folder: Path, groups: dict[str, Any]) -> None:
    """Write a checkpoint's weights as a checkpointer has them written (collective)."""
    saving = engine.prepare_save(folder, groups, False)
    saving.start(lambda path: None, background=False)
    assert saving.error() is None
    saving.commit()
    engine.mesh.barrier()


def state_of(engine: Any) -> list[torch.Tensor]:
    """Copies of this rank's weights, fp32 main weights and optimizer state."""
    weights = [*engine.module.parameters(), *engine.scoring_backend().parameters().values()]
    states = [value for o in engine.optimizer.torch_optimizers for s in o.state.values() for value in s.values()]
    return [tensor.detach().clone() for tensor in (*weights, *states)]


def random_batch(size: int, step: int, *, seq_len: int = 16, vocab_size: int = 128) -> TokenCandidates:
    """A batch of random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, vocab_size, (size, seq_len + 1), generator=generator)
    return TokenCandidates(tokens, step * size + torch.arange(size))


@dataclass
class TokenCandidates:
    """Candidates over (N, S + 1) tokens: ``length`` positions need length + 1 of them."""

    tokens: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: torch.Tensor) -> TokenCandidates:
        return TokenCandidates(self.tokens[indices], self.ids[indices])

    def batch(self, length: int | None = None) -> torch.Tensor:
        return self.tokens if length is None else self.tokens[:, : length + 1]
