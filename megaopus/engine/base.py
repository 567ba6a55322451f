"""Says what an engine is: a GPT, its optimizer and their layout, as the training loop and the selector see them."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.checkpoint.pending_save import PendingSave
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import is_split
from megaopus.engine.batch_split import seed_dropout, training_share
from megaopus.engine.config import EngineConfig
from megaopus.engine.gpt_forward import PLAIN, SequenceRules, loss_mask
from megaopus.engine.token_logprobs import Asked, TokenLogprobs
from megaopus.engine.work_timer import WorkTimer
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig
from megaopus.models.expert_loads import ExpertLoads
from megaopus.models.fused import missing_compiler
from megaopus.models.gpt import (
    Start,
    canonical_names,
    initialize,
    part_of_model,
    parts_of_model,
    start_from,
)
from megaopus.optim.config import OptimConfig
from megaopus.optim.schedule import lr_factor
from megaopus.selection.agreement import alike, disagreement, fingerprint
from megaopus.selection.backend import Candidates, Gradient, Piece, ScoringBackend


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step."""

    loss: float
    """Mean token loss of the global batch, before the update: the mean over sequences of their means."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    applied: bool
    """False: the loss or a gradient was not finite, or the norm above the limit; no weight was touched."""
    loss_tokens: int | None = None
    """Tokens of the global batch that count in the loss; None: all."""
    layer_grad_norms: dict[str, float] | None = None
    """The same of each part of the model by itself (``Engine.layer_grad_norms``), if it was asked for."""
    expert_loads: ExpertLoads | None = None
    """How evenly tokens were spread; None: the model has no experts."""
    own_s: float = field(default=0.0, compare=False)
    """Seconds of this rank's forward and backward passes without the reduction of gradients and waits for data."""
    stop_asked: bool | None = field(default=None, compare=False)
    """Whether some rank had been asked to stop when gradients were there; None: it was not told."""


class Engine(ABC):
    """Trains a GPT at one layout. Every method is collective: all ranks call it."""

    module: nn.Module
    """The model of this rank; of several chunks, a list of them."""
    optimizer: Any
    """What holds the main weights and the optimizer's state (``main_weights()``, ``states()``, ``set_step()``)."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        model: ModelConfig,
        optim: OptimConfig | None,
        engine: EngineConfig,
        parallel: ParallelConfig,
        vocab_size: int,
        seq_len: int,
        micro_batch_size: int,
        total_steps: int,
        seed: int,
        start: Start | None = None,
        rules: SequenceRules = PLAIN,
    ):
        """Make the model and its optimizer.

        Args:
            mesh: this rank's place among the others.
            model, optim, engine, parallel: the sections of the run's settings; ``optim`` None: the engine holds weights
                alone, without gradients and optimizer, and can only ``evaluate`` and tell ``token_logprobs``.
            vocab_size: token ids of the model, before padding: the softmax has no more.
            seq_len: positions of a training sequence.
            micro_batch_size: sequences of a forward pass on one rank.
            total_steps: updates of the whole run, over which the learning rate is scheduled.
            seed: of the initial weights and of dropout.
            start: the weights to begin with; None: they are drawn.
            rules: which tokens of a sequence see which, and which count in the loss.

        Raises:
            EngineError: the engine cannot run this model, layout or optimizer.
        """
        if engine.deterministic and not mesh.deterministic:
            raise EngineError("engine.deterministic=true: make the Mesh with deterministic=True")
        self.mesh = mesh
        self.step = 0
        """Updates so far: what the learning rate depends on."""
        self.work = WorkTimer(mesh.on_cpu)
        """Times ``StepResult.own_s``; the loop puts one in that knows its clock and its waits for data."""
        self.stop_asked: Callable[[], bool] = lambda: False
        """Says whether this rank has been asked to stop, for ``StepResult.stop_asked``; the loop puts its own in."""
        self.micro_batch_size = micro_batch_size
        self.seq_len = seq_len
        self.bf16 = engine.is_bf16(mesh.on_cpu)
        self.fused = _is_fused(engine, mesh.on_cpu)
        self._optim = optim
        self._total_steps = total_steps
        self._seed = seed
        self._num_layers = model.num_layers
        self._sequence_parallel = parallel.sequence_parallel
        self._dropout = model.dropout > 0
        seed_dropout(mesh, seed, 0)
        self._start = start
        self.rules = rules
        if model.num_experts is not None and not engine.spec().serves_experts:
            raise EngineError(f"engine.name={engine.name}: it has no experts: use engine.name=megatron")
        self._build(model, optim, engine, parallel, vocab_size)
        if optim is not None and start is not None and self.bf16:
            self.optimizer.set_main_weights(dict(canonical_names(self.module)), start)

    @abstractmethod
    def _build(
        self,
        model: ModelConfig,
        optim: OptimConfig | None,
        engine: EngineConfig,
        parallel: ParallelConfig,
        vocab_size: int,
    ) -> None:
        """Make ``module`` and, unless ``optim`` is None, ``optimizer``; the other attributes are there."""

    def _fill(self, model: ModelConfig, engine: EngineConfig) -> None:
        """Give ``module`` its first weights."""
        if self._start is None:
            initialize(self.module, model, self.mesh, self._seed, on_cpu=engine.use_cpu_initialization)
        else:
            start_from(self.module, self._start)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """(local name, parameter) of this rank; of several model chunks, names begin with the chunk's number."""
        return self.module.named_parameters()

    def prepare_update(self) -> float:
        """Give the optimizer the learning rate and momentum of the coming update; returns the learning rate."""
        assert self._optim is not None
        return self.optimizer.set_step(self.step, lr_factor(self._optim, self.step, self._total_steps))

    def matrix_lr(self) -> float | None:
        """Return the last update's learning rate of the blocks' matrices; None without an optimizer of their own."""
        optimizers = self.optimizer.torch_optimizers
        return float(optimizers[0].param_groups[0]["lr"]) if len(optimizers) > 1 else None

    def training_rows(self, count: int) -> Tensor:
        """Say which rows of a global batch of ``count`` sequences this rank trains on: (count / dp,) int64.

        Raises ValueError if they do not fall into equal shares and micro-batches.
        """
        return training_share(count, self.mesh, self.micro_batch_size)

    def loss_tokens(self, batch: Candidates, rows: Tensor) -> Tensor | None:
        """(1,) float64, on the host: how many labels of this rank's ``rows`` count in the loss; None: all do.

        0 where another rank counts those of the same rows, so that the sum over all ranks is that of the batch.
        """
        mesh = self.mesh
        if not self.rules.masked:
            return None
        if mesh.tp_rank or mesh.cp_rank or mesh.pp_rank:
            return torch.zeros(1, dtype=torch.float64)
        return loss_mask(batch.take(rows).batch(self.seq_len), self.rules).sum(dtype=torch.float64).view(1)

    @abstractmethod
    def train_step(self, batch: Candidates, limit: float = math.inf, *, layer_grad_norms: bool = False) -> StepResult:
        """Make one update from a global batch of K sequences; each data-parallel rank reads only its share.

        ``limit``: the largest gradient norm with which the update is made. ``layer_grad_norms``: the result has those.
        Raises EngineError, with no weight changed, if ranks were given different sequences: an engine calls ``settle``
        last before it changes any.
        """

    @torch.no_grad()
    def layer_squares(self) -> Tensor:
        """(parts,) float64: this rank's share of the square of the gradient's norm, of each part of the model.

        Of the reduced gradient, not clipped: to be called between the backward passes and the update. Every weight
        counts once over all ranks, a tied matrix with the embedding, so that they add up to that of the whole.
        """
        names, places, pieces = dict(canonical_names(self.module)), [], []
        parts = {part: place for place, part in enumerate(parts_of_model(self._num_layers))}
        for local, parameter in self.named_parameters():
            copied = getattr(parameter, "shared", False)  # a tied matrix on the last stage
            if copied or not (is_split(parameter) or dist.get_rank(self.mesh.tensor_group(parameter)) == 0):
                continue
            if (piece := self._own_gradient(local, parameter)) is not None:
                places.append(parts[part_of_model(names[local])])
                pieces.append(piece)
        squares = torch.zeros(len(parts), dtype=torch.float64, device=self.mesh.device)
        if pieces:
            norms = torch.stack(torch._foreach_norm(pieces)).double()
            squares.index_add_(0, self.mesh.to_device(torch.tensor(places)), norms.square())
        return squares

    def _own_gradient(self, name: str, parameter: Any) -> Tensor | None:
        """Elements, fp32, of a parameter's reduced gradient that this one of the dp and cp ranks counts; None: none.

        Raises EngineError where the engine has no such thing.
        """
        raise EngineError("this engine tells no gradients by layer: leave logging.layer_grad_norm_every at 0")

    def settle(self, batch: Candidates, parts: Mapping[str, Tensor | None]) -> dict[str, list[float]]:
        """Sum what each rank knows of an update over all ranks: the last word before one by ``batch``.

        One message, and the only wait for the device in a step. ``parts``: by any name (k,) float64, on the device or
        on the host, or None, which is left out. "stop_asked" is found as well, and a hash of what each rank trains on
        goes with it. Raises EngineError if ranks have different sequences; no weight has changed then.
        """
        asked = torch.tensor([float(self.stop_asked())], dtype=torch.float64)
        given = {**parts, "stop_asked": asked, "picks": fingerprint(batch.ids)}
        known = {name: part for name, part in given.items() if part is not None}
        there = {name: part for name, part in known.items() if part.device.type != "cpu"}
        here = {name: part for name, part in known.items() if name not in there}
        found = iter(self.mesh.total(torch.cat([*there.values(), self.mesh.to_device(torch.cat([*here.values()]))])))
        sums = {name: list(islice(found, len(part))) for name, part in (there | here).items()}
        if not alike(sums.pop("picks"), self.mesh.shape.world_size):
            picks = self.mesh.gather_objects(batch.ids.tolist())
            raise EngineError(f"step {self.step}: {disagreement(picks)}")
        return sums

    def loss_part(self, losses: Tensor) -> Tensor:
        """(1,) float64: the sum of this rank's (n,) losses; 0 where another tensor-parallel rank has the same."""
        return losses.sum().view(1) if self.mesh.tp_rank == 0 else losses.new_zeros(1)

    def told(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """Name as ``StepResult`` does what was settled: loss tokens, norms by layer, requests to stop; and own time."""
        tokens, squares = sums.get("loss_tokens"), sums.get("layers")
        norms = dict(zip(parts_of_model(self._num_layers), map(math.sqrt, squares or ()), strict=bool(squares)))
        return {
            "loss_tokens": None if tokens is None else int(tokens[0]),
            "layer_grad_norms": norms or None,
            "stop_asked": sums["stop_asked"][0] > 0,
            "own_s": self.work.seconds(),
        }

    @abstractmethod
    def evaluate(self, sequences: Candidates) -> Tensor:
        """(n,) mean token loss of each sequence, float64, the same on every rank."""

    def token_logprobs(self, asked: Asked, micro_batch_size: int) -> TokenLogprobs:
        """Tell how probable the tokens asked for are: the same on every rank, with dropout off.

        A token sees all before it in its row. T is a multiple of ``length_unit``; ``micro_batch_size``: rows of a pass
        on one rank, at most. Raises EngineError where the engine cannot tell.
        """
        raise EngineError("this engine tells no probabilities of tokens: benchmarks need one of ours")

    @property
    def length_unit(self) -> int:
        """Positions of a sequence must be a multiple of this: each rank has as many."""
        return self.mesh.shape.cp * (self.mesh.shape.tp if self._sequence_parallel else 1)

    @abstractmethod
    def mean_gradient(
        self,
        batch: Candidates,
        length: int | None = None,
        *,
        against: Candidates | None = None,
        micro_batch_size: int | None = None,
    ) -> Gradient:
        """Mean gradient of a batch, dropout off, by whole-model name, fp32; in ``pieces``, if there are any.

        ``length``: positions of each sequence from its start; None: all. ``against``: less that of another batch, in
        the same passes. ``micro_batch_size``: sequences of a pass on this rank, at most; None: training's. Where
        ``lends_gradient`` the gradient lies where training's own does, until the next one is made.
        """

    lends_gradient = False
    """Whether ``mean_gradient`` gives tensors that the next gradient overwrites."""

    def pieces(self) -> Mapping[str, Piece]:
        """Whole-model name -> which run of the parameter this rank updates; empty: all of each."""
        return {}

    @abstractmethod
    def local_losses(self, batch: Candidates, rows: Tensor, micro_batch_size: int, length: int) -> Tensor:
        """(len(rows),) float64: this rank's part of the mean token loss of each of ``rows``; no graph.

        The parts of the context- and pipeline-parallel ranks add up to it; tensor-parallel ranks have equal ones.
        """

    @abstractmethod
    def scoring_backend(self) -> ScoringBackend:
        """The model and optimizer as the selector sees them."""

    @abstractmethod
    def prepare_save(self, folder: Path, groups: dict[str, Gradient], copy: bool) -> PendingSave:
        """A save of weights, optimizer state and further tensors as gradients are (by group, then whole-model name).

        ``copy``: it keeps copies, so that training may go on while it writes; else it must be carried out at once.
        """

    @abstractmethod
    def load(self, folder: Path, groups: list[str]) -> dict[str, Gradient]:
        """Restore what ``prepare_save`` wrote into this engine; returns the groups asked for."""


def _is_fused(engine: EngineConfig, on_cpu: bool) -> bool:
    """Say whether kernels are fused here; raises EngineError where they were asked for and cannot be."""
    missing = missing_compiler(on_cpu) if engine.is_fused(on_cpu) else None
    if missing is None:
        return engine.is_fused(on_cpu)
    told = f"engine.kernels={engine.kernels}: torch.compile finds no {missing}"
    if engine.kernels == "fused":
        raise EngineError(f"{told}: install it, or set it to eager")
    warnings.warn(f"{told}: kernels are eager, which take more time, and more memory than estimated", stacklevel=2)
    return False
