"""Makes picks again from what was recorded of them: the same decision, with the record in the model's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection.backend import Batch, Candidates, Proxy
from megaopus.selection.candidate_table import CandidateTable
from megaopus.selection.candidates import as_candidates
from megaopus.selection.choice import Selection
from megaopus.selection.config import SelectionConfig
from megaopus.selection.decide import Evidence, Key, counts_exposures, decide, draws_uniformly
from megaopus.selection.guards import token_pair_check
from megaopus.selection.scoring import Scores


class NotOnRecord(Exception):
    """The picks depend on something that is not recorded; the message says on what."""


class NamedCandidates:
    """Candidates of which nothing is known but their ids (N,), once their tokens are gone."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Tensor) -> NamedCandidates:
        """Those at ``indices`` (n,)."""
        return NamedCandidates(self.ids[indices])

    def batch(self, length: int | None = None) -> Batch:
        """Raises NotOnRecord."""
        raise NotOnRecord("the candidates' tokens, which are in the corpus alone")


def replay(
    config: SelectionConfig,
    table: CandidateTable,
    events: Sequence[Event],
    candidates: Candidates | Batch,
    step: int,
    *,
    num_selected: int,
    seed: int,
    proxy: Proxy | None = None,
) -> Selection:
    """The selection of ``step`` once more, from recorded utilities, prescreen scores and exposures.

    ``table`` and ``events``: of the step that made the picks, the first of the ``score_every`` that share the buffer.
    ``candidates``: their tokens are looked at only by ``guards.min_distinct``, as those of ``proxy`` (step -> batch).
    Raises NotOnRecord where the picks depend on more.
    """
    period, turn = divmod(step, config.score_every)
    buffer = as_candidates(candidates, period)
    evidence = evidence_of(config, table, events, step - turn)
    level = config.guards.min_distinct
    check = token_pair_check(buffer, proxy, level, seed, step - turn, period)
    choice = decide(replace(evidence, token_pair_alarm=check), config, Key(seed, step - turn), num_selected)
    return choice.at(step, turn, evidence.ids, num_selected, served=turn > 0)


def concerned(picking: int, config: SelectionConfig, events: Sequence[Event]) -> str:
    """Say in what the rules of ``picking`` make other picks of a step than today's; empty: in nothing.

    ``events``: of the step as it was recorded and as it was made again.
    """
    kinds, found = {event.kind for event in events}, []
    if picking < 2:
        if config.redundancy > 0 and config.guards.domain_floor > 0:
            found.append("picks for a domain's floor did not count for redundancy")
        if config.redundancy > 0 and config.score_every > 1:
            found.append("redundancy was score_every times as strong")
        if "selection.alarm.sample_size" in kinds:
            found.append("there was an alarm on the sample size of greedy picks, and outliers counted for it")
        if "selection.utility_outlying" in kinds:
            found.append("outliers counted for the z-scores of all others")
        if "selection.cap_lifted" in kinds:
            found.append("small differences between candidates above the exposure cap were lost")
    return "; ".join(found)


def evidence_of(config: SelectionConfig, table: CandidateTable, events: Sequence[Event], step: int) -> Evidence:
    """Return what the picks of a buffer rest on, but for tokens. Raises NotOnRecord if exposures are missing."""
    ids = _tensor(table["id"])
    if draws_uniformly(config, step):
        return Evidence(ids=ids)
    exposures = table.get("exposures")
    if exposures is None and counts_exposures(config):
        raise NotOnRecord("how often each candidate was trained on, which this step did not record")
    score = table.get("prescreen_score")
    return Evidence(
        ids=ids,
        score=lambda positions: _scores(config, table, positions),
        prescreen_score=None if score is None else _tensor(score),
        parts=lambda positions, scores: {"odds": _odds(table, positions)},
        distrust=next((event for event in events if event.kind == "selection.prescreen_distrusted"), None),
        exposures=None if exposures is None else _tensor(exposures).long(),
        domains=_tensor(table["domain"]),
    )


def _odds(table: CandidateTable, positions: Tensor) -> Tensor:
    """(n,) what the candidates at ``positions`` were picked by."""
    odds = table.values("odds")
    if odds is None:
        raise NotOnRecord("the log-odds of each candidate, which this step did not keep")
    return _tensor(odds)[positions]


def _scores(config: SelectionConfig, table: CandidateTable, positions: Tensor) -> Scores:
    """In the model's place: what it said of the candidates at ``positions`` (n,)."""
    utilities = table.values("utility")
    if utilities is None:
        return Scores(utilities=None)
    found = _tensor(utilities)[positions]
    if config.redundancy == 0:
        return Scores(utilities=found)
    norms, overlaps = table.values("squared_norm"), table.get("overlaps")
    if norms is None or overlaps is None:
        n = len(positions)
        raise NotOnRecord(f"inner products of {n} updates, which this step did not keep (logging.overlaps_mb)")
    whole = torch.full((len(table), len(table)), torch.nan, dtype=torch.float64)
    whole[:, _tensor(overlaps.rows)] = _tensor(overlaps.values).t()  # the other columns matter to other picks alone
    whole.diagonal().copy_(_tensor(norms))
    return Scores(utilities=found, gram=whole[positions][:, positions])


def _tensor(values: Any) -> Tensor:
    """A tensor of its own, of an array that may be read-only."""
    return values if isinstance(values, Tensor) else torch.from_numpy(values.copy())
