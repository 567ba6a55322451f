"""The DeepSpeed engine: ZeRO stages 1 to 3 around the same megatron-core GPT, with tensor parallelism."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.checkpoint.pending_save import PendingSave
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import gathered
from megaopus.engine.base import Engine, StepResult
from megaopus.engine.batch_split import padded_share, seed_dropout
from megaopus.engine.config import EngineConfig
from megaopus.engine.deepspeed import checkpoint
from megaopus.engine.deepspeed.flat_matrices import ChainedOptimizer, over_flat_parts
from megaopus.engine.deepspeed.scoring import DeepSpeedScoringBackend
from megaopus.engine.deepspeed.zero_optimizer import ZeroOptimizer, norm_limit
from megaopus.engine.gpt_forward import token_losses
from megaopus.engine.token_logprobs import Asked, TokenLogprobs, packed_logprobs, unpacked
from megaopus.engine.wholes import Wholes
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig
from megaopus.models.gpt import build_gpt, transformer_config
from megaopus.optim.build import torch_optimizers
from megaopus.optim.config import OptimConfig
from megaopus.selection.backend import Candidates, Gradient, Piece
from megaopus.selection.candidates import even_share
from megaopus.selection.config import largest_divisor

LARGEST_BUCKET = 500_000_000
"""Elements of a gradient bucket; DeepSpeed's default, of which a small model needs less."""


class DeepSpeedEngine(Engine):
    """Trains a GPT with DeepSpeed's ZeRO (``engine.base.Engine`` says what each method does).

    Raises EngineError if deepspeed is not installed or the optimizer or layout is one that ZeRO cannot serve.
    """

    persistence_threshold = 100_000
    """Stage 3: parameters with fewer elements stay whole on every rank between passes."""

    def _build(
        self,
        model: ModelConfig,
        optim: OptimConfig | None,
        engine: EngineConfig,
        parallel: ParallelConfig,
        vocab_size: int,
    ) -> None:
        mesh = self.mesh
        import_deepspeed(mesh.on_cpu)
        for key, value, reason, remedy in engine.refusals(parallel, optim or OptimConfig()):
            raise EngineError(f"{key}={value}: {reason} ({remedy})")
        with mesh.megatron(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Apex is not installed
            config = transformer_config(
                model, mesh, parallel, bf16=self.bf16, recompute=engine.recompute, fused=self.fused
            )
            size = {"vocab_size": vocab_size, "max_positions": model.max_positions or self.seq_len}
            self.module = build_gpt(model, config, mesh, **size)
            if self.bf16:
                self.module.bfloat16()
            self._fill(model, engine)
        if optim is not None:
            self._make_trainable(optim, engine.zero_stage)
        elif engine.zero_stage == 3:
            self.deepspeed = self._initialized(3, None)[0]
        else:  # stages 1 and 2 shard what only training has
            self.deepspeed = self.module

    def _make_trainable(self, optim: OptimConfig, stage: int) -> None:
        """Make the optimizer, and hand both to ZeRO."""
        _sum_partial_gradients(self.module, self.mesh)
        spec = optim.spec()
        make = partial(spec.make, cls=over_flat_parts(spec.by_matrix)) if spec.by_matrix is not None else None
        optimizers = torch_optimizers(optim, self.module, self.mesh, make)
        together = ChainedOptimizer(optimizers)
        groups = {id(p): index for index, group in enumerate(together.param_groups) for p in group["params"]}
        group_of = {name: groups[id(p)] for name, p in self.module.named_parameters()}
        self.deepspeed, zero = self._initialized(stage, together, gradient_clipping=optim.clip_grad)
        self.optimizer = ZeroOptimizer(zero, optimizers, self.module, group_of, self.mesh.dp_group)
        self._reduce_gradients = self.deepspeed.allreduce_gradients
        self.deepspeed.allreduce_gradients = self._finalize_gradients

    def _initialized(self, stage: int, optimizer: Any, **more: Any) -> tuple[Any, Any]:
        """DeepSpeed's engine around the model, and what it made of ``optimizer``; ``more``: settings of its own."""
        deepspeed = import_deepspeed(self.mesh.on_cpu)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                config=self._settings(stage) | more,
                mpu=_Ranks(self.mesh),
                dist_init_required=False,
            )[:2]

    def _settings(self, stage: int) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        size = sum(p.numel() for p in self.module.parameters())
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(LARGEST_BUCKET, size)}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = self.persistence_threshold
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": 1,  # train_step scales the loss and names the last micro-batch itself
            "zero_optimization": zero,
        }
        if self.bf16:
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            settings["communication_data_type"] = "fp32"
        return settings

    # -- training and evaluation ------------------------------------------------------------------------------------

    def train_step(self, batch: Candidates, limit: float = math.inf, *, layer_grad_norms: bool = False) -> StepResult:
        share = self.training_rows(len(batch))
        if self._dropout:
            seed_dropout(self.mesh, self._seed, self.step)
        self.deepspeed.train()
        micro_batches = share.split(self.micro_batch_size)
        losses = []
        self.work.reset()
        for number, rows in enumerate(micro_batches, 1):
            self.work.start()
            self.deepspeed.set_gradient_accumulation_boundary(number == len(micro_batches))
            with self.mesh.megatron():
                losses_BS = token_losses(self.deepspeed, self._tokens(batch, rows), rules=self.rules)
                self.deepspeed.backward(losses_BS.mean() / len(micro_batches), scale_wrt_gas=False)
            losses.append(losses_BS.detach().double().mean(dim=1))
        lr = self.prepare_update()
        parts = {
            "loss": self.loss_part(torch.cat(losses)),
            "layers": self.layer_squares() if layer_grad_norms else None,
            "loss_tokens": self.loss_tokens(batch, share),
        }
        sums = self.settle(batch, parts)
        loss = sums["loss"][0] / len(batch)
        with norm_limit(self.deepspeed.optimizer, limit if math.isfinite(loss) else -1.0) as seen:
            self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        if applied:
            self.optimizer.updated()
        elif self.optimizer.sharded:
            self.optimizer.regather()  # as DeepSpeed does after an update
        self.step += 1
        return StepResult(loss=loss, grad_norm=seen[0], lr=lr, applied=applied, **self.told(sums))

    def _own_gradient(self, name: str, parameter: Any) -> Tensor | None:
        return self.optimizer.own_gradient(name)

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Reduce, as DeepSpeed does at the end of each backward pass; from there on this rank waits for others."""
        self.work.stop()
        self._reduce_gradients(*args, **kwargs)

    def evaluate(self, sequences: Candidates) -> Tensor:
        num = len(sequences)
        share = padded_share(num, self.mesh, self.micro_batch_size)  # stage 3: equally many passes on every rank
        self.deepspeed.eval()
        losses = self.local_losses(sequences, share, self.micro_batch_size, self.seq_len)
        return self._gather(losses)[:num]

    def local_losses(self, batch: Candidates, rows: Tensor, micro_batch_size: int, length: int) -> Tensor:
        losses = []
        with self.mesh.megatron(), torch.no_grad():
            for part in rows.split(micro_batch_size):
                losses_BS = token_losses(self.module, self._tokens(batch, part, length), rules=self.rules)
                losses.append(losses_BS.double().mean(dim=1))
        return torch.cat(losses)

    def token_logprobs(self, asked: Asked, micro_batch_size: int) -> TokenLogprobs:
        num, device = len(asked.tokens), self.mesh.device
        micro = max(1, min(micro_batch_size, -(-num // self.mesh.shape.dp)))
        parts, found = padded_share(num, self.mesh, micro).split(micro), []
        self.deepspeed.eval()
        with self.mesh.megatron(), torch.no_grad():
            for rows in parts:
                tokens, alternatives = asked.take(rows)
                own = Asked(tokens.to(device), alternatives.to(device))
                found.append(packed_logprobs(self.module, own, self.mesh))
            return unpacked(self._gather(torch.cat(found))[:num])

    def _tokens(self, batch: Candidates, rows: Tensor, length: int | None = None) -> Tensor:
        tokens = batch.take(rows).batch(length or self.seq_len)
        return tokens.to(self.mesh.device, non_blocking=True)

    def _gather(self, local: Tensor) -> Tensor:
        """Concatenate over the data-parallel ranks."""
        return torch.cat(gathered(local, self.mesh.dp_group, self.mesh.shape.dp))

    def mean_gradient(
        self,
        batch: Candidates,
        length: int | None = None,
        *,
        against: Candidates | None = None,
        micro_batch_size: int | None = None,
    ) -> Gradient:
        """As ``Engine.mean_gradient``; ``autograd.grad`` leaves ZeRO's hooks alone, so that no update sees it."""
        length = min(length or self.seq_len, self.seq_len)
        self.deepspeed.eval()
        with self.mesh.megatron(), self.optimizer.reduced() as total:
            self._add_gradient(batch, length, 1, micro_batch_size)
            if against is not None:
                self._add_gradient(against, length, -1, micro_batch_size)
        self.deepspeed.train()
        return total

    def _add_gradient(self, batch: Candidates, length: int, sign: int, most: int | None) -> None:
        """Make backward passes of ``sign`` times the mean loss of a batch, of which this rank takes its share.

        ``most``: sequences of one; None: training's.
        """
        share, weights = even_share(len(batch), self.mesh.shape.dp, self.mesh.dp_rank)
        weights, count = self.mesh.to_device(weights), len(share)
        micro = math.gcd(count, self.micro_batch_size) if most is None else largest_divisor(count, most)
        parameters = list(self.module.parameters())
        for rows, of_rows in zip(share.split(micro), weights.split(micro), strict=True):
            losses_BS = token_losses(self.module, self._tokens(batch, rows, length), rules=self.rules)
            weighted = losses_BS * of_rows.to(losses_BS).unsqueeze(1)
            loss = weighted.mean() * (sign * len(rows) / (len(share) * self.mesh.shape.dp))
            torch.autograd.grad(loss, parameters)

    def pieces(self) -> Mapping[str, Piece]:
        return {
            name: Piece(fragment.start, fragment.numel, self.optimizer.shape(name))
            for name, fragment in self.optimizer.fragments.items()
        }

    # -- selection and checkpoints ----------------------------------------------------------------------------------

    def scoring_backend(self) -> DeepSpeedScoringBackend:
        return DeepSpeedScoringBackend(self)

    def prepare_save(self, folder: Path, groups: dict[str, Gradient], copy: bool) -> PendingSave:
        pieces = self.pieces()
        wholes = {group: Wholes(values, pieces, lambda _: self.mesh.dp_group) for group, values in groups.items()}
        return checkpoint.prepare_save(folder, self.optimizer, self.mesh, wholes)

    def load(self, folder: Path, groups: list[str]) -> dict[str, Gradient]:
        return checkpoint.load(folder, self.optimizer, self.mesh, groups)


class _Ranks:
    """The mesh as DeepSpeed's ``mpu``: its model parallelism is megatron's tensor parallelism."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.shape.tp

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.tp_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.shape.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.dp_group

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group


def import_deepspeed(on_cpu: bool) -> Any:
    """The deepspeed package, told to leave a GPU alone if ``on_cpu``. Raises EngineError if it is not installed."""
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise EngineError(
            f"engine.name=deepspeed, but deepspeed cannot be imported ({error}): pip install 'megaopus[deepspeed]',"
            " or use engine.name=megatron"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Shared-memory collectives for CPU inference: every rank would compile them in C++ on its first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    tested = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
    if ChainedOptimizer not in tested:
        tested.append(ChainedOptimizer)
    return deepspeed


def _sum_partial_gradients(module: nn.Module, mesh: Mesh) -> None:
    """Sum over tensor-parallel ranks the gradients of which each has a part; megatron's DDP does this in its own step.

    Those are of weights that every rank holds but that see part of the positions (sequence parallelism) or of the heads
    (query/key norms).
    """
    if mesh.shape.tp == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.float() if gradient.dtype != torch.float32 else gradient.clone()
        dist.all_reduce(total, group=mesh.tp_group)
        return total.to(gradient.dtype)

    for parameter in _partial(module):
        parameter.register_hook(summed)


def _partial(module: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in module.named_parameters():
        if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
            yield parameter
