"""Finds the parameters, and the uses of matrices, that an estimator sums over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from megaopus.events import Event
from megaopus.selection.backend import GhostLayer, ScoringBackend

ENOUGH = 0.9
"""Share of the trained matrices' weights that activations are captured of, below which it is said."""
TOO_FEW = 0.5
"""The share below which nothing is scored."""
_NAMED = 5


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


def parameter_names(backend: ScoringBackend, gradient: Iterable[str], which: str) -> list[str]:
    """Those of the parameters in ``gradient`` that ``which`` (see ``ghost_layers``) means where all kinds can count."""
    names = list(gradient)
    if which == "all":
        return names
    if which == "linear":
        chosen = {layer.parameter for layer in ghost_layers(backend, which)}
        return [name for name in names if name in chosen]
    return [name for name in names if re.search(which, name)]


def require_enough(
    backend: ScoringBackend, shapes: Mapping[str, torch.Size], uses: Sequence[GhostLayer], which: str
) -> tuple[Event, ...]:
    """Say so where layers that activations are captured of hold less than ``ENOUGH`` of the weights they should hold.

    Those are of every parameter of two axes or more (a fused stack of experts too) that ``which`` means, but of
    embeddings only where they are captured. ``shapes``: of the trained ones, by name, as this rank holds them. Raises
    ValueError below ``TOO_FEW``. Collective.
    """
    captured = {layer.parameter for layer in uses}
    embeddings = {layer.parameter for layer in backend.ghost_layers() if layer.kind == "embedding"}
    meant = {
        name: shape.numel()
        for name, shape in shapes.items()
        if len(shape) > 1 and (name in captured or (_means(which, name) and name not in embeddings))
    }
    missing = sorted((name for name in meant if name not in captured), key=lambda name: -meant[name])
    counts = [sum(meant.values()), sum(meant[name] for name in missing)]
    total, lost = backend.sum_over_model({"": torch.tensor(counts, device=backend.device)}, "stages")[""].tolist()
    share = 1 - lost / max(total, 1)
    if share >= ENOUGH:
        return ()
    named = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
    text = (
        f"activations are captured of layers with {share:.0%} of the trained matrices' weights alone (selection.layers="
    )
    text += (
        f"{which}); not of {named or 'matrices of other ranks'}, which belong to no nn.Linear, nn.Embedding or Conv1D"
    )
    remedy = "estimator=directional scores by all of them"
    if share < TOO_FEW:
        raise ValueError(f"{text}: {remedy}, selection.layers can name those that are to count")
    return (
        Event(
            "selection.partly_captured",
            f"{text}: utilities leave these out ({remedy})",
            share=share,
            missing=missing[:_NAMED],
        ),
    )


def _means(which: str, name: str) -> bool:
    return which in ("all", "linear") or re.search(which, name) is not None


def require_some(backend: ScoringBackend, found: int, which: str) -> None:
    """Raise ValueError if no rank found anything of ``which``; a collective call."""
    everywhere = backend.sum_over_model({"": torch.tensor([found], device=backend.device)}, "stages")[""]
    if not int(everywhere):
        raise ValueError(
            f"selection.layers={which} matches no trained matrix of this model: use linear, all, a regular expression"
            " found in parameter names, or estimator=directional with layers=all"
        )
