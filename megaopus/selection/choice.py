"""Holds what came of a buffer: the picks of the steps that it serves, and of each step what its caller is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection.candidate_table import Lists, Masked
from megaopus.selection.old_names import warn


@dataclass(frozen=True, slots=True)
class Redundancy:
    """The part of the Gram matrix of the candidates' updates that a choice rests on, all float64; nan: not scored."""

    squared_norms: Tensor
    """(N,) its diagonal."""
    positions: Tensor
    """(P,) in the buffer of what was chosen, for all steps that it serves, before an alarm undid the choice."""
    overlaps: Tensor
    """(P, N) its columns there: inner products with every candidate's update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Says what one step picked, and why. Tensors are on the CPU and equal on every rank."""

    step: int
    indices: Tensor
    """(K,) int64, ascending positions in the buffer."""
    ids: Tensor
    """(N,) int64 ids of the candidates."""
    picked_ids: Tensor
    """(K,) int64 ids at ``indices``."""
    columns: Mapping[str, Any]
    """What is known of each candidate, by the names of ``candidate_table.COLUMNS``; the properties below read it. A
    step whose buffer was scored in an earlier one (``score_every``) has picks and probabilities alone."""
    correlation: float | None
    """Rank correlation of prescreen scores with the utilities of uniform draws, the latest of them."""
    method: str
    """The method that chose: 'uniform' in a warm-up without a prior and after a fallback."""
    ess: float
    """1 / sum p^2 of ``probabilities``; uniform: the number drawn from."""
    max_p_ratio: float
    """N times the largest p."""
    events: list[Event]
    """Fallbacks, alarms and candidates never picked (``events.SELECTION_KINDS``); ``str`` gives the sentence."""
    notes: list[str]
    """What was found out on the way and goes as it should: the micro-batch size, once."""
    seconds: float
    """Wall time of the selection."""

    @property
    def utilities(self) -> Tensor | None:
        """(N,) float64 as estimated (not standardised, without redundancy), nan where not scored.

        None in a step that scores nothing: in warm-up, and where the buffer was scored in an earlier step.
        """
        return self.columns["utility"].values if "utility" in self.columns else None

    @property
    def scored(self) -> Tensor | None:
        """(N,) bool which of them ``utilities`` is about: a nan there is a utility that is not finite."""
        return self.columns["utility"].known if "utility" in self.columns else None

    @property
    def prescreen_score(self) -> Tensor | None:
        """(N,) float64 of the prescreen, before it learnt from this step; None where there is none yet."""
        return self.columns.get("prescreen_score")

    @property
    def standing(self) -> Tensor | None:
        """The old name of ``prescreen_score``."""
        warn("Selection.standing", "Selection.prescreen_score")
        return self.prescreen_score

    @property
    def exposures(self) -> Tensor | None:
        """(N,) int64 times that each would have been trained on in the window if it were picked now.

        None: not counted, or counted in an earlier step (``score_every``).
        """
        return self.columns.get("exposures")

    @property
    def redundancy(self) -> Redundancy | None:
        """What the redundancy term took off; None where there was none, as where nothing was scored."""
        return redundancy_of(self.columns)

    @property
    def probabilities(self) -> Tensor:
        """(N,) float64 that add up to 1: softmax(utility as used / temperature) over the candidates that may be picked.

        0 for others, whatever the sampler: the chance of each at the first draw, before any redundancy term. 'uniform':
        the same for each that may be picked. With ``score_every`` those of the buffer when its picks were made.
        """
        return self.columns["probability"]

    @property
    def predicted_fall(self) -> float:
        """Mean utility of the picks: to first order, how much one update on them lowers the proxy loss, in nats.

        Methods 'opus' and 'greats' only. For the optimizer's history see docs/selection.md.
        """
        assert self.utilities is not None
        return float(self.utilities[self.indices].mean())

    @property
    def uniform_fall(self) -> float:
        """The same for a uniform draw: the mean over all candidates with a finite utility."""
        assert self.utilities is not None
        return float(self.utilities[self.utilities.isfinite()].mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The picks of the ``score_every`` steps that one buffer serves."""

    period: int
    """Number of the buffer: step // score_every."""
    positions: Tensor
    """(score_every * K,) positions in the buffer: K of each step, one step after the other."""
    method: str
    ess: float
    max_p_ratio: float
    columns: Mapping[str, Any]
    """What is known of each candidate, by the names of ``candidate_table.COLUMNS``."""
    events: tuple[Event, ...] = ()
    uniform: Tensor | None = None
    """(N,) bool which of those scored were drawn uniformly by a prescreen, for it to be judged by; None: no prescreen
    in use, or nothing was scored."""

    def at(
        self,
        step: int,
        turn: int,
        ids: Tensor,
        num_selected: int,
        *,
        served: bool = False,
        events: list[Event] | None = None,
        correlation: float | None = None,
        notes: list[str] | None = None,
        seconds: float = 0.0,
    ) -> Selection:
        """The selection of the buffer's ``turn``-th step; ``served``: an earlier one has told what was scored.

        ``events``: those to tell, the choice's own if not given.
        """
        indices = self.positions[turn * num_selected : (turn + 1) * num_selected].sort().values
        columns = {"probability": self.columns["probability"]} if served else dict(self.columns)
        columns["id"] = ids
        columns["picked"] = torch.zeros(len(ids), dtype=torch.bool).index_fill(0, indices, True)
        return Selection(
            step=step,
            indices=indices,
            ids=ids,
            picked_ids=ids[indices],
            columns=columns,
            correlation=correlation,
            method=self.method,
            ess=self.ess,
            max_p_ratio=self.max_p_ratio,
            events=list(self.events) if events is None else events,
            notes=notes or [],
            seconds=seconds,
        )


def redundancy_of(columns: Mapping[str, Any]) -> Redundancy | None:
    """The redundancy term's part of ``columns``; None where it has none."""
    norms, overlaps = columns.get("squared_norm"), columns.get("overlaps")
    if norms is None or overlaps is None:
        return None
    assert isinstance(norms, Masked)
    assert isinstance(overlaps, Lists)
    return Redundancy(norms.values, overlaps.rows, overlaps.values)
