"""Shows an engine to the selector at every layout; each engine adds how its passes run.

Data-parallel ranks share the candidates; tensor-, context- and pipeline-parallel ranks each know a part of each number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.distributed.shards import gathered, is_expert, is_split
from megaopus.engine.base import Engine
from megaopus.engine.gpt_forward import PLAIN, SequenceRules, loss_mask, token_losses
from megaopus.engine.wholes import Wholes
from megaopus.errors import EngineError
from megaopus.models.gpt import EMBEDDING, canonical_names, is_tied, model_chunks
from megaopus.selection import ModuleBackend
from megaopus.selection.backend import (
    Batch,
    Candidates,
    GhostLayer,
    Gradient,
    Piece,
    Shard,
    UpdateOperator,
)
from megaopus.selection.config import NO_EXPERTS
from megaopus.selection.operators.build import Held, operator_of
from megaopus.selection.operators.piecewise import PiecewiseOperator
from megaopus.selection.pieces import chunks


class EngineScoringBackend(ModuleBackend):
    """Says what both engines' backends share: ``ScoringBackend`` over an engine's GPT, main weights and mesh.

    Parameters have whole-model names.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._mesh = engine.mesh
        super().__init__(
            engine.module,
            engine.optimizer.torch_optimizers,
            partial(sequence_losses, rules=engine.rules),
            group=engine.mesh.dp_group if engine.mesh.shape.dp > 1 else None,
            micro_batch_size=engine.micro_batch_size,
        )
        local = dict(engine.named_parameters())
        self._name_of = dict(canonical_names(engine.module))
        self._pieces = engine.pieces()
        self._weights = {name: local[own] for own, name in canonical_names(engine.module)}
        self.split = dict(self._find_shards())
        """Parts of matrices and of vectors, for update rules; estimators ask for those of matrices alone."""
        dims = {name: len(self._shape(p)) for name, p in self._weights.items()}
        self._shards = {name: shard for name, shard in self.split.items() if dims[name] == 2}

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def computes_in_16_bits(self) -> bool:
        return self._engine.bf16

    @property
    def unobserved(self) -> bool:
        return False

    def counts(self, name: str) -> float:
        """One of the ranks that share the positions, of those that hold the whole weight, of a tied one's stages.

        Ranks that share the positions hold pieces of their own, where there are pieces. An expert is on fewer ranks
        than there are data-parallel ones, or on others, and counts for more there.
        """
        mesh, weight = self._mesh, self._weights[name]
        if is_expert(weight):
            one_of = name in self.split or dist.get_rank(mesh.expert_tp_group) == 0
            return float(one_of) if self._pieces else one_of * mesh.shape.dp / mesh.shape.expert_dp
        first_stage = name != EMBEDDING or mesh.pp_rank == 0 or not is_tied(self.module)
        one_of = (mesh.cp_rank == 0 or bool(self._pieces)) and (name in self.split or mesh.tp_rank == 0)
        return float(one_of and first_stage)

    def parameters(self) -> dict[str, Tensor]:
        """The fp32 weights that the optimizer updates: under bf16 the main copies, gathered where sharded."""
        main = self._engine.optimizer.main_weights()
        return {name: main[own] for own, name in canonical_names(self._engine.module)}

    def shards(self) -> dict[str, Shard]:
        return self._shards

    def _find_shards(self) -> Iterator[tuple[str, Shard]]:
        """Parts of matrices and of vectors; estimators ask for those of matrices alone, update rules for both."""
        for name, p in self._weights.items():
            shape, size = self._shape(p), self._mesh.parts(p)
            if size == 1 or not is_split(p):
                continue
            dim = p.partition_dim
            whole = torch.arange(shape[dim] * size, device=p.device)
            along = whole.view([-1 if axis == dim else 1 for axis in range(len(shape))])
            index = self._mesh.part(along, p).flatten()

            def gather(part: Tensor, p: Tensor = p) -> Tensor:
                return self._mesh.whole(part, p)

            yield name, Shard(dim, index, len(whole), gather)

    def _shape(self, parameter: Tensor) -> torch.Size:
        """Of the parameter on this tensor-parallel rank."""
        return parameter.shape

    def operator(self, muon_operator: str = "paper") -> UpdateOperator | None:
        """P_t with the learning rate and momentum of the coming update, not those of the last one."""
        self._engine.prepare_update()
        held = (
            Held(name, self._weights[name], each.optimizer, each.group, each.state)
            for each in self._engine.optimizer.states()
            for name in [self._name_of[each.name]]
        )
        operator = operator_of(held, muon_operator, self.split)
        return operator if operator is None or not self._pieces else PiecewiseOperator(operator.maps, backend=self)

    def gradient(
        self,
        proxy: Candidates,
        length: int | None = None,
        *,
        against: Candidates | None = None,
        micro_batch_size: int | None = None,
    ) -> Gradient:
        """The training path without the update."""
        return self._engine.mean_gradient(proxy, length, against=against, micro_batch_size=micro_batch_size)

    @property
    def lends_gradient(self) -> bool:
        return self._engine.lends_gradient

    def pieces(self) -> Mapping[str, Piece]:
        return self._pieces

    def gathered(self, values: Mapping[str, Tensor]) -> AbstractContextManager[Mapping[str, Tensor]]:
        """One at a time, when it is read; the last one read is kept."""
        return nullcontext(Wholes(values, self._pieces, lambda name: self._mesh.sharing_group(self._weights[name])))

    def sum_pieces(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._sum_each(values, [(self._mesh.dp_cp_group, self._mesh.shape.dp * self._mesh.shape.cp)])

    def losses(self, candidates: Candidates, *, length: int | None = None, micro_batch_size: int = 16) -> Tensor:
        """(n,) float64: tensor-parallel rank 0 of the last stage has the losses (its positions' part of them)."""
        rows = torch.arange(len(candidates))
        micro = self._micro_batch_size(len(candidates), micro_batch_size)
        with self.scoring():
            parts = self._engine.local_losses(candidates, rows, micro, self._length(length))
        return parts if self._mesh.tp_rank == 0 else torch.zeros_like(parts)

    def count_labelled(self, candidates: Candidates, *, length: int | None = None) -> int:
        """Count those that have a label which counts in the loss; by their tokens alone."""
        rules, count = self._engine.rules, 0
        if not rules.masked:
            return len(candidates)
        for rows in torch.arange(len(candidates)).split(self.micro_batch_size):
            count += int(loss_mask(candidates.take(rows).batch(self._length(length)), rules).any(1).sum())
        return count

    def _micro_batch_size(self, count: int, most: int) -> int:
        """Of a pass over ``count`` candidates, ``most`` at most."""
        return most

    def _length(self, length: int | None) -> int:
        return min(length or self._engine.seq_len, self._engine.seq_len)

    def exact_gradients(self, batch: Batch) -> Iterator[Gradient]:
        shape = self._mesh.shape
        if shape.tp * shape.pp * shape.cp * shape.ep > 1:
            raise EngineError(
                f"selection.estimator=exact needs tp = pp = cp = ep = 1, not tp={shape.tp} pp={shape.pp}"
                f" cp={shape.cp} ep={shape.ep}: use directional, or adjoint where there are no experts"
            )
        with self._mesh.megatron():
            yield from super().exact_gradients(batch)

    def ghost_layers(self) -> list[GhostLayer]:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

        if any(map(is_expert, self._weights.values())):
            raise EngineError(f"selection.estimator: {NO_EXPERTS}: use directional")
        names = {id(p): name for name, p in self._weights.items()}
        collect = self._collectors()
        layers = []
        for module in self.module.modules():
            if isinstance(module, VocabParallelEmbedding):
                layer = GhostLayer(
                    names[id(module.weight)],
                    module,
                    "embedding",
                    collect=collect["embedding"] if module.reduce_scatter_embeddings else None,
                    first_row=module.vocab_start_index,
                    tied=is_tied(self.module),
                )
            elif isinstance(module, nn.Embedding):  # the same on every tensor-parallel rank
                layer = GhostLayer(names[id(module.weight)], module, "embedding", counted=self._mesh.tp_rank == 0)
            elif isinstance(module, ColumnParallelLinear | RowParallelLinear):
                column = isinstance(module, ColumnParallelLinear)
                # a tied output layer is called with the embedding's weight
                name = EMBEDDING if module.weight is None else names[id(module.weight)]
                use = collect["column" if column else "row"]
                tied = name == EMBEDDING
                layer = GhostLayer(name, module, "linear", sequence_first=True, collect=use, tied=tied)
            else:
                continue
            layers.append(layer)
        return layers

    def _collectors(self) -> dict[str, Any]:
        """Return how a and b of each kind of layer are put together where tensor-parallel ranks share the sequence."""
        if not model_chunks(self.module)[0].config.sequence_parallel:
            return dict.fromkeys(("column", "row", "embedding"))
        return {
            "column": lambda act_a, grad_b: (self._gather_positions(act_a), grad_b),
            "row": lambda act_a, grad_b: (act_a, self._gather_positions(grad_b)),
            "embedding": lambda ids, grad_b: (ids, self._gather_positions(grad_b).transpose(0, 1)),
        }

    def _gather_positions(self, part: Tensor) -> Tensor:
        """(T / tp, n, ...) -> (T, n, ...)."""
        return torch.cat(gathered(part, self._mesh.tp_group, self._mesh.shape.tp))

    # -- what crosses ranks -----------------------------------------------------------------------------------------

    def _sum_everywhere(self, values: Tensor) -> None:
        """Over model-parallel ranks too: they have parts of the same candidates' numbers."""
        if self._mesh.shape.world_size > 1:
            dist.all_reduce(values)

    def from_rank_0(self, values: Tensor) -> Tensor:
        if self._mesh.shape.world_size == 1:
            return values
        found = values.to(self.device)
        dist.broadcast(found, src=0)
        return found.cpu()

    def check_alike(self, picked_ids: Tensor) -> None:
        """Leave it to the update, which compares what model-parallel ranks picked too, in a message sent anyway."""

    def sum_over_model(self, values: dict[str, Tensor], axis: str) -> dict[str, Tensor]:
        mesh, shape = self._mesh, self._mesh.shape
        tensor, context, stages = (mesh.tp_group, shape.tp), (mesh.cp_group, shape.cp), (mesh.pp_group, shape.pp)
        groups = {"matrix": [tensor], "gradient": [tensor, context], "stages": [stages]}[axis]
        if axis == "gradient" and is_tied(self.module) and shape.pp > 1 and EMBEDDING in values:
            return self._sum_tied(self._sum_each(values, groups))
        return self._sum_each(values, groups)

    def _sum_each(self, values: dict[str, Tensor], groups: list[tuple[Any, int]]) -> dict[str, Tensor]:
        """Sum over each group of (ranks, how many) in turn, one message each."""
        if not values or all(size == 1 for _, size in groups):
            return values
        stacked = torch.stack(list(values.values()))
        for group, size in groups:
            stacked = _sum(stacked, group, size)
        return dict(zip(values, stacked, strict=True))

    def _sum_tied(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the tied embedding over the stages that hold it, for the first of them to keep."""
        from megatron.core import parallel_state

        whole = _sum(values[EMBEDDING], parallel_state.get_embedding_group(), 2)
        return values | {EMBEDDING: whole if self._mesh.pp_rank == 0 else torch.zeros_like(whole)}


@contextmanager
def moved_weights(
    main: list[Tensor], steps: list[Tensor], model: list[Tensor], gather: Callable[[], None]
) -> Iterator[Callable[[float | Tensor], None]]:
    """Yield what puts ``main`` plus a number times ``steps`` where the ``model`` has its weights; ``main`` in the end.

    ``gather``: what tells the other ranks of them.
    """

    @torch.no_grad()
    def put(scale: float | Tensor) -> None:
        for base, step, weight in chunks([main, steps, model]):
            moved: list[Tensor] | tuple[Tensor, ...] = base
            if isinstance(scale, Tensor):
                moved = torch._foreach_mul(step, scale.to(step[0].dtype))
                torch._foreach_add_(moved, base)
            elif scale:
                moved = torch._foreach_add(base, step, alpha=scale)
            torch._foreach_copy_(weight, moved)
        gather()

    try:
        yield put
    finally:
        put(0.0)


def _sum(values: Tensor, group: Any, size: int) -> Tensor:
    if size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def sequence_losses(model: nn.Module, tokens: Tensor, rules: SequenceRules = PLAIN) -> Tensor:
    """(B,) float64 mean loss of the labels that count of each row of (B, S + 1) tokens; one whole model."""
    return token_losses(model, tokens, rules=rules).double().mean(dim=1)
