"""What the monitor is told of each step: plain values, and arrays for what there is of every candidate."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


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
class Choices:
    """The candidates of one step, arrays (N,) in the order of the buffer; see ``megaopus.selection.Selection``."""

    ids: np.ndarray
    """int64."""
    sequences: np.ndarray
    """int64, their numbers in the pool."""
    domains: np.ndarray
    """int64, index into ``domain_names``."""
    domain_names: list[str]
    picked: np.ndarray
    """bool."""
    probabilities: np.ndarray
    """float64, of the first draw."""
    utilities: np.ndarray | None = None
    """float64 as estimated, before standardising; None, as ``scored``, in a step that scores nothing."""
    scored: np.ndarray | None = None
    """bool, what ``utilities`` is about."""
    standing: np.ndarray | None = None
    """float64, what a prescreen picks or screens by; None where there is none."""
    exposures: np.ndarray | None = None
    """int64, times trained on in the window if picked now; None where not counted."""
    squared_norms: np.ndarray | None = None
    """float64 of the candidates' updates, nan where not scored; None, as ``overlaps``, without a redundancy term."""
    chosen: np.ndarray | None = None
    """int64 (P,), positions of those that the redundancy term was worked out for: what the buffer's steps pick."""
    overlaps: np.ndarray | None = None
    """float64 (P, N), inner products of their updates with every candidate's."""


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
    events: list[str] = field(default_factory=list)
    """Fallbacks and candidates with a non-finite utility, in words."""
    predicted_fall: float | None = None
    """Mean utility of the picks: the first-order fall of the proxy loss; None, as the next two, where not checked."""
    uniform_fall: float | None = None
    """Mean utility of the candidates: what a uniform draw would be predicted to gain."""
    realised_fall: float | None = None
    """Proxy loss before the update less that after it, in nats per token."""
    choices: Choices | None = None
    """Every candidate; None where it is not kept."""

    def facts(self) -> dict[str, Any]:
        """All but ``choices``."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "choices"}


@dataclass(slots=True, kw_only=True)
class ValidationRecord:
    """Mean token loss on the validation split after ``step`` updates."""

    step: int
    tokens: int
    time_s: float
    loss: float
    """On the wanted domains (every domain if none is named)."""
    domains: dict[str, float]
