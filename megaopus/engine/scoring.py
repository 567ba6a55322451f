"""The megatron engine as the selector sees it (tp = pp = 1; data-parallel ranks share the candidates)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megaopus.errors import EngineError
from megaopus.selection import ModuleBackend
from megaopus.selection.backend import Batch, Candidates, GhostLayer, Gradient, UpdateOperator

if TYPE_CHECKING:
    from megaopus.engine.megatron import MegatronEngine


class MegatronScoringBackend(ModuleBackend):
    """``ScoringBackend`` over an engine's GPT, its main weights and its data-parallel group."""

    def __init__(self, engine: MegatronEngine):
        shape = engine.mesh.shape
        super().__init__(
            engine.module,
            engine.optimizer.torch_optimizers,
            sequence_losses,
            group=engine.mesh.dp_group if shape.dp > 1 else None,
            micro_batch_size=engine.micro_batch_size,
        )
        self._engine = engine

    def parameters(self) -> dict[str, Tensor]:
        """The fp32 weights that the optimizer updates: under bf16, the main copies."""
        return {name: getattr(p, "main_param", p) for name, p in self.module.named_parameters()}

    def operator(self, muon_operator: str = "paper") -> UpdateOperator | None:
        """P_t with the learning rate of the coming update, not that of the last one."""
        self._engine.set_lr()
        return super().operator(muon_operator)

    def losses(self, batch: Batch) -> Tensor:
        with self._megatron():
            return super().losses(batch)

    def gradient(self, proxy: Candidates, length: int | None = None) -> Gradient:
        """The training path without the update: megatron's schedule and DDP's reduction."""
        with self._megatron():
            return self._engine.mean_gradient(proxy, length)

    def ghost_backward(self, batch: Batch) -> Tensor:
        with self._megatron():
            return super().ghost_backward(batch)

    def exact_gradients(self, batch: Batch) -> Iterator[Gradient]:
        with self._megatron():
            yield from super().exact_gradients(batch)

    @contextmanager
    def perturbed(self, direction: Gradient, scale: float) -> Iterator[None]:
        """Moves the fp32 weights; 16-bit model weights become the cast of the moved ones."""
        if not self._engine.bf16:
            with super().perturbed(direction, scale):
                yield
            return
        weights = dict(self.module.named_parameters())
        main = self.parameters()
        saved = {name: weights[name].detach().clone() for name in direction}
        with torch.no_grad():
            for name, step in direction.items():
                weights[name].copy_(torch.add(main[name], step, alpha=scale))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    weights[name].copy_(value)

    def ghost_layers(self) -> list[GhostLayer]:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

        layers = []
        for name, module in self.module.named_modules():
            if isinstance(module, VocabParallelEmbedding | nn.Embedding):
                layers.append(GhostLayer(f"{name}.weight", module, "embedding"))
            elif isinstance(module, ColumnParallelLinear | RowParallelLinear):
                tied = module.weight is None  # the output layer is called with the embedding's weight
                weight = "embedding.word_embeddings.weight" if tied else f"{name}.weight"
                layers.append(GhostLayer(weight, module, "linear", sequence_first=True))
        return layers

    @contextmanager
    def _megatron(self) -> Iterator[None]:
        shape = self._engine.mesh.shape
        if shape.tp * shape.pp > 1:
            raise EngineError(f"scoring needs tp = pp = 1, this run has tp={shape.tp} pp={shape.pp}")
        with self._engine.mesh.megatron():
            yield


def sequence_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B,) float64 mean token loss of each row of (B, S + 1) tokens."""
    from megaopus.engine.megatron import token_losses

    return token_losses(model, tokens).double().mean(dim=1)
