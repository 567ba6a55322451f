"""Says what the rest must know of an optimizer before it is made. Torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megaopus.settings import Setting

if TYPE_CHECKING:
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]
"""torch's parameter groups, each with its weight decay and ``peak_lr``."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Describes an optimizer that ``optim.name`` can name; its module registers it (docs/optimizers.md)."""

    make: Callable[..., Optimizer]
    """(groups, ``OptimConfig``, all of its own settings, tensor-parallel group or None) -> the optimizer."""
    shaped: tuple[str, ...]
    """Names of its state that has the parameter's shape; the last is what the update operator needs."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Its own settings (``optim.settings``): numbers, whole ones where they must be, or booleans."""
    matrices: bool = False
    """It takes the matrices inside the blocks alone; AdamW has the rest."""
    counts: bool = False
    """It keeps ``step`` in each parameter's state (of a ``LayoutOptimizer``, the class says so)."""
    stateless: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether it keeps no state at all under these settings of its own; None: it always does."""
    extra_state: Callable[[int, int], int] | None = None
    """Numbers of state beyond ``shaped`` for a whole m x n matrix, held by every rank; None: a handful."""
    map_size: Callable[[int, int], int] | None = None
    """Numbers that its update operator takes for a whole m x n matrix (a vector: m x 1); None: one for each weight."""
    factored: bool = False
    """Vectors alone have ``shaped``; a matrix has ``extra_state`` in its place."""
    update_numbers: int = 0
    """fp32 numbers for each weight that one update makes of all weights at once, on CUDA; one tensor's do not count."""
    curvature: bool = False
    """It needs gradients of the loss on labels that the model samples (``settings.curvature_every``)."""
    elementwise: bool = False
    """Its update of a number depends on nothing but that number's own history: any piece of a tensor will do."""
    by_matrix: type | None = None
    """Its class, if the update is elementwise but for ``direction``, which takes a whole matrix: an engine that keeps
    flat pieces then puts a class that brings matrices together in its place (``make`` takes it as ``cls``)."""
    whole_because: str = "needs whole tensors"
    """Why flat pieces will not do, where they will not."""
    adam_moments: bool = False
    """Its state is Adam's two moments, which megatron's distributed optimizer can shard."""
    check_installed: Callable[[], object] | None = None
    """Raises EngineError where a package that it needs cannot be imported; None: it needs none."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``OptimConfig`` for tests on small models: steps so large that a wrong one shows, no denominator so
    small that rounding does."""

    def defaults(self) -> dict[str, Any]:
        """Its own settings where none is given."""
        return {name: setting.default for name, setting in self.settings.items()}

    def state_under(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """``shaped``, or nothing where ``settings`` leave it without state."""
        return () if self.stateless is not None and self.stateless(settings) else self.shaped

    def refusal_of_pieces(self) -> str | None:
        """Return why it cannot be given flat pieces of tensors, as ZeRO keeps them; None: it can."""
        return None if self.elementwise or self.by_matrix is not None else self.whole_because


def momentum(default: float) -> Setting:
    """The setting that most of them have."""
    return Setting(default=default, min=0, below=1, doc="Decay of the average of gradients.")
