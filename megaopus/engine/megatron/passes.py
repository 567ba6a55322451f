"""Forward and backward passes of one GPT through megatron-core's schedules, on CPU or CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megaopus.distributed.config import ParallelConfig
from megaopus.engine.base import Engine
from megaopus.engine.config import EngineConfig
from megaopus.engine.gpt_forward import SampledLabels, token_losses
from megaopus.engine.token_logprobs import Asked, packed_logprobs
from megaopus.models.config import ModelConfig
from megaopus.models.context_parts import runs_of
from megaopus.models.expert_loads import ExpertBalance
from megaopus.models.gpt import build_gpt, canonical_names, transformer_config
from megaopus.optim.build import MixedPrecisionOptimizer
from megaopus.optim.config import OptimConfig
from megaopus.selection.backend import Candidates, Gradient, Piece
from megaopus.selection.estimators.ghost import GhostCapture

_BUCKET: int | None = None
"""Weights whose gradients are summed over ranks together while others are computed; None: megatron's 40 million."""
_MicroBatch = tuple[Tensor, Tensor | None, Tensor | None]
"""(tokens (B, S + 1), uniform numbers that sampled labels are drawn by (B, S), weights of the sequences (B,))."""


class MegatronPasses(Engine):
    """Holds the model chunks of this rank, wrapped in megatron's DDP, and runs its schedules over them."""

    def _build(
        self,
        model: ModelConfig,
        optim: OptimConfig | None,
        engine: EngineConfig,
        parallel: ParallelConfig,
        vocab_size: int,
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        mesh = self.mesh
        # The interleaved schedule takes micro-batches in groups of pp.
        self.micro_batch_group = parallel.pp if parallel.vpp > 1 else 1
        with mesh.megatron(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Apex is not installed, an option we do not set is deprecated
            config = transformer_config(
                model,
                mesh,
                parallel,
                bf16=self.bf16,
                recompute=engine.recompute,
                fused=self.fused,
                adds_gradients=optim is not None,
            )
            size = {"vocab_size": vocab_size, "max_positions": model.max_positions or self.seq_len}
            self.chunks = [build_gpt(model, config, mesh, chunk=chunk, **size) for chunk in range(parallel.vpp)]
            self.module = self.chunks[0] if len(self.chunks) == 1 else nn.ModuleList(self.chunks)
            config.moe_router_enable_expert_bias = False  # routers have theirs by now, and ``experts`` moves them
            self.experts = ExpertBalance(self.module, model)
            if self.bf16:
                self.module.bfloat16()  # megatron leaves the position table in fp32
            self._fill(model, engine)
            self.ddp: Any = nn.ModuleList(self.chunks)
            if optim is not None:
                self._make_trainable(optim, config, parallel)
            self._schedule = get_forward_backward_func()

    def _make_trainable(self, optim: OptimConfig, config: Any, parallel: ParallelConfig) -> None:
        """Wrap the chunks in megatron's DDP, which holds their gradients, and make the optimizer."""
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        shape, sharded = self.mesh.shape, parallel.distributed_optimizer
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=shape.dp * shape.cp > 1 and parallel.overlaps(self.mesh.on_cpu),
            use_distributed_optimizer=sharded,
            bucket_size=_BUCKET,
        )
        self.ddp = nn.ModuleList(DistributedDataParallel(config, settings, chunk) for chunk in self.chunks)
        no_sync = [ddp.no_sync for ddp in self.ddp]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._reduce_gradients = finalize_model_grads
        config.finalize_model_grads_func = self._finalize_gradients
        self.optimizer = MixedPrecisionOptimizer(
            optim,
            self.module,
            self.mesh,
            bf16=self.bf16,
            sharded=list(self.ddp) if sharded else None,
            late=sharded and parallel.gathers_late(self.mesh.on_cpu),
        )

    lends_gradient = True

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Give each local parameter, as it is after the last update."""
        if hasattr(self, "optimizer"):
            self.optimizer.settle()
        yield from super().named_parameters()

    def pieces(self) -> Mapping[str, Piece]:
        if not self.optimizer.is_sharded:
            return {}
        runs, shapes = self.optimizer.pieces(), {local: p.shape for local, p in self.named_parameters()}
        return {
            name: Piece(runs[local].start, runs[local].main.numel(), shapes[local])
            for local, name in canonical_names(self.module)
        }

    def gather(self, values: Mapping[str, Tensor]) -> Gradient:
        """Put pieces of all ranks together where training has its gradients; whole-model name -> view. Collective."""
        names = {local: name for local, name in canonical_names(self.module) if name in values}
        found = self.optimizer.gather_into_gradients(
            {local: partial(values.__getitem__, name) for local, name in names.items()}
        )
        return {names[local]: value for local, value in found.items()}

    def cut(self, wholes: Gradient) -> Gradient:
        """This rank's pieces of tensors of the parameters' shapes; themselves where there are none."""
        pieces = self.pieces()
        return {
            name: value.view(-1).narrow(0, pieces[name].start, pieces[name].numel) if pieces else value
            for name, value in wholes.items()
        }

    def run_local(
        self,
        batch: Candidates,
        share: Tensor,
        micro: int,
        length: int,
        *,
        forward_only: bool,
        sampled: SampledLabels | None = None,
    ) -> Tensor:
        """``run_micro_batches`` of this rank's ``share`` of a batch, ``micro`` sequences at a time."""
        micro_batches = [(batch, rows) for rows in share.split(micro)]
        return self.run_micro_batches(micro_batches, length, forward_only=forward_only, sampled=sampled)

    def run_micro_batches(
        self,
        micro_batches: Sequence[tuple[Candidates, Tensor]],
        length: int,
        *,
        forward_only: bool = False,
        sampled: SampledLabels | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Run the schedule over rows of batches, equally many at a time, without exchanging the losses: (n,) float64.

        They are this rank's part of each of the n sequences' mean token loss: zeros before the last pipeline stage, the
        sum over its own positions / ``length`` on the last. Their sum over the cp and pp ranks is the mean loss.
        ``sampled``: labels are drawn by it, not read off the sequences. ``weights`` (n,): gradients are those of the
        mean over n, and over data-parallel ranks, of the weighted losses.
        """
        micro, count = len(micro_batches[0][1]), sum(len(rows) for _, rows in micro_batches)
        if length % self.mesh.shape.cp:
            raise ValueError(
                f"{length} positions cannot be split evenly over {self.mesh.shape.cp} context-parallel ranks"
            )

        def tokens() -> Iterator[_MicroBatch]:
            for number, (batch, rows) in enumerate(micro_batches):
                uniforms = None if sampled is None else sampled.uniforms(rows, length)
                found = batch.take(rows).batch(length).to(self.mesh.device, non_blocking=True)
                yield found, uniforms, None if weights is None else weights.split(micro)[number]

        outputs = self._schedule(
            forward_step_func=partial(self._forward_step, sampled=sampled),
            data_iterator=[tokens() for _ in self.ddp],  # each chunk reads every micro-batch
            model=list(self.ddp),
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=micro,
            forward_only=forward_only,
        )
        if not self.mesh.is_last_stage:
            return torch.zeros(count, dtype=torch.float64, device=self.mesh.device)
        return torch.cat(outputs)

    def run_logprobs(self, asked: Asked, rows: Tensor, micro: int) -> Tensor:
        """(len(rows), T, 2 + K) float64 of ``rows`` (k,), as ``packed_logprobs``.

        What this rank knows of them: its own positions, on the last pipeline stage; 0 elsewhere.
        """
        cp, length = self.mesh.shape.cp, asked.tokens.shape[1] - 1
        parts = rows.split(micro)

        def step(iterator: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
            tokens, alternatives = asked.take(next(iterator))
            own = Asked(tokens.to(self.mesh.device), alternatives.to(self.mesh.device))
            return packed_logprobs(model, own, self.mesh), lambda found: (found.sum(), found)

        outputs = self._schedule(
            forward_step_func=step,
            data_iterator=[iter(parts) for _ in self.ddp],
            model=list(self.ddp),
            num_microbatches=len(parts),
            seq_length=length,
            micro_batch_size=micro,
            forward_only=True,
        )
        width = 2 + asked.alternatives.shape[1]
        found = torch.zeros(len(rows), length, width, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.is_last_stage:
            runs = runs_of(length, cp, self.mesh.cp_rank)
            for run, part in zip(runs, torch.cat(outputs).chunk(len(runs), 1), strict=True):
                found[:, run] = part
        return found

    def local_losses(self, batch: Candidates, rows: Tensor, micro_batch_size: int, length: int) -> Tensor:
        with self.mesh.megatron(), torch.no_grad():
            return self.run_local(batch, rows, micro_batch_size, length, forward_only=True)

    def run_capturing(self, batch: Candidates, micro: int, length: int, capture: GhostCapture) -> None:
        """Forward and backward passes of each sequence's mean loss over this rank's ``batch``, seen by ``capture``."""
        shares = [slice(start, min(start + micro, len(batch))) for start in range(0, len(batch), micro)]
        cp = self.mesh.shape.cp

        def micro_batches() -> Iterator[tuple[slice, Tensor]]:
            for rows in shares:
                tokens = batch.take(torch.arange(rows.start, rows.stop)).batch(length)
                yield rows, tokens.to(self.mesh.device, non_blocking=True)

        def forward_step(iterator: Iterator[tuple[slice, Tensor]], model: Any) -> tuple[Tensor, Any]:
            capture.rows, tokens = next(iterator)
            output = token_losses(model, tokens, cp, self.mesh.cp_rank, self.rules)
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
            with ExitStack() as stack:
                for ddp in self.ddp if hasattr(self, "optimizer") else ():
                    stack.enter_context(ddp.no_sync())
                yield
        finally:
            config.finalize_model_grads_func, config.no_sync_func = saved

    @contextmanager
    def gradients_apart(self) -> Iterator[None]:
        """Backward passes inside give each weight's gradient to who asks, and add it to none of training's."""
        layers: list[Any] = [
            each for each in self.module.modules() if getattr(each, "gradient_accumulation_fusion", False)
        ]
        try:
            for layer in layers:
                layer.gradient_accumulation_fusion = False
            yield
        finally:
            for layer in layers:
                layer.gradient_accumulation_fusion = True

    def _forward_step(
        self, data_iterator: Iterator[_MicroBatch], model: Any, sampled: SampledLabels | None = None
    ) -> tuple[Tensor, Any]:
        tokens, uniforms, weights = next(data_iterator)
        length = tokens.shape[1] - 1

        def sequence_losses(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
            """Return what megatron's schedule minimises, and hands back: this rank's part of each sequence's mean."""
            # Both are parts that add up over cp; the schedule multiplies the first by the cp that DDP will divide by.
            weighted = losses_BS if weights is None else losses_BS * weights.to(losses_BS).unsqueeze(1)
            return weighted.sum() / (len(tokens) * length), losses_BS.detach().double().sum(dim=1) / length

        if sampled is not None and uniforms is not None:
            return sampled.losses(model, tokens, uniforms), sequence_losses
        cp, cp_rank = self.mesh.shape.cp, self.mesh.cp_rank
        return token_losses(model, tokens, cp, cp_rank, self.rules), sequence_losses

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        self.work.stop()
        self._reduce_gradients(*args, **kwargs)
