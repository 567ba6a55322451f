"""What the selector needs to know about data, model and optimizer; module.py implements it for any nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Any  # whatever the loss function takes: a tensor, or a tuple/dict of tensors, leading axis n
Gradient = dict[str, Tensor]  # parameter name -> tensor of the parameter's shape


class Candidates(Protocol):
    """A buffer of N sequences; tokens are read only when asked for."""

    @property
    def ids(self) -> Tensor:
        """(N,) int64, unique within the buffer and stable across layouts."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Candidates:
        """The candidates at ``indices`` (n,), in that order."""

    def batch(self, length: int | None = None) -> Batch:
        """Their tokens as the loss function takes them; the first ``length`` positions only, if given."""


class UpdateOperator(Protocol):
    """P_t: the optimizer's linear map from a gradient to the (negated) weight change, its state frozen."""

    def apply(self, gradient: Gradient) -> Gradient:
        """u = P_t g, so that the optimizer's own step moves the weights by -u.

        Takes any subset of the parameters; leading axes beyond a parameter's own are batch axes.
        """

    def diagonal(self, name: str) -> Tensor | None:
        """P_t of one parameter as an elementwise factor (or scalar tensor); None where it is not diagonal."""


@dataclass(frozen=True, slots=True)
class GhostLayer:
    """A matrix whose per-sample gradient is sum_t b_t a_t^T, and one module in which it is used."""

    parameter: str
    """Name of the weight, as in ``ScoringBackend.parameters()``; a tied weight has several uses."""
    module: nn.Module
    kind: str
    """linear (input a, output gradient b) or embedding (input token ids)."""
    sequence_first: bool = False
    """Activations are (T, n, features) instead of (n, T, features)."""


class ScoringBackend(Protocol):
    """A model and its optimizer as the estimators see them; ranks are the data-parallel ranks."""

    rank: int
    world_size: int

    @property
    def coarse(self) -> bool:
        """Whether forward passes see weights rounded to 16 bits."""

    def parameters(self) -> dict[str, Tensor]:
        """The weights the optimizer updates (main weights under mixed precision), in a stable order."""

    def operator(self, muon_operator: str = "paper") -> UpdateOperator | None:
        """P_t now, or None while the optimizer has no state yet. ``muon_operator``: 'paper' or 'full'."""

    def losses(self, batch: Batch) -> Tensor:
        """(n,) mean token loss of each sequence; no graph, dropout off."""

    def ghost_backward(self, batch: Batch) -> Tensor:
        """(n,) as ``losses``, after a backward pass of their sum through the activations; no weight gets a gradient."""

    def ghost_layers(self) -> list[GhostLayer]:
        """Every use of every linear and embedding matrix."""

    def gradient(self, proxy: Candidates, length: int | None = None) -> Gradient:
        """Mean gradient over the whole proxy batch (each rank takes its share), the same on every rank."""

    def exact_gradients(self, batch: Batch) -> Iterator[Gradient]:
        """The gradient of each sequence's mean loss, in float64, one sequence at a time."""

    def perturbed(self, direction: Gradient, scale: float) -> AbstractContextManager[None]:
        """Weights moved by ``scale * direction`` inside, restored to the last bit after."""

    def all_gather(self, local: Tensor) -> Tensor:
        """Concatenate equally shaped tensors along axis 0 in rank order."""


Proxy = Callable[[int], Candidates]  # step -> the proxy mini-batch of that step
