"""What the monitor is told of each step: plain values, and arrays for what there is of every candidate."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from megaopus.events import Event
from megaopus.selection.candidate_table import CandidateTable


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One optimizer step. ``step`` counts from 0: the record of step s describes the (s+1)-th update."""

    step: int
    tokens: int
    """Update tokens so far, this step included."""
    loss: float
    grad_norm: float
    lr: float
    time_s: float
    """Seconds of data, selection and training so far, over every process of the run (no validation, no saving)."""
    step_s: float
    """Seconds of this step, selection included."""
    select_s: float
    """Seconds of this step spent choosing the batch."""
    skipped: bool = False
    """The update was not applied (a gradient was not finite)."""


@dataclass(slots=True, kw_only=True)
class SelectionRecord:
    """What was chosen in one step, and why."""

    step: int
    method: str
    """What really chose: 'uniform' in a warm-up without a prior and after a fallback."""
    candidates: int
    picked: int
    """How many."""
    correlation: float | None = None
    """Of the predictor's latest predictions with the utilities of uniform draws."""
    share: dict[str, float]
    """Share of each domain among the picks."""
    pool_share: dict[str, float]
    """Share of each domain among the candidates."""
    ess: float
    """Effective sample size 1 / sum p^2 of the candidates under the selection temperature."""
    max_p_ratio: float
    """Largest probability over the uniform one."""
    events: list[Event] = field(default_factory=list)
    """Fallbacks, alarms and candidates with a non-finite utility."""
    predicted_fall: float | None = None
    """Mean utility of the picks: the first-order fall of the proxy loss; None, as the next two, where not checked."""
    uniform_fall: float | None = None
    """Mean utility of the candidates: what a uniform draw would be predicted to gain."""
    realised_fall: float | None = None
    """Proxy loss before the update less that after it, in nats per token."""
    choices: CandidateTable | None = None
    """Every candidate; None where it is not kept."""

    def facts(self) -> dict[str, Any]:
        """All but ``choices``, as plain values."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "choices"}
        return found | {"events": [event.as_row() for event in self.events]}


@dataclass(slots=True, kw_only=True)
class ValidationRecord:
    """Mean token loss on the validation split after ``step`` updates."""

    step: int
    tokens: int
    time_s: float
    loss: float
    """On the wanted domains (every domain if none is named)."""
    domains: dict[str, float]
