"""Finds the parameters, and the uses of matrices, that an estimator sums over."""

from __future__ import annotations

import re

import torch

from megaopus.selection.backend import GhostLayer, Gradient, ScoringBackend


def ghost_layers(backend: ScoringBackend, which: str) -> list[GhostLayer]:
    """The uses of matrices on this rank that ghost estimators sum over; none is possible on a pipeline stage.

    ``which``: 'linear': matrices with at least one linear use (a tied embedding counts both its uses), 'all':
    embeddings too, else a regular expression that is searched for in the parameter's name.
    """
    every = backend.ghost_layers()
    if which == "all":
        return every
    if which == "linear":
        linear = {layer.parameter for layer in every if layer.kind == "linear" or layer.tied}
        return [layer for layer in every if layer.parameter in linear]
    return [layer for layer in every if re.search(which, layer.parameter)]


def parameter_names(backend: ScoringBackend, gradient: Gradient, which: str) -> list[str]:
    """Those of the parameters in ``gradient`` that ``which`` (see ``ghost_layers``) means where all kinds can count."""
    names = list(gradient)
    if which == "all":
        return names
    if which == "linear":
        chosen = {layer.parameter for layer in ghost_layers(backend, which)}
        return [name for name in names if name in chosen]
    return [name for name in names if re.search(which, name)]


def require_some(backend: ScoringBackend, found: int, which: str) -> None:
    """Raise ValueError if no rank found anything of ``which``; a collective call."""
    everywhere = backend.sum_over_model({"": torch.tensor([found], device=backend.device)}, "stages")[""]
    if not int(everywhere):
        raise ValueError(
            f"selection.layers={which} matches no trained matrix of this model: use linear, all, a regular expression"
            " found in parameter names, or estimator=directional with layers=all"
        )
