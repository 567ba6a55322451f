"""Online data selection for any torch model and optimizer: needs torch and the standard library only."""

from megaopus.selection.backend import (
    Batch,
    Candidates,
    GhostLayer,
    Gradient,
    Proxy,
    ScoringBackend,
    UpdateOperator,
)
from megaopus.selection.candidates import TensorCandidates
from megaopus.selection.config import SelectionConfig
from megaopus.selection.direction import directional_utilities, mean_losses
from megaopus.selection.exact import exact_utilities
from megaopus.selection.module import ModuleBackend
from megaopus.selection.preconditioner import build_operator, register_operator
from megaopus.selection.selector import Selection, Selector
from megaopus.selection.sketch import CountSketch, CountSketchEstimator

__all__ = [
    "Batch",
    "Candidates",
    "CountSketch",
    "CountSketchEstimator",
    "GhostLayer",
    "Gradient",
    "ModuleBackend",
    "Proxy",
    "ScoringBackend",
    "Selection",
    "SelectionConfig",
    "Selector",
    "TensorCandidates",
    "UpdateOperator",
    "build_operator",
    "directional_utilities",
    "exact_utilities",
    "mean_losses",
    "register_operator",
]
