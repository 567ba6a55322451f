"""Names every optimizer that ``optim.name`` can have, with what the rest must know of it. Torch is not imported.

A new one is a file beside this that makes it, and an entry here (docs/optimizers.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megaopus.settings import Setting


@dataclass(frozen=True)
class Spec:
    """What is known of an optimizer before it is made."""

    maker: str
    """``module:function`` that makes it."""
    shaped: tuple[str, ...]
    """Names of its state that has the parameter's shape; the last is what the update operator needs."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Its own settings, ``optim.settings``: numbers, whole ones where they must be, or booleans."""
    matrices: bool = False
    """It takes the matrices inside the blocks alone; AdamW has the rest."""
    elementwise: bool = False
    """Its update of a number depends on nothing but that number's own history: any piece of a tensor will do."""
    curvature: bool = False
    """It needs gradients of the loss on labels that the model samples (``settings.curvature_every``)."""
    extra_state: Callable[[int, int], int] | None = None
    """Numbers of state beyond ``shaped`` for a whole m x n matrix, held by every rank; None: a handful."""

    @property
    def make(self) -> Callable[..., Any]:
        """The function (groups, config, settings, tensor-parallel group) -> torch optimizer; imports torch."""
        module, _, name = self.maker.partition(":")
        return getattr(importlib.import_module(module), name)


def _momentum(default: float) -> Setting:
    return Setting(default=default, min=0, below=1, doc="Decay of the average of gradients.")


_NS_STEPS = Setting(default=5, min=1, doc="Newton-Schulz iterations that orthogonalise the momentum.")
_MU2 = Setting(default=0.99, min=0, below=1, doc="Decay of the average of squared gradients that sets the rate.")

CATALOG: dict[str, Spec] = {
    "sgd": Spec(
        "megaopus.optim.standard:make_sgd",
        ("momentum_buffer",),
        {
            "momentum": _momentum(0.9),
            "nesterov": Setting(default=False, doc="Nesterov's momentum: look one update ahead."),
        },
        elementwise=True,
    ),
    "adamw": Spec("megaopus.optim.standard:make_adamw", ("exp_avg", "exp_avg_sq"), elementwise=True),
    "lion": Spec("megaopus.optim.lion:make_lion", ("exp_avg",), elementwise=True),
    "muon": Spec(
        "megaopus.optim.muon:make_muon",
        ("momentum_buffer",),
        {
            "momentum": _momentum(0.95),
            "ns_steps": _NS_STEPS,
            "momentum_start": Setting(default=0.85, min=0, below=1, doc="Momentum of the first step."),
            "momentum_warmup_steps": Setting(default=0, min=0, doc="Steps until momentum is whole; 0: at once."),
        },
        matrices=True,
    ),
    "namo": Spec(
        "megaopus.optim.namo:make_namo",
        ("momentum_buffer",),
        {"momentum": _momentum(0.95), "mu2": _MU2, "ns_steps": _NS_STEPS},
        matrices=True,
    ),
    "namo_d": Spec(
        "megaopus.optim.namo:make_namo_d",
        ("momentum_buffer",),
        {
            "momentum": _momentum(0.95),
            "mu2": _MU2,
            "clamp": Setting(default=0.01, above=0, doc="Columns' rates lie in [clamp, 1 / clamp] times their mean."),
            "ns_steps": _NS_STEPS,
        },
        matrices=True,
        extra_state=lambda rows, columns: columns,
    ),
    "conda": Spec(
        "megaopus.optim.conda:make_conda",
        ("exp_avg", "exp_avg_sq"),
        {
            "scale": Setting(default=0.25, above=0, doc="Factor on the update of a matrix."),
            "projection_every": Setting(default=2000, min=1, doc="Steps between two bases of singular vectors."),
        },
        matrices=True,
        extra_state=lambda rows, columns: min(rows, columns) ** 2,
    ),
    "sophia_g": Spec(
        "megaopus.optim.sophia:make_sophia_g",
        ("exp_avg", "hessian"),
        {
            "rho": Setting(
                default=0.05, above=0, doc="Factor on the curvature that divides a step; larger clips less."
            ),
            "curvature_every": Setting(default=10, min=1, doc="Steps between two estimates of the curvature."),
        },
        curvature=True,
    ),
    "sgd_sai": Spec("megaopus.optim.sgd_sai:make_sgd_sai", ("momentum_buffer",), {"momentum": _momentum(0.9)}),
}
"""Name -> what is known of it."""
