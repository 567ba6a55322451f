"""Computes in one kernel what torch takes several for: token losses, rotary positions, sums of weight gradients.

The first two are compiled by torch.compile: plain functions of tensors, whose derivatives are written out, so that a
backward pass reads what the forward pass read, once. Shapes: M tokens, V columns of the vocabulary on this rank;
S positions, B micro-batch, A heads, D head size; I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SHAPES = 64
"""Shapes that a function is compiled for, each by itself, before torch refuses more."""


def missing_compiler(on_cpu: bool) -> str | None:
    """Say what torch.compile lacks on this machine; None: nothing."""
    names = (os.environ.get("CXX", "g++"), "clang++") if on_cpu else (os.environ.get("CC", "gcc"), "cc", "clang")
    if not any(map(shutil.which, names)):
        return f"compiler ({names[0]})"
    if not on_cpu and importlib.util.find_spec("triton") is None:
        return "triton (pip install triton)"
    return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled, for each shape anew: what is summed in which order depends on nothing else."""
    return _compiled(function, torch.compile)


@cache
def _compiled(function: Callable[..., Any], compiler: Any) -> Callable[..., Any]:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, _SHAPES)
    options = {"deterministic": True} if hasattr(inductor, "deterministic") else None
    return compiler(function, fullgraph=True, dynamic=False, options=options)


def token_losses(logits_SBV: Tensor, labels_BS: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(B, S) cross-entropy of each token, of logits whose columns the ranks of ``group`` share; None: all are here.

    Equal to that of logits in fp32 (fp64 ones stay such), which are never made: a pass over them forward, and one back.
    """
    seq_len, batch, vocab = logits_SBV.shape
    labels_M = labels_BS.t().reshape(-1)
    losses: Tensor = _TokenLosses.apply(logits_SBV.view(-1, vocab), labels_M, group)
    return losses.view(seq_len, batch).t()


class _TokenLosses(torch.autograd.Function):
    """log sum exp of a row of logits, less the label's; the derivative is softmax less one at the label."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        split = group is not None and group.size() > 1
        ctx.first = group.rank() * logits_MV.shape[1] if split and group is not None else 0
        own_peak_M, total_M, label_M = compiled(_of_columns)(logits_MV, labels_M, ctx.first)
        peak_M = own_peak_M
        if split:
            peak_M = own_peak_M.clone()
            dist.all_reduce(peak_M, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack((total_M * (own_peak_M - peak_M).exp(), label_M))
            dist.all_reduce(sums, group=group)
            total_M, label_M = sums
        log_sum_M = peak_M + total_M.log()
        ctx.save_for_backward(logits_MV, labels_M, log_sum_M)
        return log_sum_M - label_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        logits_MV, labels_M, log_sum_M = ctx.saved_tensors
        return compiled(_gradient)(logits_MV, labels_M, ctx.first, log_sum_M, grad_M.contiguous()), None, None


def _of_columns(logits_MV: Tensor, labels_M: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """(M,) each: the largest logit, the sum of exp(logit less it), the label's logit or 0 if it is not here."""
    values_MV = _wide(logits_MV)
    # a rank may have padding alone, of -inf
    peak_M = values_MV.amax(-1).clamp(min=torch.finfo(torch.float32).min)
    total_M = (values_MV - peak_M.unsqueeze(1)).exp().sum(-1)
    own_M = labels_M - first
    here_M = (own_M >= 0) & (own_M < logits_MV.shape[1])
    label_M = values_MV.gather(1, torch.where(here_M, own_M, 0).unsqueeze(1)).squeeze(1)
    return peak_M, total_M, torch.where(here_M, label_M, 0.0)


def _gradient(logits_MV: Tensor, labels_M: Tensor, first: int, log_sum_M: Tensor, grad_M: Tensor) -> Tensor:
    """(M, V) derivative by the logits, in their precision."""
    columns_V = torch.arange(first, first + logits_MV.shape[1], device=logits_MV.device)
    softmax_MV = (_wide(logits_MV) - log_sum_M.unsqueeze(1)).exp()
    label_MV = (columns_V == labels_M.unsqueeze(1)).to(softmax_MV.dtype)
    return ((softmax_MV - label_MV) * grad_M.unsqueeze(1)).to(logits_MV.dtype)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rotate(values_SBAD: Tensor, angles_S11R: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first R numbers of each head by its position's angles, in pairs R / 2 apart; the rest stays as it is.

    RoPE (Su et al., arXiv 2104.09864), halves paired as in GPT-NeoX; called as megatron calls Transformer Engine's.
    ``angles_S11R``: radians, fp32, the same in both halves. Raises ValueError for pairs side by side.
    """
    if interleaved:
        raise ValueError("rotary positions are paired by halves here, not side by side")
    turned: Tensor = _Rotation.apply(values_SBAD, angles_S11R)
    return turned


class _Rotation(torch.autograd.Function):
    """A rotation, whose derivative is the rotation back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return compiled(_turned)(values, angles, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return compiled(_turned)(grad, ctx.saved_tensors[0], -1.0), None


def _turned(values: Tensor, angles: Tensor, sign: float) -> Tensor:
    size = angles.shape[-1]
    turning = _wide(values[..., :size])
    left, right = turning.chunk(2, -1)
    turned = turning * angles.cos() + torch.cat((-right, left), -1) * (sign * angles.sin())
    return torch.cat((turned.to(values.dtype), values[..., size:]), -1)


def add_weight_gradient(input_MI: Tensor, grad_MO: Tensor, sum_OI: Tensor) -> None:
    """Add a linear layer's weight gradient to ``sum_OI``, in its precision; called as megatron calls Apex's."""
    if sum_OI.dtype == grad_MO.dtype:
        sum_OI.addmm_(grad_MO.t(), input_MI)
    elif _adds_wider(grad_MO.dtype, grad_MO.device):
        torch.addmm(sum_OI, grad_MO.t(), input_MI, out_dtype=sum_OI.dtype, out=sum_OI)
    else:
        sum_OI.add_(grad_MO.t() @ input_MI)


@cache
def _adds_wider(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether torch adds a product of ``dtype`` to fp32 in one kernel here: on CUDA, by some versions."""
    if device.type != "cuda":
        return False
    small, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, small, small, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def fill_in_kernels(config: Any, rotates: bool, adds_gradients: bool) -> None:
    """Have megatron call our kernels where those of Transformer Engine and Apex are not installed.

    ``config``: its TransformerConfig, whose flags for both are set here, since it would ask for the libraries.
    """
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers

    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = rotate
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
        layers._grad_accum_fusion_available = True
    config.apply_rope_fusion = rotates
    config.gradient_accumulation_fusion = adds_gradients
