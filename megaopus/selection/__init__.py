"""Online data selection for any torch model and optimizer: needs torch and the standard library only.

Names are loaded when first used, so that reading the settings (``SelectionConfig``) does not import torch.
"""

from __future__ import annotations

import importlib
import warnings
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
        TextFeatures,
        UpdateOperator,
    )
    from megaopus.selection.candidate_table import CandidateTable
    from megaopus.selection.candidates import TensorCandidates
    from megaopus.selection.choice import Selection
    from megaopus.selection.estimators.adjoint import adjoint_utilities
    from megaopus.selection.estimators.countsketch import CountSketch, CountSketchEstimator
    from megaopus.selection.estimators.directional import directional_utilities
    from megaopus.selection.estimators.exact import exact_utilities
    from megaopus.selection.estimators.kronecker import KroneckerEstimator
    from megaopus.selection.estimators.registry import Request, register_estimator
    from megaopus.selection.methods.registry import register_method
    from megaopus.selection.operators.build import build_operator
    from megaopus.selection.operators.registry import register_operator
    from megaopus.selection.samplers.registry import register_sampler
    from megaopus.selection.scoring import Scores, ScoringStep
    from megaopus.selection.selector import Selector
    from megaopus.selection.torch_backend import ModuleBackend

__all__ = [
    "Batch",
    "CandidateTable",
    "Candidates",
    "CountSketch",
    "CountSketchEstimator",
    "GhostLayer",
    "Gradient",
    "KroneckerEstimator",
    "ModuleBackend",
    "Proxy",
    "Request",
    "Scores",
    "ScoringBackend",
    "ScoringStep",
    "Selection",
    "SelectionConfig",
    "Selector",
    "Shard",
    "TensorCandidates",
    "TextFeatures",
    "UpdateOperator",
    "adjoint_utilities",
    "build_operator",
    "directional_utilities",
    "exact_utilities",
    "register_estimator",
    "register_method",
    "register_operator",
    "register_sampler",
]
_MODULE_OF = {
    "Batch": "backend",
    "CandidateTable": "candidate_table",
    "Candidates": "backend",
    "CountSketch": "estimators.countsketch",
    "CountSketchEstimator": "estimators.countsketch",
    "GhostLayer": "backend",
    "Gradient": "backend",
    "KroneckerEstimator": "estimators.kronecker",
    "ModuleBackend": "torch_backend",
    "Proxy": "backend",
    "Request": "estimators.registry",
    "Scores": "scoring",
    "ScoringBackend": "backend",
    "ScoringStep": "scoring",
    "Selection": "choice",
    "Selector": "selector",
    "Shard": "backend",
    "TensorCandidates": "candidates",
    "TextFeatures": "backend",
    "UpdateOperator": "backend",
    "adjoint_utilities": "estimators.adjoint",
    "build_operator": "operators.build",
    "directional_utilities": "estimators.directional",
    "exact_utilities": "estimators.exact",
    "register_estimator": "estimators.registry",
    "register_method": "methods.registry",
    "register_operator": "operators.registry",
    "register_sampler": "samplers.registry",
}


_MOVED = {
    "adjoint": "estimators.adjoint",
    "direction": "estimators.directional",
    "exact": "estimators.exact",
    "ghost": "estimators.ghost",
    "kronecker": "estimators.kronecker",
    "layers": "estimators.layers",
    "module": "torch_backend",
    "noise": "counter_rng",
    "preconditioner": "operators.build",
    "sketch": "estimators.countsketch",
    "update_rules": "operators.registry",
}
"""Modules of version 0.1 -> where they are now; served as attributes (``from megaopus.selection import noise``)."""


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MOVED:
        moved = f"{__name__}.{_MOVED[name]}"
        warnings.warn(f"{__name__}.{name} is now {moved}", DeprecationWarning, stacklevel=2)
        return importlib.import_module(moved)
    raise AttributeError(f"module 'megaopus.selection' has no attribute {name!r}")
