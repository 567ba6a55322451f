"""Makes the records of a step, and of a validation, from what the engine and the selector return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megaopus.data.candidates import CandidateBuffer
from megaopus.engine.base import StepResult
from megaopus.events import Event
from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord
from megaopus.selection import Selection
from megaopus.selection.candidate_table import CandidateTable


def step_record(
    result: StepResult,
    skipped: Sequence[Event],
    *,
    step: int,
    tokens: int,
    time_s: float,
    step_s: float,
    select_s: float,
    matrix_lr: float | None = None,
) -> StepRecord:
    """Make the record of an update; ``tokens`` and ``time_s`` are the run's so far; ``matrix_lr`` as Engine's.

    ``skipped``: the event that says why the update was not made, if it was not.
    """
    return StepRecord(
        step=step,
        tokens=tokens,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=result.lr,
        matrix_lr=matrix_lr,
        loss_tokens=result.loss_tokens,
        layer_grad_norms=result.layer_grad_norms,
        expert_busiest=result.expert_loads and result.expert_loads.busiest,
        experts_idle=result.expert_loads and result.expert_loads.idle,
        time_s=time_s,
        step_s=step_s,
        select_s=select_s,
        skip_reason=next((event.facts["reason"] for event in skipped), None),
    )


def selection_record(
    candidates: CandidateBuffer, picked: CandidateBuffer, selection: Selection, realised_fall: float | None
) -> SelectionRecord:
    """Make the record of a step's choice; ``realised_fall``: of the proxy loss, None where it was not checked."""
    return SelectionRecord(
        step=selection.step,
        method=selection.method,
        candidates=len(candidates),
        picked=len(picked),
        correlation=selection.correlation,
        share=picked.share(),
        pool_share=candidates.share(),
        ess=selection.ess,
        max_p_ratio=selection.max_p_ratio,
        signal_to_error=selection.signal_to_error,
        **_influence(candidates, selection),
        odds_weights=dict(selection.weights),
        events=selection.events,
        predicted_fall=None if realised_fall is None else selection.predicted_fall,
        uniform_fall=None if realised_fall is None else selection.uniform_fall,
        realised_fall=realised_fall,
        choices=CandidateTable(
            {**selection.columns, "sequence": candidates.sequence_ids, "domain": candidates.domains},
            candidates.domain_names,
        ),
    )


def _influence(candidates: CandidateBuffer, selection: Selection) -> dict[str, Any]:
    """Name as ``SelectionRecord`` does what utilities did to the picks."""
    found = selection.influence
    if found is None:
        return {}
    came, went = (candidates.take(torch.tensor(each)).share() if each else {} for each in (found.came, found.went))
    return {
        "share_swapped_in": came,
        "share_swapped_out": went,
        "changed_by_utilities": found.changed,
        "swapped_utility": found.utility,
        "swapped_importance": found.importance,
        "swapped_loss": found.loss,
        "signal_spread": dict(found.spread),
    }


def validation_record(
    target: Mapping[str, float], domains: Mapping[str, float], *, step: int, tokens: int, time_s: float
) -> ValidationRecord:
    """Make the record of a validation from the losses of each part of the target (empty: none named) and each domain.

    Every part counts alike in the headline, as every domain does in the mean, however many tokens it has.
    """
    losses = list((target or domains).values())
    return ValidationRecord(
        step=step,
        tokens=tokens,
        time_s=time_s,
        loss=sum(losses) / len(losses),
        target=dict(target),
        domains=dict(domains),
    )
