"""One forward pass of a megatron GPT over sequences: the loss of the tokens, or of labels that the model samples."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.collectives import gathered
from megaopus.distributed.cpu import plain_calls
from megaopus.distributed.mesh import Mesh


def token_losses(model: Any, tokens: Tensor, cp: int = 1, cp_rank: int = 0, end: int | None = None) -> Tensor:
    """(B, S / cp) loss of each token of (B, S + 1) tokens: inputs are all but the last, labels all but the first.

    Under context parallelism those of this rank's positions. On earlier pipeline stages: the stage's activations.
    ``end``: the token that ends a document, whose successors do not see it nor what is before; None: they do.
    """
    labels = tokens[:, 1:] if cp == 1 else tokens[:, 1:].chunk(cp, 1)[cp_rank]
    inputs, positions, starts = _inputs(tokens, cp, cp_rank, end)
    with plain_calls():
        return model(inputs, positions, starts, labels=labels.contiguous())


class SampledLabels:
    """Labels drawn from the model's own distribution, for one update; the same draws at every layout.

    Each is where the cumulated probability reaches a uniform number that (seed, step, sequence, position) determine.
    """

    def __init__(self, mesh: Mesh, seed: int, step: int, end: int | None = None):
        self._mesh, self._end = mesh, end
        self._key = f"{seed}:labels:{step}"

    def uniforms(self, rows: Tensor, length: int) -> Tensor:
        """(n, S) float64 uniform in (0, 1): one for each position of the global batch's sequences ``rows`` (n,)."""
        found = []
        for row in rows.tolist():
            digest = hashlib.sha256(f"{self._key}:{row}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            found.append(torch.rand(length, generator=generator, dtype=torch.float64))
        return torch.stack(found).clamp_(min=1e-12).to(self._mesh.device)

    def losses(self, model: Any, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """As ``token_losses``, of sampled labels. ``model``: as the schedule hands it over, wrapped."""
        cp, cp_rank = self._mesh.shape.cp, self._mesh.cp_rank
        inputs, positions, starts = _inputs(tokens, cp, cp_rank, self._end)
        with plain_calls():
            output = model(inputs, positions, starts)
        gpt = model.module
        if not gpt.post_process:
            return output
        uniforms = uniforms if cp == 1 else uniforms.chunk(cp, 1)[cp_rank]
        labels = self._draw(output.detach(), uniforms)
        return gpt.compute_language_model_loss(labels, output.transpose(0, 1).contiguous())

    def _draw(self, logits_BSV: Tensor, uniforms_BS: Tensor) -> Tensor:
        """(B, S) ids from this tensor-parallel rank's part of the vocabulary's logits."""
        group, size, rank = self._mesh.tp_group, self._mesh.shape.tp, self._mesh.tp_rank
        logits_BSV = logits_BSV.float()
        peak_BS = logits_BSV.amax(-1)
        if size > 1:
            dist.all_reduce(peak_BS, op=dist.ReduceOp.MAX, group=group)
        cumulated_BSV = (logits_BSV - peak_BS.unsqueeze(-1)).exp_().double().cumsum(-1)
        bounds = torch.stack(gathered(cumulated_BSV[..., -1], group, size)).cumsum(0)  # of the ranks' parts
        point_BS = uniforms_BS * bounds[-1]
        lower_BS = bounds[rank - 1] if rank else torch.zeros_like(point_BS)
        # no further than this part reaches, whatever rounding says: columns without probability lie behind
        own_BS = torch.minimum(point_BS - lower_BS, cumulated_BSV[..., -1])
        index_BS = (cumulated_BSV < own_BS.unsqueeze(-1)).sum(-1) + rank * logits_BSV.shape[-1]
        labels_BS = torch.where((point_BS > lower_BS) & (point_BS <= bounds[rank]), index_BS, 0)
        if size > 1:
            dist.all_reduce(labels_BS, group=group)
        return labels_BS


def _inputs(tokens: Tensor, cp: int, cp_rank: int, end: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(inputs, their positions in their documents, where these start or None) of this context-parallel rank."""
    inputs = tokens[:, :-1]
    positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
    starts = None
    if end is not None:
        starts = document_starts(inputs, end)
        positions = positions - starts
    if cp > 1:
        inputs, positions = (x.chunk(cp, 1)[cp_rank] for x in (inputs, positions))
        starts = starts if starts is None else starts.chunk(cp, 1)[cp_rank]
    return inputs, positions, starts


def document_starts(tokens_BS: Tensor, end: int) -> Tensor:
    """(B, S) int64: the position at which the document of each token begins; one ends with its token ``end``."""
    next_BS = torch.arange(1, tokens_BS.shape[1] + 1, device=tokens_BS.device).expand_as(tokens_BS)
    begins_BS = torch.where(tokens_BS == end, next_BS, 0).roll(1, dims=1)
    begins_BS[:, 0] = 0
    return begins_BS.cummax(dim=1).values
