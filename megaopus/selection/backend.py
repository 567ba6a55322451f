"""States what the selector must know of data, model and optimizer; torch_backend.py answers for any nn.Module.

Two kinds of ranks: data-parallel ones hold the same weights and each score a share of the candidates; model-parallel
ones (tensor, pipeline, context) share one model, work on the same candidates and each know a part of every number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megaopus.selection.old_names import warn

Batch = Any  # whatever the loss function takes: a tensor, or a tuple/dict of tensors, leading axis n
Gradient = dict[str, Tensor]
"""Parameter -> tensor of the parameter's shape; of a backend that has ``pieces`` this rank's run of it, (numel,)."""


class Candidates(Protocol):
    """A buffer of N sequences; tokens are read only when asked for.

    It may have ``signatures``, (N,) int64 that are equal for equal sequences, where they are known unread; None: they
    are not. On every rank or none, and the same as in the run that a state of a selector comes from.
    """

    @property
    def ids(self) -> Tensor:
        """(N,) int64, unique within the buffer and stable across layouts."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Candidates:
        """The candidates at ``indices`` (n,), in that order; an index may repeat, to fill a rank's share up."""

    def batch(self, length: int | None = None) -> Batch:
        """Their tokens as the loss function takes them; the first ``length`` positions only, if given."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a whole matrix (of a vector, for update rules) that a rank holds: what is at ``index`` along ``dim``,
    rows (dim 0) or columns (dim 1)."""

    dim: int
    index: Tensor
    """(local size,) int64 positions along ``dim`` in the whole."""
    size: int
    """Of the whole along ``dim``."""
    gather: Callable[[Tensor], Tensor]
    """This rank's part -> the whole; a collective call of the ranks that share the matrix."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The run of a flattened parameter that the optimizer of one data-parallel rank updates."""

    start: int
    numel: int
    """0: other ranks update all of it."""
    shape: torch.Size
    """Of what this rank's model holds of the parameter."""


class TextFeatures(Protocol):
    """Tells what is known of candidates without a model, by their ids (n,)."""

    def features(self, ids: Tensor) -> Tensor:
        """(n, F) float32, entries of the order of 1."""

    def log_odds(self, ids: Tensor) -> Tensor:
        """(n,) float64: log-likelihood under the proxy's n-grams less that under the pool's, nats a token."""

    def importance(self, ids: Tensor) -> Tensor:
        """(n,) float64: log of how much likelier the proxy holds such a sequence than the pool."""

    def proxy_importance(self, ids: Tensor) -> Tensor:
        """(n,) float64: the same of sequences of the proxy, by their ids. Asked with ``utilities`` odds alone."""

    def judges(self, ids: Tensor) -> Tensor:
        """(n,) bool: which sequences of the proxy are kept to judge scores by. Asked with ``utilities`` odds alone."""

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        """(n,) int64, equal for equal sequences; ``near``: mostly for similar ones too."""

    def domains(self, ids: Tensor) -> Tensor:
        """(n,) int64 number of the domain."""


def __getattr__(name: str) -> Any:
    if name == "Traits":
        warn("backend.Traits", "backend.TextFeatures")
        return TextFeatures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class UpdateOperator(Protocol):
    """P_t: the optimizer's linear map from a gradient to the (negated) weight change, its state frozen."""

    def apply(self, gradient: Gradient) -> Gradient:
        """u = P_t g, so that the optimizer's own step moves the weights by -u.

        Takes any subset of the parameters, as this rank holds them (collective where a matrix is shared); leading axes
        beyond a parameter's own are batch axes. Where optimizers share the work it is inside ``whole`` that it can.
        """

    def direction(self, gradient: Mapping[str, Tensor], names: Iterable[str]) -> Gradient:
        """P_t^T g of the parameters ``names`` of a gradient as ``ScoringBackend.gradient`` gives it, in such pieces.

        New tensors, made piece by piece. Collective where ranks share a matrix. Operators of version 0.1 have none.
        """

    def whole(self, keeps: bool = True) -> AbstractContextManager[UpdateOperator]:
        """Give, inside, the map of whole parameters; ``keeps``: what was worked out for one is kept.

        Collective where optimizers share the work, and so is what is asked for then. Operators of version 0.1 have no
        such method.
        """

    def transposed(self) -> UpdateOperator:
        """P_t^T: <P_t g, h> = <g, P_t^T h>. P_t itself where it is self-adjoint."""

    def diagonal(self, name: str) -> Tensor | None:
        """P_t of one parameter as an elementwise factor (or scalar tensor); None where it is not diagonal."""

    def bounded(self, gradient: Mapping[str, Tensor]) -> UpdateOperator:
        """The same map once the optimizer has seen how large ``gradient`` is: P gradient is then a step it could take.

        Adam's second moment takes the gradient in; other states do not bound a step and stay frozen. Linear as before.
        """

    def sides(self, name: str) -> tuple[Tensor | None, Tensor | None] | None:
        """(left, right) with P_t g = left g right, None for the identity; None if P_t is not of this form.

        A factor along the dimension in which a matrix is shared maps this rank's part to its contribution to the whole
        (left: whole x local, right: local x whole); the contributions of all parts add up to P_t g.
        """


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
    collect: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """(a, b) as the module saw them -> those of all positions, where ranks share the sequence."""
    first_row: int = 0
    """Embedding: the token id of the first row that this rank holds."""
    counted: bool = True
    """False: another rank holds the same weight, sees the same tokens, and counts this use."""
    transposed: bool = False
    """The weight is (inputs, outputs), as in transformers' Conv1D: a and b are handed out in each other's place."""
    tied: bool = False
    """The matrix has uses of the other kind as well, perhaps on another pipeline stage."""


GhostConsumer = Callable[[GhostLayer, slice, Tensor, Tensor], None]
"""(layer, rows of the candidates, inputs a (n, T, I) or token ids (n, T), output gradients b (n, T, O))."""


class ScoringBackend(Protocol):
    """A model and its optimizer as the estimators see them."""

    rank: int
    """Data-parallel rank."""
    world_size: int
    """Data-parallel ranks."""

    @property
    def multiple(self) -> int:
        """Candidates are scored in multiples of this many at a time, over all ranks; copies fill the last one up."""

    @property
    def device(self) -> torch.device:
        """Return where the model computes."""

    @property
    def computes_in_16_bits(self) -> bool:
        """Return whether forward passes see weights rounded to 16 bits, by autocast or as they are kept."""

    def counts(self, name: str) -> float:
        """Return how often the numbers that this rank holds of a weight count: over all ranks once a data-parallel one.

        1, or 0 where another of the ranks that share a model holds the same numbers, and counts them.
        """

    def parameters(self) -> dict[str, Tensor]:
        """The weights the optimizer updates (main weights under mixed precision), in a stable order."""

    def shards(self) -> dict[str, Shard]:
        """Those of the parameters that are parts of larger matrices."""

    def operator(self, muon_operator: str = "paper") -> UpdateOperator | None:
        """P_t now, or None while the optimizer has no state yet. ``muon_operator``: as in ``build_operator``."""

    def losses(self, candidates: Candidates, *, length: int | None = None, micro_batch_size: int = 16) -> Tensor:
        """(n,) float64: this rank's part of each candidate's mean token loss; no graph, dropout off."""

    def count_labelled(self, candidates: Candidates, *, length: int | None = None) -> int:
        """Say how many of this rank's candidates have a label that counts in the loss of their first ``length`` tokens.

        Whatever the model makes of them: its weights may be nan. Asked where no loss is a number; a backend that has
        no such method is taken to have no labels then.
        """

    def ghost_pass(
        self,
        candidates: Candidates,
        layers: Iterable[GhostLayer],
        consume: GhostConsumer,
        *,
        length: int | None = None,
        micro_batch_size: int = 16,
    ) -> None:
        """A forward and backward pass of each sequence's mean loss through the activations alone.

        Hands a and b of every use of ``layers`` to ``consume``; no weight gets a gradient.
        """

    def ghost_layers(self) -> list[GhostLayer]:
        """Every use of every linear and embedding matrix on this rank."""

    def gradient(
        self,
        proxy: Candidates,
        length: int | None = None,
        *,
        against: Candidates | None = None,
        micro_batch_size: int | None = None,
    ) -> Gradient:
        """Mean gradient over the whole proxy batch (each rank takes its share), as this rank's weights are held.

        ``against``: less that over another batch, in the same passes. ``micro_batch_size``: sequences of a forward and
        backward pass on this rank, at most; None: as many as the backend has in ``micro_batch_size``, which fit beside
        training. Backends of version 0.1 know neither, and are not given the second one.
        """

    @property
    def lends_gradient(self) -> bool:
        """Return whether what ``gradient`` gives lies where training's own does: gone with the next, and ``gathered``.

        It may be changed either way. A backend that has no such property keeps what it gave.
        """

    def pieces(self) -> Mapping[str, Piece]:
        """Parameter -> which run of it gradients have on this rank; empty: the whole of each, on every rank.

        A backend that has no such method gives whole gradients.
        """

    def gathered(self, values: Mapping[str, Tensor]) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Give, inside, the whole of ``values`` (parameter -> this rank's run, (numel,)), in the parameters' shapes.

        All at once where there is room for them that training had taken anyway; else one is put together when it is
        read, and gone with the next. Collective, and so may reading be: every rank reads the same ones in the same
        order.
        """

    def sum_pieces(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum each of ``values`` (all of one shape) over the ranks that share the pieces of a parameter; one message.

        Asked only where there are ``pieces``.
        """

    def exact_gradients(self, batch: Batch) -> Iterator[Gradient]:
        """The gradient of each sequence's mean loss, in float64, one sequence at a time."""

    def perturbed(self, direction: Gradient) -> AbstractContextManager[Callable[[float | Tensor], None]]:
        """Gives ``move``: ``move(scale)`` sets the weights to what they were before, plus ``scale * direction``.

        They are restored to the last bit after. Collective, and so is ``move``. ``scale`` may be () float64 on the
        device, so that nobody waits for it; a backend without ``lends_gradient``, of before, is given a number.
        """

    def sum_over_ranks(self, parts: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) float64 parts of this rank's candidates -> (N,) for the whole buffer, the same on every rank.

        One message: parts of one candidate are added over the model-parallel ranks, ``tally`` (k,) over all ranks.
        There may be no parts (n = 0).
        """

    def from_rank_0(self, values: Tensor) -> Tensor:
        """The first rank's values, on every rank; on the CPU."""

    def check_alike(self, picked_ids: Tensor) -> None:
        """Raise RuntimeError, which names ranks and picks, unless every rank picked these ids (K,) in this order.

        Collective. A backend that has none is taken at its word; one whose updates compare picks may do nothing here.
        """

    def sum_over_model(self, values: dict[str, Tensor], axis: str) -> dict[str, Tensor]:
        """Sum each of ``values`` (by parameter, or one by any name; all of one shape) over model-parallel ranks.

        ``axis``: over which. 'matrix': those among which matrices are split. 'gradient': all that see parts of the same
        candidates' gradients of a parameter; a weight that several pipeline stages hold is summed over them and kept by
        the first (zero on the others). 'stages': pipeline stages.
        """

    def gather_candidates(self, values: Tensor) -> Tensor:
        """Concatenate over the data-parallel ranks, in their order."""


Proxy = Callable[[int], Candidates]  # step -> the proxy mini-batch of that step
