"""Online data selection for any torch model and optimizer: needs torch and the standard library only.

Names are loaded when first used, so that reading the settings (``SelectionConfig``) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megaopus.selection.config import SelectionConfig

if TYPE_CHECKING:
    from megaopus.selection.adjoint import adjoint_utilities
    from megaopus.selection.backend import (
        Batch,
        Candidates,
        GhostLayer,
        Gradient,
        Proxy,
        ScoringBackend,
        Shard,
        UpdateOperator,
    )
    from megaopus.selection.candidates import TensorCandidates
    from megaopus.selection.direction import directional_utilities
    from megaopus.selection.exact import exact_utilities
    from megaopus.selection.kronecker import KroneckerEstimator
    from megaopus.selection.module import ModuleBackend
    from megaopus.selection.preconditioner import build_operator
    from megaopus.selection.selector import Selection, Selector
    from megaopus.selection.sketch import CountSketch, CountSketchEstimator
    from megaopus.selection.update_rules import register_operator

__all__ = [
    "Batch",
    "Candidates",
    "CountSketch",
    "CountSketchEstimator",
    "GhostLayer",
    "Gradient",
    "KroneckerEstimator",
    "ModuleBackend",
    "Proxy",
    "ScoringBackend",
    "Selection",
    "SelectionConfig",
    "Selector",
    "Shard",
    "TensorCandidates",
    "UpdateOperator",
    "adjoint_utilities",
    "build_operator",
    "directional_utilities",
    "exact_utilities",
    "register_operator",
]
_MODULES = (
    "adjoint",
    "backend",
    "candidates",
    "direction",
    "exact",
    "kronecker",
    "module",
    "preconditioner",
    "selector",
    "sketch",
    "update_rules",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            loaded = importlib.import_module(f"megaopus.selection.{module}")
            if hasattr(loaded, name):
                return getattr(loaded, name)
    raise AttributeError(f"module 'megaopus.selection' has no attribute {name!r}")
