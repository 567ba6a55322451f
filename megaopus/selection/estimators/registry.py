"""Names every estimator of utilities, with what the rest must know of it. Torch is imported when one is looked up.

A new one is a file beside this that calls ``register_estimator``; so do other packages (docs/library.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from megaopus.selection.registry import Flops, Registry, origin_of

if TYPE_CHECKING:
    from torch import Tensor

    from megaopus.selection.backend import Candidates, GhostConsumer, ScoringBackend, UpdateOperator


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Asks for utilities: of which candidates, against which gradient, in what passes."""

    backend: ScoringBackend
    candidates: Candidates
    """Those of this data-parallel rank."""
    operator: UpdateOperator
    proxy_gradient: Mapping[str, Tensor]
    """As ``ScoringBackend.gradient`` gives it if the estimator was registered to take ``pieces``, else whole."""
    length: int | None
    """Tokens of each candidate that are scored; None: all."""
    micro_batch_size: int
    keep_updates: bool
    """Whether a redundancy term needs the candidates' updates, or sketches of them."""
    total: int | None = None
    """Candidates of all ranks; what ``sum_over_ranks`` gives beyond is of copies that fill shares up. None: no more."""


EVERY_LAYER = "*"
"""In place of a layer's name: what is summed over all layers of the model, those of other pipeline stages too."""


class Estimator(Protocol):
    """Estimates utilities step after step; made once for each selector."""

    def uses(self, backend: ScoringBackend, gradient: Mapping[str, Tensor]) -> Sequence[Any]:
        """The parameters, or uses of matrices, on this rank that it sums over."""

    def estimate(self, request: Request) -> tuple[Tensor, dict[str, Tensor] | None]:
        """((n,) float64 parts of <P g_z, g_proxy>, by layer rows (n, m) or None).

        Both are of this rank's candidates and of its part of the model. The inner products of the rows, of each layer
        or of their one sum (``EVERY_LAYER``), make the Gram matrix; None unless ``request.keep_updates``.
        """


@runtime_checkable
class Refining(Protocol):
    """An estimator that measures how well it estimates, and goes by what it found; it has a state."""

    def refine(self, request: Request, parts: Tensor, step: int) -> Tensor:
        """``parts`` that ``estimate`` gave at a training step, or better ones. Collective."""

    def signal_to_error(self, utilities: Tensor) -> float | None:
        """Spread of the latest utilities (N,) over the error of each; None: not known."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values that later estimates depend on; empty where there are none yet."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""


@runtime_checkable
class Unread(Protocol):
    """An estimator of which some numbers lie on the device once it has estimated: they are read with the utilities."""

    def unread(self) -> Tensor:
        """(k,) float64, the same on every rank."""

    def read(self, numbers: Tensor) -> None:
        """Take them, (k,) on the CPU."""


@runtime_checkable
class SeesLosses(Protocol):
    """An estimator that passes candidates through the model as it is, and so sees their losses."""

    def losses(self) -> Tensor:
        """(n,) float64 this rank's part of each candidate's mean token loss, of the latest ``estimate``."""


class Sketch(Estimator, Protocol):
    """An estimator whose sketches stand in for the updates of one that has none."""

    def sketches(self, request: Request, extra_consumer: GhostConsumer | None = None) -> dict[str, Tensor]:
        """By layer rows (n, m) as ``estimate`` gives; ``extra_consumer`` sees the same pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Says what memory is counted from."""

    weights: int
    """Of this rank."""
    replicated: int = 0
    """Those of ``weights`` that every tensor-parallel rank has."""
    matrices: Sequence[int]
    """Weights of this rank's part of each matrix that ghost estimators sum over, as the model uses them."""
    shapes: Sequence[tuple[int, int]] = ()
    """(rows, columns) of each of them whole, over all tensor-parallel ranks."""
    candidates: int
    """Scored by each data-parallel rank in a step."""
    micro_batch_size: int
    model_width: int = 4
    """Bytes of a weight that passes are made with."""
    largest: int = 0
    """Weights of this rank's part of the largest parameter."""
    scaled: bool = True
    """Whether the update map multiplies each weight's gradient by a number of its own."""
    shards: int | Fraction = 1
    """Ranks that share the optimizer's work, and with it what is of a gradient's size: the mean over weights."""
    gathers: bool = False
    """Whether one parameter at a time is put together of their pieces, in memory of its own."""


class Taken(NamedTuple):
    """Says what an estimator's tensors of one kind take on a rank."""

    size: int
    """Bytes."""
    how: str
    """The assumption behind it."""
    kept: bool = False
    """They stay from step to step; else they are there while candidates are scored."""
    whole: int = 0
    """Bytes among them that every tensor-parallel rank has; of the others each has a part."""
    before: tuple[str, ...] | None = None
    """They are gone before the pass over candidates, and before the rows that this names; None: they are there."""


Memory = Callable[[Any, Sizes], Mapping[str, "Taken | tuple[int, str]"]]
"""(SelectionConfig, sizes) -> what -> ``Taken``, of which the first two fields will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorEntry:
    """Says what is known of an estimator before it is made."""

    name: str
    make: Callable[[Any], Estimator]
    """SelectionConfig -> the estimator."""
    flops: Flops
    """Of utilities alone."""
    gram: Flops | None
    """Of utilities and what a redundancy term needs, together; None: it borrows the sketches that ``gram`` names."""
    shared: float
    """FLOPs, as in ``flops``, of the pass that it shares with sketches that it borrows."""
    sketches: bool
    """Whether it lends its sketches: its ``make`` gives a ``Sketch``."""
    auto_layers: str
    """What ``layers=auto`` means: all or linear."""
    micro_batches: bool
    """Whether it scores ``score_micro_batch_size`` candidates at a time."""
    needs: Mapping[str, str]
    """Need (``registry.NEEDS``) -> the reason for it, as a sentence goes on."""
    memory: Memory
    wide_factors: bool
    """Whether it makes fp32 copies of the gradients of layers' outputs."""
    pieces: bool
    """Whether it takes a gradient in pieces, as the optimizers of data-parallel ranks share it; else it is gathered."""
    example: Mapping[str, Any]
    """Settings with which tests compare it over layouts."""
    origin: str


ESTIMATORS: Registry[EstimatorEntry] = Registry("estimator", __name__.rpartition(".")[0])
"""Every estimator."""
Made = TypeVar("Made", bound=Callable[[Any], Any])


def put_together(sizes: Sizes) -> Mapping[str, Taken]:
    """Return the row of the matrix that is put together of pieces, if one is."""
    size = 4 * max(sizes.matrices, default=0) if sizes.gathers else 0
    return {"matrix put together": Taken(size, "fp32, one at a time", whole=size)} if size else {}


def _nothing(config: Any, sizes: Sizes) -> Mapping[str, Taken]:
    return {}


def register_estimator(
    name: str,
    *,
    flops: tuple[float, str],
    gram: tuple[float, str] | None = None,
    shared: float = 0.0,
    sketches: bool = False,
    auto_layers: str = "linear",
    micro_batches: bool = True,
    needs: Mapping[str, str] | None = None,
    memory: Memory = _nothing,
    wide_factors: bool = False,
    pieces: bool = False,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Made], Made]:
    """Decorate what makes an estimator from a SelectionConfig (a class will do), so that ``estimator`` can name it.

    ``flops`` and ``gram``: (FLOPs per scored token over FLOPs per trained token, why). ``EstimatorEntry`` says what the
    others mean. Raises ValueError for a name that is taken and for an unknown need.
    """

    def register(make: Made) -> Made:
        entry = EstimatorEntry(
            name=name,
            make=make,
            flops=Flops(*flops),
            gram=None if gram is None else Flops(*gram),
            shared=shared,
            sketches=sketches,
            auto_layers=auto_layers,
            micro_batches=micro_batches,
            needs=dict(needs or {}),
            memory=memory,
            wide_factors=wide_factors,
            pieces=pieces,
            example=dict(example or {}),
            origin=origin_of(make),
        )
        ESTIMATORS.add(entry)
        return make

    return register


def scoring_flops(name: str, gram: str, redundancy: bool) -> Flops:
    """Return what estimator ``name`` costs, with its own or ``gram``'s sketches if there is a ``redundancy`` term."""
    entry = ESTIMATORS.find(name)
    if not redundancy:
        return entry.flops
    if entry.gram is not None:
        return entry.gram
    lent = ESTIMATORS.find(gram).gram
    assert lent is not None  # who lends sketches has a cost for them
    if entry.shared:
        return Flops(
            entry.flops.ratio + lent.ratio - entry.shared,
            f"{entry.flops.why}; the same pass sketches the Gram matrix",
        )
    return Flops(entry.flops.ratio + lent.ratio, f"{entry.flops.why}; then for the Gram matrix {lent.why}")


def scoring_memory(config: Any, sizes: Sizes) -> dict[str, Taken]:
    """Return what takes memory -> how much on a rank, of a SelectionConfig's estimator."""
    entry = ESTIMATORS.find(config.estimator)
    rows = dict(entry.memory(config, sizes))
    if config.redundancy and entry.gram is None:
        rows |= ESTIMATORS.find(config.gram).memory(config, sizes)
    return {what: Taken(*row) for what, row in rows.items()}


def names() -> tuple[str, ...]:
    """Every estimator."""
    return ESTIMATORS.names()


def sketch_names() -> tuple[str, ...]:
    """Those that lend their sketches to others."""
    return tuple(entry.name for entry in ESTIMATORS if entry.sketches)
