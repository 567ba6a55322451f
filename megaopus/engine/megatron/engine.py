"""Trains a GPT with megatron-core and keeps its sharded checkpoints, on CPU or CUDA."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.checkpoint.pending_save import PendingSave
from megaopus.engine.base import StepResult
from megaopus.engine.batch_split import padded_share, seed_dropout
from megaopus.engine.gpt_forward import SampledLabels
from megaopus.engine.megatron.checkpoint import (
    check_index,
    load_dealt,
    megatron_saving,
    save_strategy,
)
from megaopus.engine.megatron.passes import MegatronPasses
from megaopus.engine.megatron.scoring import MegatronScoringBackend
from megaopus.engine.token_logprobs import Asked, TokenLogprobs, unpacked
from megaopus.errors import EngineError
from megaopus.models.gpt import canonical_names
from megaopus.selection.backend import Candidates, Gradient
from megaopus.selection.candidates import even_share
from megaopus.selection.config import largest_divisor

_NOTHING = "._extra_state"
"""What Transformer Engine's layers would keep beside their weights; empty here, and a pickle in the files."""


class MegatronEngine(MegatronPasses):
    """Trains and checkpoints a GPT with megatron-core (``engine.base.Engine`` says what each method does)."""

    # -- training and evaluation ------------------------------------------------------------------------------------

    def train_step(self, batch: Candidates, limit: float = math.inf, *, layer_grad_norms: bool = False) -> StepResult:
        share = self.training_rows(len(batch))
        if self._dropout:
            seed_dropout(self.mesh, self._seed, self.step)
        if not self.ddp.training:
            self.ddp.train()
        every, tokens = self.optimizer.curvature_every, self.loss_tokens(batch, share)
        with self.mesh.megatron():
            if every and self.step % every == 0:
                self._zero_gradients()
                sampled = SampledLabels(self.mesh, self._seed, self.step, self.rules)
                with self.experts.without_losses():
                    self.run_local(
                        batch, share, self.micro_batch_size, self.seq_len, forward_only=False, sampled=sampled
                    )
                counted = len(batch) * self.seq_len if tokens is None else self.mesh.total(tokens)[0]
                self.optimizer.take_curvature(int(counted))
            self._zero_gradients()
            self.work.reset()
            self.work.start()
            with self.experts.counted():
                losses = self.run_local(batch, share, self.micro_batch_size, self.seq_len, forward_only=False)
            lr = self.prepare_update()
            parts = {
                "loss": self.loss_part(losses),
                "square": self.optimizer.prepare().view(1),
                "layers": self.layer_squares() if layer_grad_norms else None,
                "loss_tokens": tokens,
                "experts": self.experts.counts(self.mesh.device),
            }
            sums = self.settle(batch, parts)
            loss, grad_norm = sums["loss"][0] / len(batch), math.sqrt(sums["square"][0])
            applied = math.isfinite(loss) and self.optimizer.step(grad_norm, limit)
            if applied and "experts" in sums:
                self.experts.even_out(sums["experts"])
        self.step += 1
        loads = self.experts.told(sums["experts"]) if "experts" in sums else None
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, applied=applied, expert_loads=loads, **self.told(sums))

    def _own_gradient(self, name: str, parameter: Any) -> Tensor | None:
        if (piece := self.optimizer.own_piece(parameter)) is not None:
            return parameter.main_grad.view(-1)[piece]
        return None

    def evaluate(self, sequences: Candidates) -> Tensor:
        num = len(sequences)
        share = padded_share(num, self.mesh, self.micro_batch_size * self.micro_batch_group)
        self.ddp.eval()
        with self.mesh.megatron(), torch.no_grad():
            return self._losses(sequences, share)[:num]

    def token_logprobs(self, asked: Asked, micro_batch_size: int) -> TokenLogprobs:
        num, shape, group = len(asked.tokens), self.mesh.shape, self.micro_batch_group
        micro = max(1, min(micro_batch_size, -(-num // (shape.dp * group))))
        rows = padded_share(num, self.mesh, micro * group)
        self.ddp.eval()
        with self.mesh.megatron(), torch.no_grad():
            found = self.run_logprobs(asked, rows, micro)
        if shape.pp > 1:
            dist.all_reduce(found, group=self.mesh.pp_group)
        if shape.dp * shape.cp > 1:
            of_ranks = found.new_zeros(shape.dp, *found.shape)
            of_ranks[self.mesh.dp_rank] = found
            dist.all_reduce(of_ranks, group=self.mesh.dp_cp_group)
            found = of_ranks.flatten(0, 1)
        return unpacked(found[:num])

    def mean_gradient(
        self,
        batch: Candidates,
        length: int | None = None,
        *,
        against: Candidates | None = None,
        micro_batch_size: int | None = None,
    ) -> Gradient:
        """The training path (schedule, DDP reduction) without the update, into training's own gradients.

        A pipeline has at least as many micro-batches of a batch as stages, where there are as many sequences.
        """
        group, mesh = self.micro_batch_group, self.mesh
        batches = [each for each in (batch, against) if each is not None]
        shares = [(each, *even_share(len(each), mesh.shape.dp, mesh.dp_rank, group)) for each in batches]
        length = min(length or self.seq_len, self.seq_len)
        unit = math.gcd(*(len(rows) // group for _, rows, _ in shares))
        total = sum(len(rows) for _, rows, _ in shares)
        if micro_batch_size is None:
            micro = math.gcd(unit, self.micro_batch_size)
        else:
            micro = largest_divisor(unit, min(micro_batch_size, unit * group // mesh.shape.pp))
        weights = [
            of_rows * (sign * total / len(rows)) for sign, (_, rows, of_rows) in zip((1, -1), shares, strict=False)
        ]
        self.ddp.eval()
        for chunk in self.chunks:
            chunk.decoder.training = True  # whether it recomputes; dropout is decided by the modules inside
        with self.mesh.megatron():
            self._zero_gradients()
            of_each = [(each, part) for each, rows, _ in shares for part in rows.split(micro)]
            self.run_micro_batches(of_each, length, weights=mesh.to_device(torch.cat(weights)))
        self.ddp.train()
        # main_grad: megatron's DDP keeps each parameter's reduced gradient there
        names = dict(canonical_names(self.module))
        return self.cut({names[local]: p.main_grad for local, p in self.named_parameters()})

    def absorb(self, batch: Candidates) -> bool:
        """Show the optimizer the mean gradient of a batch as an update's, at a learning rate of 0: no weight moves.

        Any number of sequences, dropout off. False, and the state is as it was, if the gradient is not finite.
        """
        self.mean_gradient(batch)
        self.optimizer.set_step(self.step, 0.0)
        with self.mesh.megatron(), torch.no_grad():
            norm = math.sqrt(self.mesh.total(self.optimizer.prepare().view(1))[0])
            done = self.optimizer.step(norm)
        self.step += 1
        return done

    def _zero_gradients(self) -> None:
        # The optimizer leaves param.grad aliased to main_grad: kept, the next backward pass would add it twice.
        self.optimizer.chained.zero_grad()
        for ddp in self.ddp:
            ddp.zero_grad_buffer()

    def _losses(self, batch: Candidates, share: Tensor) -> Tensor:
        """(dp * len(share),) sequence losses, float64, on every rank; each makes the passes of its share."""
        local = self.run_local(batch, share, self.micro_batch_size, self.seq_len, forward_only=True)
        shape = self.mesh.shape
        if shape.pp > 1:
            dist.all_reduce(local, group=self.mesh.pp_group)
        if shape.dp * shape.cp == 1:
            return local
        losses = torch.zeros(shape.dp, len(share), dtype=torch.float64, device=self.mesh.device)
        losses[self.mesh.dp_rank] = local
        dist.all_reduce(losses, group=self.mesh.dp_cp_group)
        return losses.view(-1)

    # -- selection and checkpoints ----------------------------------------------------------------------------------

    def scoring_backend(self) -> MegatronScoringBackend:
        return MegatronScoringBackend(self)

    def prepare_save(self, folder: Path, groups: dict[str, Gradient], copy: bool) -> PendingSave:
        from megatron.core import dist_checkpointing

        self.optimizer.settle()
        with self.mesh.megatron():
            if self.optimizer.is_sharded:  # as an optimizer that shares nothing has them
                names = dict(canonical_names(self.module))
                mine = {names[local] for local, p in self.named_parameters() if self.optimizer.saves(p)}
                groups = {
                    group: {name: value.cpu() for name, value in self.gather(values).items() if name in mine}
                    for group, values in groups.items()
                }
            state = self._sharded_state(groups, is_loading=False)
            request = dist_checkpointing.save(
                state, str(folder), sharded_strategy=save_strategy(self.mesh), async_sharded_save=True
            )
            return megatron_saving(request, folder, self.mesh, copy)

    def load(self, folder: Path, groups: list[str]) -> dict[str, Gradient]:
        check_index(folder)
        weights = dict(self.named_parameters())
        names = list(canonical_names(self.module))
        read = [(local, name) for local, name in names if self.optimizer.loads(weights[local])]
        device = "cpu" if self.optimizer.is_sharded else self.mesh.device
        empty = {
            group: {name: torch.empty(weights[local].shape, device=device) for local, name in read} for group in groups
        }
        with self.mesh.megatron(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # megatron reads through names that torch deprecates
            wanted = self._sharded_state(empty, is_loading=True)
            pieces = self.optimizer.is_sharded
            state = load_dealt(wanted, folder, self.mesh, lambda part: part == "model" or not pieces)
            self._load_weights(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.optimizer.load_whole(state.get("optimizer_whole", {}))
        nothing = {name: torch.empty(0) for _, name in names}
        found = {group: nothing | self.cut({name: state[group][local] for local, name in read}) for group in groups}
        return {
            group: {name: value.to(self.mesh.device, copy=self.optimizer.is_sharded) for name, value in values.items()}
            for group, values in found.items()
        }

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
        if whole := self.optimizer.sharded_whole(dict(canonical_names(self.module))):
            state["optimizer_whole"] = whole
        like = {
            local: self.optimizer.sharded_like(parameter, model_state[local], is_loading)
            for local, parameter in self.named_parameters()
        }
        for group, values in groups.items():
            state[group] = {
                local: make_sharded_optimizer_tensor(like[local], values[name], prefix=group)
                for local, name in canonical_names(self.module)
                if name in values
            }
        return state
