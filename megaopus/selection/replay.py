"""Picks made again from what was recorded of them: the selector itself, with the record in the model's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from megaopus.selection import guards
from megaopus.selection.backend import Batch, Candidates, Proxy, ScoringBackend, TextFeatures
from megaopus.selection.candidates import as_candidates
from megaopus.selection.config import SelectionConfig
from megaopus.selection.prescreen import Prescreen
from megaopus.selection.selector import Redundancy, Selection, Selector


class NotOnRecord(Exception):
    """The picks depend on something that is not recorded; the message says on what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the picks of a buffer rest on, as ``Selection`` told it in the step that made them; (N,) tensors."""

    utilities: Tensor | None
    """nan where not scored."""
    standing: Tensor | None
    exposures: Tensor | None
    redundancy: Redundancy | None = None
    domains: Tensor
    """int64 numbers of the domains, as ``TextFeatures.domains`` counts them."""
    doubt: str | None = None
    """The event that begins with ``prescreen.DOUBT``, if there was one."""


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
    evidence: Evidence,
    candidates: Candidates | Batch,
    step: int,
    *,
    num_selected: int,
    seed: int,
    proxy: Proxy | None = None,
) -> Selection:
    """The selection of ``step`` once more, by ``Selector`` with recorded utilities, standing and exposures.

    ``evidence``: of the step that made the picks, the first of the ``score_every`` that share the buffer.
    ``candidates``: their tokens are looked at only by ``guards.min_distinct``, as those of ``proxy`` (step -> batch).
    Raises NotOnRecord where the picks depend on more.
    """
    buffer = as_candidates(candidates, step // config.score_every)
    selector = _Replay(config, evidence, buffer.ids.cpu(), num_selected=num_selected, seed=seed, proxy=proxy)
    if turn := step % config.score_every:
        selector.select(buffer, step - turn)
    return selector.select(buffer, step)


class _Replay(Selector):
    """A selector that reads where it would ask the model."""

    def __init__(
        self,
        config: SelectionConfig,
        evidence: Evidence,
        ids: Tensor,
        *,
        num_selected: int,
        seed: int,
        proxy: Proxy | None,
    ):
        text_features = cast(TextFeatures, _TextFeatures(ids, evidence.domains))
        super().__init__(
            config,
            cast(ScoringBackend, _OneRank()),
            num_selected=num_selected,
            proxy=proxy or _missing("the proxy's gradient"),
            pool=_missing("the pool's gradient"),
            wanted=_missing("which domains were wanted"),
            seed=seed,
            text_features=text_features,
        )
        self._proxy = proxy
        self._scorer = cast(Any, _Scores(config, evidence, ids))
        self._exposure = _Exposures(evidence.exposures)
        if self._prescreen is not None:
            self._prescreen = _Prescreen(config.prescreen, text_features)
            self._prescreen.recorded = evidence

    def _signatures(self, candidates: Candidates) -> Tensor:
        return candidates.ids  # what they would be counted by is on record


class _OneRank:
    world_size = multiple = 1
    rank = 0

    def from_rank_0(self, values: Tensor) -> Tensor:
        return values


class _TextFeatures:
    def __init__(self, ids: Tensor, domains: Tensor):
        self._ids, self._domains = ids, domains

    def domains(self, ids: Tensor) -> Tensor:
        return self._domains[_positions(self._ids, ids)]


class _Scores:
    """In the scorer's place."""

    def __init__(self, config: SelectionConfig, evidence: Evidence, ids: Tensor):
        self._diverse, self._evidence, self._ids = config.redundancy > 0, evidence, ids

    def score(self, buffer: Candidates, step: int, events: list[str]) -> tuple[Tensor | None, Tensor | None]:
        utilities, redundancy = self._evidence.utilities, self._evidence.redundancy
        if utilities is None:
            return None, None
        at = _positions(self._ids, buffer.ids.cpu())
        if not self._diverse:
            return utilities[at], None
        if redundancy is None:
            n = len(at)
            raise NotOnRecord(f"inner products of {n} updates, which this step did not keep (logging.overlaps_mb)")
        whole = torch.full((len(self._ids), len(self._ids)), torch.nan, dtype=torch.float64)
        whole[:, redundancy.positions] = redundancy.overlaps.t()  # the other columns matter to other picks alone
        whole.diagonal().copy_(redundancy.squared_norms)
        return utilities[at], whole[at][:, at]

    def told(self) -> list[str]:
        return []


class _Exposures(guards.Exposure):
    """Counts that are known already."""

    def __init__(self, times: Tensor | None):
        super().__init__(window=1)
        self._times = times

    def times(self, signatures: Tensor, ids: Tensor) -> Tensor:
        if self._times is None:
            raise NotOnRecord("how often each candidate was trained on, which this step did not record")
        return self._times

    def record(self, step: int, signatures: Tensor) -> None:
        return


class _Prescreen(Prescreen):
    """What it said then, and how it screens by it."""

    recorded: Evidence

    def standing(self, ids: Tensor) -> Tensor | None:
        return self.recorded.standing

    def doubt(self) -> str | None:
        return self.recorded.doubt

    def learn(self, ids: Tensor, utilities: Tensor, uniform: Tensor, step: int) -> None:
        return


def _positions(ids: Tensor, some: Tensor) -> Tensor:
    """Where each of ``some`` (n,) is in ``ids`` (N,), which do not repeat."""
    order = torch.argsort(ids)
    return order[torch.searchsorted(ids[order], some)]


def _missing(what: str) -> Callable[[Any], Any]:
    def absent(_: Any) -> Any:
        raise NotOnRecord(what)

    return absent
