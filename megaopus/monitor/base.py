"""What the monitor is told of each step; plain values only."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    candidate_ids: list[int]
    utilities: list[float | None] | None
    """As estimated, before standardising, None for what was not scored; None in a step that scores nothing."""
    standing: list[float | None] | None = None
    """What a prescreen picks or screens by; None where there is none."""
    correlation: float | None = None
    """Of the predictor's latest predictions with the utilities of uniform draws."""
    picked_ids: list[int]
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


@dataclass(slots=True, kw_only=True)
class ValidationRecord:
    """Mean token loss on the validation split after ``step`` updates."""

    step: int
    tokens: int
    time_s: float
    loss: float
    """On the wanted domains (every domain if none is named)."""
    domains: dict[str, float]
