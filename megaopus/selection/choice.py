"""Holds what came of a buffer: the picks of the steps that it serves, and of each step what its caller is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection import candidate_table
from megaopus.selection.candidate_table import Lists, Masked
from megaopus.selection.old_names import renamed_field


@dataclass(frozen=True, slots=True)
class Redundancy:
    """The part of the Gram matrix of the candidates' updates that a choice rests on, all float64; nan: not scored."""

    squared_norms: Tensor
    """(N,) its diagonal."""
    positions: Tensor
    """(P,) in the buffer of what was chosen, for all steps that it serves, before an alarm undid the choice."""
    overlaps: Tensor
    """(P, N) its columns there: inner products with every candidate's update."""


class Influence(NamedTuple):
    """Says what utilities did to the picks of a buffer, by which others would have been picked without them."""

    changed: float
    """Share of the picks that are not those made without utilities, by the same noise."""
    utility: float | None
    """Mean utility of the picks that came in less that of those that had to go; None: none did, or not known."""
    importance: float | None
    """The same of what is known without utilities."""
    loss: float | None
    """The same of the mean token loss."""
    spread: Mapping[str, float]
    """Standard deviation, over those who may be picked, of what each signal adds to what is picked by: "utility",
    "importance", and of odds "loss"."""
    came: tuple[int, ...] = ()
    """Positions in the buffer of the picks that came in."""
    went: tuple[int, ...] = ()
    """Positions of those that had to go."""


@renamed_field("standing", "prescreen_score")
@dataclass(frozen=True, slots=True)
class Selection:
    """Says what one step picked, and why. Tensors are on the CPU and equal on every rank."""

    step: int
    indices: Tensor
    """(K,) int64, ascending positions in the buffer."""
    ids: Tensor
    """(N,) int64 ids of the candidates."""
    picked_ids: Tensor
    """(K,) int64 ids at ``indices``."""
    utilities: Tensor | None
    """(N,) float64 as estimated (not standardised, without redundancy), nan where not scored; None in a step that
    scores nothing: in warm-up, and where the buffer was scored in an earlier step (``score_every``)."""
    scored: Tensor | None
    """(N,) bool which of them ``utilities`` is about: a nan there is a utility that is not finite."""
    prescreen_score: Tensor | None
    """(N,) float64 of the prescreen, before it learnt from this step; None where there is none yet."""
    exposures: Tensor | None
    """(N,) int64 times that each would have been trained on in the window if it were picked now; None: not counted, or
    counted in an earlier step (``score_every``)."""
    redundancy: Redundancy | None
    """What the redundancy term took off; None where there was none, as where nothing was scored."""
    probabilities: Tensor
    """(N,) float64 that add up to 1: softmax(utility as used / temperature) over the candidates that may be picked (0
    for others), whatever the sampler: the chance of each at the first draw, before any redundancy term. 'uniform': the
    same for each that may be picked. With ``score_every`` those of the buffer when its picks were made."""
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
    signal_to_error: float | None = None
    """Spread of the utilities over the error that rounding and curvature leave in each, as measured last; None: not
    known, as where no difference of losses is taken."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """More numbers of each candidate, by name: what a method of scoring told (``Scores.columns``)."""
    influence: Influence | None = None
    """Says what utilities did to the picks; None: the method has none, or an earlier step told it (``score_every``)."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of ``odds.SIGNALS`` in what was picked by; empty: it is not by odds."""

    @property
    def columns(self) -> dict[str, Any]:
        """Return what is known of each candidate and kept on record, as a ``CandidateTable`` takes it.

        The caller adds what it knows of the text. Numbers in ``more`` that are no column are left out.
        """
        picked = torch.zeros(len(self.ids), dtype=torch.bool).index_fill(0, self.indices, True)
        found: dict[str, Any] = {"id": self.ids, "picked": picked, "probability": self.probabilities}
        if self.utilities is not None and self.scored is not None:
            found["utility"] = Masked(self.utilities, self.scored)
        if self.redundancy is not None and self.scored is not None:
            found["squared_norm"] = Masked(self.redundancy.squared_norms, self.scored)
            found["overlaps"] = Lists(self.redundancy.positions, self.redundancy.overlaps)
        kept = {column.name for column in candidate_table.COLUMNS}
        known = {"prescreen_score": self.prescreen_score, "exposures": self.exposures, **self.more}
        return found | {name: values for name, values in known.items() if values is not None and name in kept}

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
    probabilities: Tensor
    """As the next ones of ``Selection``, but for ``uniform``."""
    utilities: Tensor | None = None
    scored: Tensor | None = None
    prescreen_score: Tensor | None = None
    exposures: Tensor | None = None
    redundancy: Redundancy | None = None
    signal_to_error: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    influence: Influence | None = None
    uniform: Tensor | None = None
    """(N,) bool which of those scored a prescreen drew uniformly, for it to be judged by; None: it screened nobody, or
    nothing was scored."""
    events: tuple[Event, ...] = ()

    def at(self, step: int, turn: int, ids: Tensor, num_selected: int, *, served: bool = False) -> Selection:
        """The selection of the buffer's ``turn``-th step; ``served``: an earlier one has told all but the picks.

        What a selector knows beside the choice is blank: correlation, notes and seconds.
        """
        indices = self.positions[turn * num_selected : (turn + 1) * num_selected].sort().values
        return Selection(
            step=step,
            indices=indices,
            ids=ids,
            picked_ids=ids[indices],
            utilities=None if served else self.utilities,
            scored=None if served else self.scored,
            prescreen_score=None if served else self.prescreen_score,
            exposures=None if served else self.exposures,
            redundancy=None if served else self.redundancy,
            probabilities=self.probabilities,
            correlation=None,
            method=self.method,
            ess=self.ess,
            max_p_ratio=self.max_p_ratio,
            events=[] if served else list(self.events),
            notes=[],
            seconds=0.0,
            signal_to_error=None if served else self.signal_to_error,
            more={} if served else self.more,
            influence=None if served else self.influence,
        )
