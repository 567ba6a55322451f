"""Makes minimal engines and what they train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.wholes import Wholes
from megaopus.models.config import ModelConfig
from megaopus.models.gpt import canonical_names
from megaopus.optim.config import OptimConfig
from megaopus.optim.registry import spec_of

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


def example(optimizer: str) -> OptimConfig:
    """The settings that an optimizer's entry in the registry gives tests."""
    return OptimConfig(name=optimizer, **spec_of(optimizer).example)


def gentle(optimizer: str) -> OptimConfig:
    """The same by steps so small that rounding does not grow from update to update."""
    config = example(optimizer)
    config.lr /= 10
    return config


def tiny_engine(
    mesh: Mesh,
    *,
    model: ModelConfig = TINY,
    optim: OptimConfig | None = None,
    parallel: ParallelConfig | None = None,
    engine: EngineConfig | None = None,
    seq_len: int = 16,
    micro_batch_size: int | None = None,
    vocab_size: int = 128,
    **more: Any,
) -> Any:
    """A two-layer GPT on ``mesh``; the engine is the one that ``engine`` names, ``more`` is for it.

    A micro-batch is such that the usual batch of eight is always several: two sequences, four without data parallelism.
    """
    engine = engine or EngineConfig(device="cpu", precision="fp32")
    return engine.spec().load_class()(
        mesh,
        model=model,
        optim=optim or OptimConfig(),
        engine=engine,
        parallel=parallel or ParallelConfig(),
        vocab_size=vocab_size,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size or (2 if mesh.shape.dp > 1 else 4),
        total_steps=100,
        seed=0,
        **more,
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


def wholes(engine: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put pieces that data-parallel ranks have of parameters together; copies, also where they are whole already."""
    if not (pieces := engine.pieces()):
        return {name: value.clone() for name, value in values.items()}
    weights = dict(engine.named_parameters())
    weights = {name: weights[local] for local, name in canonical_names(engine.module)}
    found = Wholes(values, pieces, lambda name: engine.mesh.sharing_group(weights[name]))
    return {name: found[name] for name in values}
