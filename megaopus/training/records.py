"""Makes the records of a step from what the engine and the selector return."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from megaopus.data.candidates import CandidateBuffer
from megaopus.engine.base import StepResult
from megaopus.events import Event, read_event
from megaopus.record.types import Choices, SelectionRecord, StepRecord
from megaopus.selection import Selection


def step_record(
    result: StepResult,
    skipped: Sequence[Event],
    *,
    step: int,
    tokens: int,
    time_s: float,
    step_s: float,
    select_s: float,
) -> StepRecord:
    """Make the record of an update; ``tokens`` and ``time_s`` are the run's so far.

    ``skipped``: the event that says why the update was not made, if it was not.
    """
    return StepRecord(
        step=step,
        tokens=tokens,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=result.lr,
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
        events=list(map(read_event, selection.events)),
        predicted_fall=None if realised_fall is None else selection.predicted_fall,
        uniform_fall=None if realised_fall is None else selection.uniform_fall,
        realised_fall=realised_fall,
        choices=_choices(candidates, selection),
    )


def _choices(candidates: CandidateBuffer, selection: Selection) -> Choices:
    def array(values: Tensor | None) -> np.ndarray | None:
        return None if values is None else values.numpy()

    redundancy = selection.redundancy
    picked = np.zeros(len(candidates), dtype=bool)
    picked[selection.indices.numpy()] = True
    return Choices(
        ids=candidates.ids.numpy(),
        sequences=candidates.sequence_ids,
        domains=candidates.domains,
        domain_names=candidates.domain_names,
        picked=picked,
        probabilities=selection.probabilities.numpy(),
        utilities=array(selection.utilities),
        scored=array(selection.scored),
        standing=array(selection.standing),
        exposures=array(selection.exposures),
        squared_norms=None if redundancy is None else redundancy.squared_norms.numpy(),
        chosen=None if redundancy is None else redundancy.positions.numpy(),
        overlaps=None if redundancy is None else redundancy.overlaps.numpy(),
    )
