"""Picks by the norm of each candidate's own gradient: what would move the weights most.

The control of importance sampling (Katharopoulos and Fleuret, "Not all samples are created equal", ICML 2018). No
gradient of a candidate is formed where its factors are smaller: |sum_t b_t a_t^T|^2 = sum_ts (a_t . a_s)(b_t . b_s).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection.backend import Candidates, GhostLayer, ScoringBackend
from megaopus.selection.estimators.ghost import per_sample_gradient
from megaopus.selection.estimators.layers import require_enough, require_some
from megaopus.selection.methods.registry import register_method
from megaopus.selection.pieces import parameter_shapes
from megaopus.selection.scoring import Scores, ScoringStep


@register_method(
    "grad_norm",
    flops=(1.0, "forward, input gradients, and at most each layer's gradient per sequence"),
    micro_batches=True,
    needs={
        "hooks": "captures the activations of layers",
        "whole_sequence": "squared norms of a sequence's parts do not add up to that of the whole: it needs cp = 1",
    },
)
def grad_norm(step: ScoringStep) -> Scores:
    """Score by the norm of the gradient of all weights that are used in linear layers alone."""
    uses = [layer for layer in step.backend.ghost_layers() if layer.kind == "linear" and not layer.tied]
    step.once("some layer is scored", lambda: require_some(step.backend, len(uses), "linear"))
    told: list[Event] = []
    enough = functools.partial(require_enough, step.backend, parameter_shapes(step.backend), uses, "linear")
    step.once("enough weights are captured", lambda: told.extend(enough()))
    # The parts of a matrix that ranks hold do not overlap, so neither do their squares.
    squares = step.measured(lambda passes: squared_norms(step.backend, step.share, uses, passes))
    return Scores(utilities=step.sum_parts(squares).sqrt(), events=tuple(told))


def squared_norms(
    backend: ScoringBackend, candidates: Candidates, uses: Sequence[GhostLayer], passes: Mapping[str, Any]
) -> Tensor:
    """(n,) float64: of each candidate's gradient of the weights of ``uses``, as far as this rank's parts of them go."""
    total = torch.zeros(len(candidates), dtype=torch.float64, device=backend.device)
    kept: dict[str, tuple[slice, list[tuple[Tensor, Tensor]]]] = {}

    def finish(layer: GhostLayer) -> None:
        rows, factors = kept.pop(layer.parameter, (slice(0), []))
        if factors:
            total[rows] += _squared_norm(layer, *(torch.cat(parts, 1) for parts in zip(*factors, strict=True)))

    def consume(layer: GhostLayer, rows: slice, act_a: Tensor, grad_b: Tensor) -> None:
        # A gradient is the sum over all uses of its weight: it is whole when the next candidates come.
        if layer.parameter in kept and kept[layer.parameter][0] != rows:
            finish(layer)
        factors = tuple(each.reshape(len(grad_b), -1, each.shape[-1]) for each in (act_a, grad_b))
        kept.setdefault(layer.parameter, (rows, []))[1].append((factors[0], factors[1]))

    with torch.no_grad():
        backend.ghost_pass(candidates, uses, consume, **passes)
        for layer in uses:
            finish(layer)
    return total


def _squared_norm(layer: GhostLayer, act_NTI: Tensor, grad_NTO: Tensor) -> Tensor:
    """(N,) float64 |sum_t b_t a_t^T|^2, by the products of positions or by the gradients, whichever is less work."""
    act_NTI, grad_NTO = act_NTI.float(), grad_NTO.float()
    length, inputs, outputs = act_NTI.shape[1], act_NTI.shape[2], grad_NTO.shape[2]
    if length * (inputs + outputs) < inputs * outputs:
        products = torch.bmm(act_NTI, act_NTI.transpose(1, 2)) * torch.bmm(grad_NTO, grad_NTO.transpose(1, 2))
    else:
        products = per_sample_gradient(layer, torch.Size((outputs, inputs)), act_NTI, grad_NTO).square()
    return products.flatten(1).sum(1, dtype=torch.float64)
