"""Online data selection for any torch model and optimizer: needs torch and the standard library only.

Names are loaded when first used, so that reading the settings (``SelectionConfig``) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megaopus.selection.config import SelectionConfig

if TYPE_CHECKING:
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
    from megaopus.selection.estimators.adjoint import adjoint_utilities
    from megaopus.selection.estimators.countsketch import CountSketch, CountSketchEstimator
    from megaopus.selection.estimators.directional import directional_utilities
    from megaopus.selection.estimators.exact import exact_utilities
    from megaopus.selection.estimators.kronecker import KroneckerEstimator
    from megaopus.selection.operators.build import build_operator
    from megaopus.selection.operators.registry import register_operator
    from megaopus.selection.selector import Selection, Selector
    from megaopus.selection.torch_backend import ModuleBackend

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
_MODULE_OF = {
    "Batch": "backend",
    "Candidates": "backend",
    "CountSketch": "estimators.countsketch",
    "CountSketchEstimator": "estimators.countsketch",
    "GhostLayer": "backend",
    "Gradient": "backend",
    "KroneckerEstimator": "estimators.kronecker",
    "ModuleBackend": "torch_backend",
    "Proxy": "backend",
    "ScoringBackend": "backend",
    "Selection": "selector",
    "Selector": "selector",
    "Shard": "backend",
    "TensorCandidates": "candidates",
    "UpdateOperator": "backend",
    "adjoint_utilities": "estimators.adjoint",
    "build_operator": "operators.build",
    "directional_utilities": "estimators.directional",
    "exact_utilities": "estimators.exact",
    "register_operator": "operators.registry",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"megaopus.selection.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'megaopus.selection' has no attribute {name!r}")
