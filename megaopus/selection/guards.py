"""Keeps selection from collapsing: by a cap on exposures, a floor for each domain, and alarms."""

from __future__ import annotations

import base64
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection import counter_rng, sampler
from megaopus.selection.backend import Batch, Candidates, Proxy, ScoringBackend
from megaopus.selection.candidates import as_candidates, even_share, tensors_of

_CACHED = 1 << 15
"""Numbers that are hashed at a time."""


class Exposure:
    """Counts how often each sequence was trained on over the last ``window`` steps.

    Sequences are told apart by a 64-bit signature of their tokens, so copies count as one. What a step costs depends on
    its own sequences, not on the window.
    """

    def __init__(self, window: int):
        self._window = window
        self._steps: deque[tuple[int, Tensor]] = deque()
        self._counts: dict[int, int] = {}

    def times(self, signatures: Tensor, ids: Tensor) -> Tensor:
        """(N,) how often each would have been trained on if it were picked now, copies with smaller ids too."""
        order = torch.argsort(ids)
        order = order[signatures[order].argsort(stable=True)]  # copies one after the other, smaller ids first
        different, sizes = signatures[order].unique_consecutive(return_counts=True)
        trained_on = torch.tensor([self._counts.get(each, 0) for each in different.tolist()], dtype=torch.int64)
        copies = torch.arange(1, len(order) + 1) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return torch.empty_like(order).index_copy(0, order, trained_on.repeat_interleave(sizes) + copies)

    def record(self, step: int, signatures: Tensor) -> None:
        """These were trained on in ``step``; what lies ``window`` steps back is forgotten."""
        self._add(step, signatures)
        while self._steps[0][0] <= step - self._window:
            _, old = self._steps.popleft()
            for signature in old.tolist():
                if self._counts[signature] == 1:
                    del self._counts[signature]
                else:
                    self._counts[signature] -= 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the steps, how many sequences each had, and their signatures as base64 of int64."""
        packed = array("q")
        for _, found in self._steps:
            packed.extend(found.tolist())
        return {
            "steps": [step for step, _ in self._steps],
            "sizes": [len(found) for _, found in self._steps],
            "signatures": base64.b64encode(packed.tobytes()).decode(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self._steps.clear()
        self._counts.clear()
        packed = torch.tensor(array("q", base64.b64decode(state["signatures"])).tolist(), dtype=torch.int64)
        for step, found in zip(state["steps"], packed.split(state["sizes"]), strict=True):
            self._add(step, found)

    def _add(self, step: int, found: Tensor) -> None:
        self._steps.append((step, found))
        counts = self._counts
        for signature in found.tolist():
            counts[signature] = counts.get(signature, 0) + 1


def token_signatures(batch: Batch) -> Tensor:
    """(n,) int64 hash of each sequence: of every number in its first tensor, (n, ...), and its place."""
    tokens = next(tensors_of(batch)).cpu().flatten(1)
    tokens = tokens.double().view(torch.int64) if tokens.is_floating_point() else tokens.to(torch.int64)
    places = torch.arange(tokens.shape[1]) << 32
    rows = max(1, _CACHED // max(1, tokens.shape[1]))  # what is hashed at a time stays in the processor's cache
    sums = [counter_rng.bits(0, part + places).sum(dim=1) for part in tokens.split(rows)]  # int64 sums wrap
    return counter_rng.bits(0, torch.cat(sums))


def shared_signatures(candidates: Candidates, backend: ScoringBackend) -> Tensor:
    """``token_signatures`` of all candidates (N,), each data-parallel rank hashing its share; collective."""
    own = token_signatures(own_share(candidates, backend).batch())
    if backend.world_size == 1:
        return own
    return backend.gather_candidates(own.to(backend.device)).cpu()[: len(candidates)]


def own_share(candidates: Candidates, backend: ScoringBackend) -> Candidates:
    """Those of the candidates that this data-parallel rank hashes, as many on each; copies of the last fill up."""
    if backend.world_size == 1:
        return candidates
    return candidates.take(even_share(len(candidates), backend.world_size, backend.rank)[0])


def as_many(batches: Sequence[Candidates]) -> list[Candidates]:
    """Take the first of each, as many as the smallest has."""
    count = min(len(each) for each in batches)
    return [each.take(torch.arange(count)) for each in batches]


def alarm_of_pairs(picks: Candidates, others: Sequence[Candidates], level: float) -> Event | None:
    """The alarm if ``picks`` repeat themselves: fewer different pairs of tokens than ``level`` times the others'.

    The least of the others counts, and as many sequences of each are compared. None too if batches are not tokens
    (n, T).
    """
    first = as_many([picks, *others])
    count = len(first[0])
    tokens = [next(tensors_of(each.batch())).cpu() for each in first]
    if any(each.ndim != 2 or each.is_floating_point() for each in tokens):
        return None
    pairs = [(each[:, :-1].long() << 32) + each[:, 1:] for each in tokens]
    found, *elsewhere = (len(each.unique()) for each in pairs)
    if found >= level * min(elsewhere):
        return None
    text = f"{found} different token pairs in {count} picks, {min(elsewhere)} in as many sequences elsewhere"
    return alarm("token_pairs", text, picks=found, elsewhere=min(elsewhere), sequences=count)


def token_pair_check(
    candidates: Candidates, proxy: Proxy | None, level: float, seed: int, step: int, period: int
) -> Callable[[Tensor], Event | None]:
    """Make what looks at the picks (n,) of a buffer: beside a uniform draw and, if there is one, the proxy batch.

    ``period``: the number of the buffer, which ``step`` is the first to use.
    """

    def check(picked: Tensor) -> Event | None:
        others = compared_with(candidates, proxy, len(picked), seed, step, period)
        return alarm_of_pairs(candidates.take(picked), others, level)

    return check


def compared_with(
    candidates: Candidates, proxy: Proxy | None, count: int, seed: int, step: int, period: int
) -> list[Candidates]:
    """Give what the token pairs of ``count`` picks are compared with: a uniform draw, and the proxy if there is one."""
    drawn = candidates.take(sampler.pick_uniform(candidates.ids.cpu(), count, seed, period))
    return [drawn] if proxy is None else [drawn, as_candidates(proxy(step), step)]


def alarm(which: str, text: str, **facts: float) -> Event:
    """The event of an alarm, which makes a step's picks uniform."""
    return Event(f"selection.alarm.{which}", f"alarm: {text}; picked uniformly", **facts)


def quotas(floor: float, domains: Tensor, usable: Tensor, count: int, seed: int, step: int) -> dict[int, int]:
    """Picks that each domain gets at least: ``floor`` times its share of the buffer, of ``count`` in all.

    Fractions are rounded up as often as keeps the mean over steps, by noise keyed by (seed, step, domain).
    ``domains``: (N,) of the buffer; ``usable``: (n,) of what may be picked, of which no domain is due more than it has.
    The quotas add up to ``count`` at most.
    """
    present, sizes = domains.unique(return_counts=True)
    due = floor * sizes.double() * count / len(domains)
    rounded = (due + counter_rng.uniform(counter_rng.key(seed, "floor", step), present)).floor().long()
    names, sizes = usable.unique(return_counts=True)
    there = dict(zip(names.tolist(), sizes.tolist(), strict=True))
    found, left = {}, count
    for domain, quota in zip(present.tolist(), rounded.tolist(), strict=True):
        found[domain] = min(quota, there.get(domain, 0), left)
        left -= found[domain]
    return found
