"""Optimizers wrapped for megatron: clipping across tp and pp, fp32 main weights under bf16, sharded checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaopus.distributed.mesh import Mesh
from megaopus.optim.config import OptimConfig
from megaopus.optim.muon import Muon


class ParameterState(NamedTuple):
    """What an optimizer knows of one local parameter."""

    name: str
    """As in ``module.named_parameters()``."""
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    """The settings that the parameter is updated with."""
    state: dict[str, Any]
    """torch's names -> values; tensors are shaped as the whole local parameter. Empty before the first update."""


class MainOptimizer:
    """megatron's ChainedOptimizer over one or two torch optimizers, with a learning rate set by the caller.

    ``param_groups`` carry ``peak_lr``; ``step(factor)`` applies peak_lr * factor. ``sharded``: the wrapped model chunks
    over whose gradient buffers AdamW's state is sharded; None keeps it whole on each rank.
    """

    def __init__(
        self, config: OptimConfig, module: nn.Module, mesh: Mesh, *, bf16: bool, sharded: Sequence[Any] | None = None
    ):
        from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig

        self._clip = config.clip_grad
        self._mesh = mesh
        self._module = module
        self._sharded = sharded is not None
        self._bf16 = bf16
        megatron_config = OptimizerConfig(
            optimizer="sgd" if config.name == "sgd" else "adam",
            lr=config.lr,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=self._sharded,
        )
        optimizers = torch_optimizers(config, module, mesh)
        if sharded is None:
            wrapped = [_wrap(optimizer, megatron_config, mesh, bf16) for optimizer in optimizers]
        else:
            from megaopus.optim.sharded import ShardedAdamW

            wrapped = [ShardedAdamW(optimizer, megatron_config, sharded, mesh, _init_state) for optimizer in optimizers]
        self.chained = ChainedOptimizer(wrapped)

    @property
    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers underneath; their parameters are the fp32 main weights, or this rank's pieces of them."""
        return [wrapped.optimizer for wrapped in self.chained.chained_optimizers]

    def states(self) -> list[ParameterState]:
        """Each local parameter's group and state, in the order of ``module.named_parameters()``.

        References to the optimizers' own tensors. Where AdamW is sharded, ``state`` holds ``step`` and ``exp_avg_sq``
        only, gathered over dp and cp: a collective call then.
        """
        if self._sharded:
            return self._gathered_states()
        held = {id(p): (o, group) for o in self.torch_optimizers for group in o.param_groups for p in group["params"]}
        found = []
        for name, parameter in self._module.named_parameters():
            main = getattr(parameter, "main_param", parameter)
            optimizer, group = held[id(main)]
            found.append(ParameterState(name, optimizer, group, dict(optimizer.state.get(main, {}))))
        return found

    def main_weights(self) -> dict[str, Tensor]:
        """The fp32 weights by local name: the parameters themselves, or under bf16 their main copies.

        Copies, gathered over dp and cp in a collective call, where AdamW is sharded under bf16.
        """
        if not self._bf16:
            return dict(self._module.named_parameters())
        if self._sharded:
            whole = self.chained.chained_optimizers[0].whole("param")
            return {name: whole[p] for name, p in self._module.named_parameters()}
        return {name: p.main_param for name, p in self._module.named_parameters()}  # type: ignore[attr-defined]

    def _gathered_states(self) -> list[ParameterState]:
        wrapped = self.chained.chained_optimizers[0]
        steps = wrapped.steps()
        squares = wrapped.whole("exp_avg_sq") if steps else {}
        found = []
        for name, parameter in self._module.named_parameters():
            state = {"step": torch.tensor(float(steps)), "exp_avg_sq": squares[parameter]} if steps else {}
            found.append(ParameterState(name, wrapped.optimizer, wrapped.group_of(parameter), state))
        return found

    def set_lr(self, factor: float) -> float:
        """Set every group's learning rate to its peak times ``factor``; returns AdamW's where Muon is beside it."""
        return set_lr(self.torch_optimizers, factor)

    def step(self) -> tuple[float, bool]:
        """(gradient norm before clipping, applied). A non-finite gradient anywhere leaves every weight as it is."""
        if self.chained.prepare_grads():
            return math.nan, False
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            return norm, False
        if 0 < self._clip < norm:
            parameters = [p for wrapped in self.chained.chained_optimizers for p in wrapped.get_parameters()]
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self._clip / norm)
        self.chained.step_with_ready_grads()
        return norm, True

    @torch.no_grad()
    def _gradient_norm(self) -> float:
        """Norm of the whole model's gradient, every weight counted once; the same on every rank.

        megatron's own takes one call per tensor where neither Apex nor Transformer Engine is installed.
        """
        gradients = [g for wrapped in self.chained.chained_optimizers for g in wrapped.get_main_grads_for_grad_norm()]
        norms = torch._foreach_norm(gradients) if gradients else [torch.zeros((), device=self._mesh.device)]
        square = torch.stack(norms).square().sum()
        if self._sharded:  # each rank has the gradients of its pieces
            dist.all_reduce(square)
        elif self._mesh.shape.tp * self._mesh.shape.pp > 1:
            dist.all_reduce(square, group=self._mesh.model_parallel_group)
        return math.sqrt(square)

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """State for megatron's dist_checkpointing; ``model_state`` is the model's own sharded state."""
        return self.chained.sharded_state_dict(model_state, is_loading)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state; learning rates, decays and betas stay those this optimizer was made with."""
        made_with = [[dict(group) for group in optimizer.param_groups] for optimizer in self.torch_optimizers]
        self.chained.load_state_dict(state)
        for optimizer, groups in zip(self.torch_optimizers, made_with, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: value for key, value in settings.items() if key != "params"})


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> float:
    """Set each group's learning rate to its peak times ``factor``; returns that of the last optimizer's first group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return optimizers[-1].param_groups[0]["lr"]


def torch_optimizers(
    config: OptimConfig, module: nn.Module, mesh: Mesh, muon_class: type[Muon] = Muon
) -> list[torch.optim.Optimizer]:
    """The torch optimizers of this stage: [AdamW], [SGD], or [Muon for the blocks' matrices, AdamW for the rest]."""
    named = list(module.named_parameters())
    in_blocks = [p for name, p in named if "decoder.layers." in name and p.dim() == 2]
    if config.name != "muon":
        groups = _groups([p for _, p in named], config.weight_decay, config.lr)
        if config.name == "sgd":
            return [torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)]
        return [_adamw(groups, config)]
    matrices = _groups(in_blocks, config.muon_weight_decay, config.muon_lr)
    ids = {id(p) for p in in_blocks}
    rest = _groups([p for _, p in named if id(p) not in ids], config.weight_decay, config.lr)
    muon = muon_class(
        matrices,
        lr=config.muon_lr,
        momentum=config.muon_momentum,
        ns_steps=config.muon_ns_steps,
        tp_group=mesh.tp_group,
    )
    return [muon, _adamw(rest, config)]


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def _groups(parameters: list[nn.Parameter], weight_decay: float, lr: float) -> list[dict[str, Any]]:
    """Groups with and without weight decay; the mult keys are what megatron tells groups of a checkpoint apart by."""
    decayed = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    common = {"peak_lr": lr, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "wd_mult": 1.0, **common},
        {"params": plain, "weight_decay": 0.0, "wd_mult": 0.0, **common},
    ]
    return [group for group in groups if group["params"]]


def _wrap(optimizer: torch.optim.Optimizer, config: Any, mesh: Mesh, bf16: bool) -> Any:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    if bf16:
        wrapped = Float16OptimizerWithFloat16Params(optimizer, config, None, _init_state)
    else:
        wrapped = FP32Optimizer(optimizer, config, _init_state)
    wrapped.grad_stats_parallel_group = mesh.model_parallel_group
    wrapped.tp_group = mesh.tp_group
    return wrapped


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The optimizer's state of the size of the weights; the last is what its update operator needs."""
    return ("exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("momentum_buffer",)


def _init_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Zero state of the shapes a checkpoint restores (called before loading)."""
    names = state_names(optimizer)
    for group in optimizer.param_groups:
        if group.get("momentum") == 0:  # SGD then keeps nothing
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in names:
                state[name] = torch.zeros_like(parameter)
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
