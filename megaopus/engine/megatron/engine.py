"""The megatron-core engine: its schedules, DDP and sharded checkpoints around one GPT, on CPU or CUDA."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.base import StepResult
from megaopus.engine.batch_split import data_parallel_share, padded_share, seed_dropout, training_share
from megaopus.engine.config import EngineConfig
from megaopus.engine.gpt_forward import SampledLabels, token_losses
from megaopus.engine.pending_save import (
    Saving,
    check_index,
    in_process_strategy,
    megatron_saving,
    plain_common_strategy,
)
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig
from megaopus.models.flops import padded_vocab
from megaopus.models.gpt import build_gpt, initialize, transformer_config, whole_names
from megaopus.optim.build import MainOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.optim.schedule import lr_factor
from megaopus.selection.backend import Candidates, Gradient
from megaopus.selection.estimators.ghost import GhostCapture

_NOTHING = "._extra_state"
"""What Transformer Engine's layers would keep beside their weights; empty here, and a pickle in the files."""


class MegatronEngine:
    """Implements ``engine.base.Engine`` (see there for what each public method does)."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        model: ModelConfig,
        optim: OptimConfig,
        engine: EngineConfig,
        parallel: ParallelConfig,
        vocab_size: int,
        seq_len: int,
        micro_batch_size: int,
        total_steps: int,
        seed: int,
    ):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.mesh = mesh
        self.step = 0
        self.micro_batch_size = micro_batch_size
        # The interleaved schedule takes micro-batches in groups of pp.
        self.micro_batch_group = parallel.pp if parallel.vpp > 1 else 1
        self.bf16 = engine.precision == "bf16" or (engine.precision == "auto" and not mesh.on_cpu)
        self.seq_len = seq_len
        self._optim_config = optim
        self._total_steps = total_steps
        self._seed = seed
        self._dropout = model.dropout > 0
        self._worked: Any = None
        seed_dropout(mesh, seed, 0)
        with mesh.megatron(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Apex is not installed, an option we do not set is deprecated
            config = transformer_config(model, mesh, parallel, bf16=self.bf16, recompute=engine.recompute)
            size = {"vocab_size": padded_vocab(vocab_size), "max_positions": model.max_positions or seq_len}
            self.chunks = [build_gpt(model, config, mesh, chunk=chunk, **size) for chunk in range(parallel.vpp)]
            self.module = self.chunks[0] if len(self.chunks) == 1 else nn.ModuleList(self.chunks)
            if self.bf16:
                self.module.bfloat16()  # megatron leaves the position table in fp32
            initialize(self.module, model, mesh, seed)
            sharded = parallel.distributed_optimizer
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=sharded
            )
            self.ddp: Any = nn.ModuleList(DistributedDataParallel(config, ddp_config, chunk) for chunk in self.chunks)
            no_sync = [ddp.no_sync for ddp in self.ddp]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            self._reduce_gradients = finalize_model_grads
            config.finalize_model_grads_func = self._finalize_gradients
            self.optimizer = MainOptimizer(
                optim, self.module, mesh, bf16=self.bf16, sharded=list(self.ddp) if sharded else None
            )
            self._schedule = get_forward_backward_func()

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """(local name, parameter) over this rank's chunks; of several, the names begin with the chunk's number."""
        return self.module.named_parameters()

    # -- training and evaluation ------------------------------------------------------------------------------------

    def train_step(self, batch: Candidates, limit: float = math.inf) -> StepResult:
        share = training_share(len(batch), self.mesh, self.micro_batch_size)
        if self._dropout:
            seed_dropout(self.mesh, self._seed, self.step)
        if not self.ddp.training:
            self.ddp.train()
        every = self.optimizer.curvature_every
        with self.mesh.megatron():
            if every and self.step % every == 0:
                self._zero_gradients()
                sampled = SampledLabels(self.mesh, self._seed, self.step)
                self.run_local(batch, share, self.micro_batch_size, self.seq_len, forward_only=False, sampled=sampled)
                self.optimizer.take_curvature(len(batch) * self.seq_len)
            self._zero_gradients()
            begun = self._now()
            losses = self._run(batch, share, self.micro_batch_size, self.seq_len, forward_only=False)
            loss = float(losses.mean())
            lr = self.prepare_update()
            grad_norm, applied = self.optimizer.step(limit if math.isfinite(loss) else -math.inf)
        self.step += 1
        own_s = self._seconds(begun, self._worked)
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, applied=applied, own_s=own_s)

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        self._worked = self._now()
        self._reduce_gradients(*args, **kwargs)

    def _now(self) -> Any:
        """A moment of the device's work: time on the CPU, an event in the stream on CUDA."""
        if self.mesh.on_cpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        """Between two moments that are both over."""
        return end - begin if self.mesh.on_cpu else begin.elapsed_time(end) / 1000

    def prepare_update(self) -> float:
        """Give the optimizer the learning rate and momentum of the coming update; returns the learning rate."""
        return self.optimizer.set_step(self.step, lr_factor(self._optim_config, self.step, self._total_steps))

    def evaluate(self, sequences: Candidates) -> Tensor:
        num = len(sequences)
        share = padded_share(num, self.mesh, self.micro_batch_size * self.micro_batch_group)
        self.ddp.eval()
        with self.mesh.megatron(), torch.no_grad():
            losses = self._run(sequences, share, self.micro_batch_size, self.seq_len, forward_only=True)
        return losses[:num]

    def mean_gradient(self, batch: Candidates, length: int | None = None) -> Gradient:
        """Mean gradient of a global batch, dropout off, by whole-model name; fp32, the same on every dp rank.

        The training path (schedule, DDP reduction) without the update; training gradients are overwritten. Raises
        ValueError if ``batch`` cannot be split evenly over the dp ranks (and, with vpp, into groups of pp).
        """
        share = data_parallel_share(len(batch), self.mesh)
        group_size, rest = divmod(len(share), self.micro_batch_group)
        if rest:
            raise ValueError(f"{len(share)} sequences per rank are not a multiple of pp = {self.micro_batch_group}")
        length = min(length or self.seq_len, self.seq_len)
        self.ddp.eval()
        for chunk in self.chunks:
            chunk.decoder.training = True  # whether it recomputes; dropout is decided by the modules inside
        with self.mesh.megatron():
            self._zero_gradients()
            micro = math.gcd(group_size, self.micro_batch_size)
            self.run_local(batch, share, micro, length, forward_only=False, whole_gradient=True)
        # main_grad: megatron's DDP keeps each parameter's reduced gradient there
        names = dict(whole_names(self.module))
        gradient = {names[local]: p.main_grad.clone() for local, p in self.named_parameters()}
        self.ddp.train()
        return gradient

    def _zero_gradients(self) -> None:
        # The optimizer leaves param.grad aliased to main_grad: kept, the next backward pass would add it twice.
        self.optimizer.chained.zero_grad()
        for ddp in self.ddp:
            ddp.zero_grad_buffer()

    def _run(self, batch: Candidates, share: Tensor, micro: int, length: int, *, forward_only: bool) -> Tensor:
        """Run the schedule over this rank's share; (dp * len(share),) sequence losses, float64, on every rank."""
        local = self.run_local(batch, share, micro, length, forward_only=forward_only)
        shape = self.mesh.shape
        if shape.pp > 1:
            dist.all_reduce(local, group=self.mesh.pp_group)
        if shape.dp * shape.cp == 1:
            return local
        losses = torch.zeros(shape.dp, len(share), dtype=torch.float64, device=self.mesh.device)
        losses[self.mesh.dp_rank] = local
        dist.all_reduce(losses, group=self.mesh.dp_cp_group)
        return losses.view(-1)

    def run_local(
        self,
        batch: Candidates,
        share: Tensor,
        micro: int,
        length: int,
        *,
        forward_only: bool,
        whole_gradient: bool = False,
        sampled: SampledLabels | None = None,
    ) -> Tensor:
        """Run the schedule over this rank's share, without exchanging the losses: (len(share),) float64.

        They are this rank's part of each sequence's mean token loss: zeros before the last pipeline stage, the sum over
        its own positions / ``length`` on the last. Their sum over the cp and pp ranks is the mean loss.
        ``whole_gradient``: reduce gradients to every dp and cp rank, where the distributed optimizer needs pieces only.
        ``sampled``: labels are drawn by it, not read off the sequences.
        """
        if length % self.mesh.shape.cp:
            raise ValueError(
                f"{length} positions cannot be split evenly over {self.mesh.shape.cp} context-parallel ranks"
            )
        micro_batches = share.split(micro)

        def tokens() -> Iterator[tuple[Tensor, Tensor | None]]:
            for rows in micro_batches:
                chances = None if sampled is None else sampled.chances(rows, length)
                yield batch.take(rows).batch(length).to(self.mesh.device, non_blocking=True), chances

        outputs = self._schedule(
            forward_step_func=partial(self._forward_step, sampled=sampled),
            data_iterator=[tokens() for _ in self.ddp],  # each chunk reads every micro-batch
            model=list(self.ddp),
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=micro,
            forward_only=forward_only,
            force_all_reduce=whole_gradient,
        )
        if not self.mesh.is_last_stage:
            return torch.zeros(len(share), dtype=torch.float64, device=self.mesh.device)
        return torch.cat(outputs)

    def run_capturing(self, batch: Candidates, micro: int, length: int, capture: GhostCapture) -> None:
        """Forward and backward passes of each sequence's mean loss over this rank's ``batch``, seen by ``capture``."""
        shares = torch.arange(len(batch)).split(micro)
        cp = self.mesh.shape.cp

        def micro_batches() -> Iterator[tuple[slice, Tensor]]:
            for rows in shares:
                tokens = batch.take(rows).batch(length).to(self.mesh.device, non_blocking=True)
                yield slice(int(rows[0]), int(rows[-1]) + 1), tokens

        def forward_step(iterator: Iterator[tuple[slice, Tensor]], model: Any) -> tuple[Tensor, Any]:
            capture.rows, tokens = next(iterator)
            output = token_losses(model, tokens, cp, self.mesh.cp_rank)
            if not output.requires_grad:  # no layer of this stage is captured
                output.requires_grad_()
            capture.watch(output)
            return output, sum_of_losses

        def sum_of_losses(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
            """The schedule multiplies by cp and divides by the number of micro-batches."""
            total = losses_BS.sum() / length
            return total * len(shares) / cp, total.detach()

        self._schedule(
            forward_step_func=forward_step,
            data_iterator=[micro_batches() for _ in self.ddp],
            model=list(self.ddp),
            num_microbatches=len(shares),
            seq_length=length,
            micro_batch_size=micro,
            forward_only=False,
        )

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Backward passes inside end without any reduction of weight gradients over ranks."""
        config = self.chunks[0].config
        saved = config.finalize_model_grads_func, config.no_sync_func
        config.finalize_model_grads_func = config.no_sync_func = None
        try:
            yield
        finally:
            config.finalize_model_grads_func, config.no_sync_func = saved

    def _forward_step(
        self, data_iterator: Iterator[tuple[Tensor, Tensor | None]], model: Any, sampled: SampledLabels | None = None
    ) -> tuple[Tensor, Any]:
        tokens, chances = next(data_iterator)
        length = tokens.shape[1] - 1

        def sequence_losses(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
            """What megatron's schedule minimises, and what it hands back: this rank's part of each sequence's mean."""
            # Both are parts that add up over cp; the schedule multiplies the first by the cp that DDP will divide by.
            return losses_BS.sum() / (len(tokens) * length), losses_BS.detach().double().sum(dim=1) / length

        if sampled is not None and chances is not None:
            return sampled.losses(model, tokens, chances), sequence_losses
        return token_losses(model, tokens, self.mesh.shape.cp, self.mesh.cp_rank), sequence_losses

    # -- selection and checkpoints ----------------------------------------------------------------------------------

    def scoring_backend(self) -> Any:
        from megaopus.engine.megatron.scoring import MegatronScoringBackend

        return MegatronScoringBackend(self)

    def saving(self, folder: Path, groups: dict[str, Gradient], copy: bool) -> Saving:
        from megatron.core import dist_checkpointing

        with self.mesh.megatron():
            state = self._sharded_state(groups, is_loading=False)
            request = dist_checkpointing.save(
                state, str(folder), sharded_strategy=in_process_strategy(), async_sharded_save=True
            )
            return megatron_saving(request, folder, self.mesh, copy)

    def load(self, folder: Path, groups: list[str]) -> dict[str, Gradient]:
        from megatron.core import dist_checkpointing

        check_index(folder)
        weights = dict(self.named_parameters())
        names = list(whole_names(self.module))
        empty = {
            group: {name: torch.empty_like(weights[local], dtype=torch.float32) for local, name in names}
            for group in groups
        }
        with self.mesh.megatron(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # megatron reads through names that torch deprecates
            wanted = self._sharded_state(empty, is_loading=True)
            state = dist_checkpointing.load(wanted, str(folder), common_strategy=plain_common_strategy())
            self._load_weights(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.optimizer.load_whole(state.get("optimizer_whole", {}))
        return {group: {name: state[group][local] for local, name in names} for group in groups}

    def _load_weights(self, state: dict[str, Any]) -> None:
        missing, unexpected = self.module.load_state_dict(state, strict=False)
        if wrong := [*unexpected, *(name for name in missing if not name.endswith(_NOTHING))]:
            raise EngineError(f"the checkpoint's weights are not this model's: {', '.join(wrong)}")

    def _sharded_state(self, groups: dict[str, Gradient], is_loading: bool) -> dict[str, Any]:
        """Weights, optimizer state, and groups of tensors by whole-model name, sharded as the parameters are."""
        from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

        model_state: dict[str, Any] = {}
        for index, chunk in enumerate(self.chunks):
            prefix = f"{index}." if len(self.chunks) > 1 else ""
            model_state |= {
                prefix + name: value
                for name, value in chunk.sharded_state_dict().items()
                if not name.endswith(_NOTHING)
            }
        state: dict[str, Any] = {
            "model": model_state,
            "optimizer": self.optimizer.sharded_state_dict(model_state, is_loading),
        }
        if whole := self.optimizer.sharded_whole(dict(whole_names(self.module))):
            state["optimizer_whole"] = whole
        for group, values in groups.items():
            state[group] = {
                local: make_sharded_optimizer_tensor(model_state[local], values[name], prefix=group)
                for local, name in whole_names(self.module)
            }
        return state
