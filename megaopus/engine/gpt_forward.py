"""One forward pass of a megatron GPT over sequences: the loss of the tokens, or of labels that the model samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.cpu import plain_calls
from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import gathered
from megaopus.models.context_parts import own_part, runs_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRules:
    """Says which tokens of a sequence see which, and which count in the loss."""

    document_end: int | None = None
    """The token that ends a document."""
    isolated: bool = False
    """Whether documents of one sequence do not see each other, and each begins at position 0."""
    skip_first: bool = False
    """Whether the loss leaves out the first token of a document, which nothing of it foretells."""
    marked: bool = False
    """Whether some tokens are context alone, which the loss leaves out: such a token t is given as ~t (-1 - t)."""

    @property
    def masked(self) -> bool:
        """Tell whether the loss may leave out tokens."""
        return self.skip_first or self.marked


PLAIN = SequenceRules()
"""A token sees all that is before it in its sequence, and all count."""


def token_losses(model: Any, tokens: Tensor, cp: int = 1, cp_rank: int = 0, rules: SequenceRules = PLAIN) -> Tensor:
    """(B, S / cp) loss of each token of (B, S + 1) tokens: inputs are all but the last, labels all but the first.

    Under context parallelism those of this rank's positions. On earlier pipeline stages: the stage's activations. Where
    ``rules`` leave tokens out, their losses are 0 and those of the n others S / n times what they are, so that the mean
    over S is that of the others. Of a sequence with n = 0 all are 0.
    """
    cut = cut_sequences(model, tokens, cp, cp_rank, rules)
    with plain_calls():
        output = model(cut.inputs, cut.positions, cut.mask, labels=cut.labels)
    return _weighed(output, cut.weights)


class SampledLabels:
    """Labels drawn from the model's own distribution, for one update; the same draws at every layout.

    Each is where the cumulated probability reaches a uniform number that (seed, step, sequence, position) determine.
    """

    def __init__(self, mesh: Mesh, seed: int, step: int, rules: SequenceRules = PLAIN):
        self._mesh, self._rules = mesh, rules
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
        """As ``token_losses``, of sampled labels.

        ``model``: as the schedule hands it over, wrapped.
        """
        cp, cp_rank = self._mesh.shape.cp, self._mesh.cp_rank
        cut = cut_sequences(model, tokens, cp, cp_rank, self._rules)
        with plain_calls():
            output = model(cut.inputs, cut.positions, cut.mask)
        gpt = model.module
        if not gpt.post_process:
            return output
        uniforms = own_part(uniforms, cp, cp_rank)
        labels = self._draw(output.detach(), uniforms)
        return _weighed(gpt.compute_language_model_loss(labels, output.transpose(0, 1).contiguous()), cut.weights)

    def _draw(self, logits_BSV: Tensor, uniforms_BS: Tensor) -> Tensor:
        """(B, S) ids from this tensor-parallel rank's part of the vocabulary's logits."""
        group, size, rank = self._mesh.tp_group, self._mesh.shape.tp, self._mesh.tp_rank
        logits_BSV = logits_BSV.float()
        peak_BS = logits_BSV.amax(-1)
        if size > 1:
            dist.all_reduce(peak_BS, op=dist.ReduceOp.MAX, group=group)
        shares_BSV = _summable((logits_BSV - peak_BS.unsqueeze(-1)).exp_())
        cumulated_BSV = shares_BSV.cumsum(-1)
        bounds = torch.stack(gathered(cumulated_BSV[..., -1], group, size)).cumsum(0).double()  # of the ranks' parts
        cumulated_BSV = cumulated_BSV.double()
        point_BS = uniforms_BS * bounds[-1]
        lower_BS = bounds[rank - 1] if rank else torch.zeros_like(point_BS)
        # no further than this part reaches, whatever rounding says: columns without probability lie behind
        own_BS = torch.minimum(point_BS - lower_BS, cumulated_BSV[..., -1])
        index_BS = (cumulated_BSV < own_BS.unsqueeze(-1)).sum(-1) + rank * logits_BSV.shape[-1]
        labels_BS = torch.where((point_BS > lower_BS) & (point_BS <= bounds[rank]), index_BS, 0)
        if size > 1:
            dist.all_reduce(labels_BS, group=group)
        return labels_BS


def _summable(shares: Tensor) -> Tensor:
    """Give numbers of 0 to 1 in float64; or, for sums that must repeat themselves, times 2^44 in whole numbers.

    2^18 columns of them stay below what int64 holds.
    """
    return (shares.double() * 2.0**44).long() if _sums_vary(shares.device) else shares.double()


def _sums_vary(device: torch.device) -> bool:
    """Say whether torch refuses to add up floats along a row: CUDA does so in no fixed order."""
    return device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


class Cut(NamedTuple):
    """Holds what one context-parallel rank is given of sequences, (B, S / cp) each."""

    inputs: Tensor
    labels: Tensor
    positions: Tensor
    """Of the inputs, in their documents if these are isolated."""
    mask: Tensor | None
    """(B, 1, S / cp, T) of what each position sees of the T up to this rank's last; None: all before it."""
    weights: Tensor | None
    """Of the losses; None: all alike."""


def cut_sequences(model: Any, tokens: Tensor, cp: int, cp_rank: int, rules: SequenceRules) -> Cut:
    known = plain_tokens(tokens) if rules.marked else tokens
    inputs = known[:, :-1]

    def own(values: Tensor) -> Tensor:
        return own_part(values, cp, cp_rank)

    places = torch.arange(inputs.shape[1], device=tokens.device)
    positions, mask = places.expand_as(inputs), None
    if rules.isolated:
        assert rules.document_end is not None
        starts = document_starts(inputs, rules.document_end)
        seen = runs_of(len(places), cp, cp_rank)[-1].stop
        mask = _document_mask(own(starts), own_part(places, cp, cp_rank, 0), seen, next(model.parameters()).dtype)
        positions = positions - starts
    weights = own(_weights(loss_mask(tokens, rules))) if rules.masked else None
    return Cut(own(inputs), own(known[:, 1:]).contiguous(), own(positions), mask, weights)


def _document_mask(starts_BS: Tensor, places_S: Tensor, seen: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, T) which of the first T = ``seen`` positions those at ``places_S`` see, made once for all layers.

    On CUDA as 0 and -inf of the model's ``dtype``: of a bool mask each layer would make, and keep, such a one.
    """
    device = starts_BS.device
    keys_T = torch.arange(seen, device=device)
    mask = (keys_T <= places_S.unsqueeze(1)) & (keys_T >= starts_BS[:, None, :, None])
    if device.type == "cpu":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(mask.logical_not_(), -torch.inf)


def plain_tokens(tokens: Tensor) -> Tensor:
    """Give marked tokens as those that they are."""
    return torch.where(tokens < 0, ~tokens, tokens)


def loss_mask(tokens: Tensor, rules: SequenceRules) -> Tensor:
    """(B, S) bool of (B, S + 1) tokens: whose labels count in the loss."""
    mask = tokens[:, 1:] >= 0
    if rules.skip_first:
        mask = mask & (plain_tokens(tokens[:, :-1]) != rules.document_end)
    return mask


def _weights(mask_BS: Tensor) -> Tensor:
    """(B, S) float32: S / n for each of the n labels of a sequence that count, 0 for the others."""
    count_B1 = mask_BS.sum(1, keepdim=True).clamp(min=1)
    return mask_BS * (mask_BS.shape[1] / count_B1)


def _weighed(output: Tensor, weights: Tensor | None) -> Tensor:
    """Weigh losses (B, S); what earlier stages hand on, (S, B, H), is as it was."""
    return output if weights is None or output.dim() != 2 else output * weights


def document_starts(tokens_BS: Tensor, end: int) -> Tensor:
    """(B, S) int64: the position at which the document of each token begins; one ends with its token ``end``."""
    next_BS = torch.arange(1, tokens_BS.shape[1] + 1, device=tokens_BS.device).expand_as(tokens_BS)
    begins_BS = torch.where(tokens_BS == end, next_BS, 0).roll(1, dims=1)
    begins_BS[:, 0] = 0
    return begins_BS.cummax(dim=1).values
