"""Optimizers wrapped for megatron: clipping across tp and pp, fp32 main weights under bf16, sharded checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from megaopus.distributed.mesh import Mesh
from megaopus.optim.config import OptimConfig
from megaopus.optim.muon import Muon


class MainOptimizer:
    """megatron's ChainedOptimizer over one or two torch optimizers, with a learning rate set by the caller.

    ``param_groups`` carry ``peak_lr``; ``step(factor)`` applies peak_lr * factor.
    """

    def __init__(self, config: OptimConfig, module: nn.Module, mesh: Mesh, *, bf16: bool):
        from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        self._clip = config.clip_grad
        self._clip_by_norm = clip_grad_by_total_norm_fp32
        megatron_config = OptimizerConfig(
            optimizer="sgd" if config.name == "sgd" else "adam",
            lr=config.lr,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        self.chained = ChainedOptimizer(
            [_wrap(optimizer, megatron_config, mesh, bf16) for optimizer in torch_optimizers(config, module, mesh)]
        )

    @property
    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers underneath; their parameters are the fp32 main weights."""
        return [wrapped.optimizer for wrapped in self.chained.chained_optimizers]

    def set_lr(self, factor: float) -> float:
        """Set every group's learning rate to its peak times ``factor``; returns the first group's."""
        for optimizer in self.torch_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        return self.torch_optimizers[-1].param_groups[0]["lr"]

    def step(self) -> tuple[float, bool]:
        """(gradient norm before clipping, applied). A non-finite gradient anywhere leaves every weight as it is."""
        if self.chained.prepare_grads():
            return math.nan, False
        norm = float(self.chained.get_grad_norm())
        if not math.isfinite(norm):
            return norm, False
        if self._clip > 0:
            for wrapped in self.chained.chained_optimizers:
                parameters = wrapped.get_parameters()
                if parameters:
                    self._clip_by_norm(parameters, max_norm=self._clip, total_norm=norm)
        self.chained.step_with_ready_grads()
        return norm, True

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """State for megatron's dist_checkpointing; ``model_state`` is the model's own sharded state."""
        return self.chained.sharded_state_dict(model_state, is_loading)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chained.load_state_dict(state)


def torch_optimizers(config: OptimConfig, module: nn.Module, mesh: Mesh) -> list[torch.optim.Optimizer]:
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
    muon = Muon(
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


def _init_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Zero state of the shapes a checkpoint restores (called before loading)."""
    keys = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}
    names = keys.get(type(optimizer), ("momentum_buffer",))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in names:
                state[name] = torch.zeros_like(parameter)
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
