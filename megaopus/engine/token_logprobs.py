"""Reads log-probabilities of single tokens off one forward pass of a megatron GPT, as an evaluation asks for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.cpu import plain_calls
from megaopus.distributed.mesh import Mesh
from megaopus.engine.gpt_forward import SequenceRules, cut_sequences, loss_mask
from megaopus.models.context_parts import own_part

_MARKED = SequenceRules(marked=True)
_NO_TOKEN = torch.iinfo(torch.int64).max


class Asked(NamedTuple):
    """Says of which tokens the log-probabilities are asked for; on the CPU, the same on every rank."""

    tokens: Tensor
    """(n, T + 1) int64: token t + 1 is the label of t; labels that are not asked for are marked, ~t instead of t."""
    alternatives: Tensor
    """(n, K) int64 tokens that could stand in the place of a row's last label asked for; K may be 0."""

    def take(self, rows: Tensor) -> Asked:
        """Those of ``rows`` (k,)."""
        return Asked(self.tokens[rows], self.alternatives[rows])


class TokenLogprobs(NamedTuple):
    """Holds what a model says of the labels asked for; at other positions all are 0."""

    logprobs: Tensor
    """(n, T) log-probability of each label, natural, float64 of what is computed in fp32."""
    best: Tensor
    """(n, T) int64 the most probable token; of equally probable ones the lowest."""
    alternatives: Tensor
    """(n, K) log-probability of each alternative."""


def packed_logprobs(model: Any, asked: Asked, mesh: Mesh) -> Tensor:
    """(B, S / cp, 2 + K) float64 of this rank's positions: log-probability, best token, alternatives.

    On earlier pipeline stages: the stage's activations. The softmax is taken where a label is asked for, alone.
    """
    cp, cp_rank = mesh.shape.cp, mesh.cp_rank
    cut = cut_sequences(model, asked.tokens, cp, cp_rank, _MARKED)
    with plain_calls():
        output = model(cut.inputs, cut.positions, cut.mask)
    if not getattr(model, "module", model).post_process:
        return output
    mask_BS = loss_mask(asked.tokens, _MARKED)
    last_B = mask_BS.shape[1] - 1 - mask_BS.flip(1).int().argmax(1)
    is_last_BS = torch.arange(mask_BS.shape[1], device=last_B.device) == last_B.unsqueeze(1)
    mask_BS, is_last_BS = own_part(mask_BS, cp, cp_rank), own_part(is_last_BS, cp, cp_rank)
    alternatives_BSK = asked.alternatives.unsqueeze(1).expand(-1, mask_BS.shape[1], -1)
    labels_ML = torch.cat([cut.labels[mask_BS].unsqueeze(1), alternatives_BSK[mask_BS]], 1)
    logprobs_ML, best_M = _of_rows(output[mask_BS].float(), labels_ML, mesh)
    logprobs_ML[:, 1:] *= is_last_BS[mask_BS].unsqueeze(1)
    shape = (*mask_BS.shape, 2 + asked.alternatives.shape[1])
    found = torch.zeros(shape, dtype=torch.float64, device=output.device)
    found[mask_BS] = torch.cat([logprobs_ML[:, :1], best_M.double().unsqueeze(1), logprobs_ML[:, 1:]], 1)
    return found


def unpacked(found: Tensor) -> TokenLogprobs:
    """Of (n, T, 2 + K), gathered over all ranks."""
    return TokenLogprobs(found[..., 0], found[..., 1].long(), found[..., 2:].sum(1))


def _of_rows(logits_MV: Tensor, labels_ML: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """(M, L) log-probabilities and (M,) best tokens, from this tensor-parallel rank's columns of the logits."""
    columns, group, split = logits_MV.shape[1], mesh.tp_group, mesh.shape.tp > 1
    first = mesh.tp_rank * columns
    own_peak_M, best_M = logits_MV.max(-1)
    peak_M, best_M = own_peak_M.clone(), best_M + first
    own_ML = labels_ML - first
    here_ML = (own_ML >= 0) & (own_ML < columns)
    label_ML = torch.where(here_ML, logits_MV.gather(1, torch.where(here_ML, own_ML, 0)), 0.0)
    if split:
        dist.all_reduce(peak_M, op=dist.ReduceOp.MAX, group=group)
        best_M = torch.where(own_peak_M == peak_M, best_M, _NO_TOKEN)
        dist.all_reduce(best_M, op=dist.ReduceOp.MIN, group=group)
    total_M1 = (logits_MV - peak_M.unsqueeze(1)).exp_().sum(-1, keepdim=True)
    sums = torch.cat([total_M1, label_ML], 1).double()
    if split:
        dist.all_reduce(sums, group=group)
    return sums[:, 1:] - peak_M.double().unsqueeze(1) - sums[:, :1].log(), best_M
