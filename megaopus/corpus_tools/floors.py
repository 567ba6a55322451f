"""Sees to it that the held-out splits of a small corpus, or of a domain of few documents, hold some text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megaopus.corpus_tools.split_rule import POOL, PROXY, VALIDATION, SplitRule

CHARACTERS_A_TOKEN = 6
"""More than tokenizers have on average, so that a floor in characters fills a sequence of tokens."""
_SMALLEST_PIECE = 512
"""Characters: shorter texts are not cut."""
_PIECES = 200
"""Of a domain that is cut: enough to hold one out in a hundred."""
_FEWEST_PIECES = 4


@dataclass(frozen=True, slots=True)
class Documents:
    """Describes D documents in reading order."""

    domains: np.ndarray
    """(D,) int."""
    splits: np.ndarray
    """(D,) uint8: where the hash sends them."""
    draws: np.ndarray
    """(D,) uint32: the hash; documents with the same text have the same."""
    sizes: np.ndarray
    """(D,) uint32: characters."""


@dataclass(slots=True)
class Filled:
    """Holds the splits with their floors."""

    splits: np.ndarray
    """(D,) uint8."""
    may_cut: bool
    pieces: dict[int, int] = field(default_factory=dict)
    """Domain -> characters of the pieces that its documents must be cut into first: they are too long to hold one out.
    """
    moved: dict[int, int] = field(default_factory=dict)
    """Split -> documents that it got from the pool."""

    def cut(self, domain: int, size: int) -> None:
        """Ask for pieces of a domain of at most ``size`` characters; 0: for none. No-op unless ``may_cut``."""
        if size and self.may_cut:
            self.pieces[domain] = min(size, self.pieces.get(domain, size))


def fill(documents: Documents, names: Sequence[str], rule: SplitRule, may_cut: bool) -> Filled:
    """Move documents from the pool to held-out splits that have too little, those first that the hash sends next.

    A split has too little if none of its domains has the text for a sequence of ``rule.seq_len`` tokens; then each
    domain gives it that much, but at most a tenth of its own text. The same holds for one domain alone if it is wanted
    by name, or if its share of the text asks for as much. Where no document is that short, ``pieces`` says how to cut;
    where that is impossible, a whole document goes if it leaves the pool half of the text. Documents with the same text
    move together, and no text of an unwanted domain becomes proxy.

    ``names``: of the domains, in the order of their numbers. ``may_cut``: whether documents are still whole.
    """
    filled = Filled(documents.splits.copy(), may_cut)
    every = np.arange(len(names))
    named = np.flatnonzero(np.isin(names, rule.wanted))
    givers = named if len(named) else every
    if rule.validation_fraction:
        _fill_split(documents, filled, VALIDATION, rule.validation_fraction, every, named, rule.seq_len)
    if rule.proxy_fraction:
        _fill_split(documents, filled, PROXY, rule.proxy_fraction, givers, named, rule.seq_len)
    totals, pool = (_characters(documents, here, len(names)) for here in (slice(None), filled.splits == POOL))
    left = 1 - rule.validation_fraction - rule.proxy_fraction * np.isin(every, givers)
    for code in np.flatnonzero(pool < totals * left / 2):  # a document that is most of its domain was held out
        sizes = documents.sizes[documents.domains == code]
        filled.cut(int(code), _piece(sizes, 0, int(totals[code]) // _PIECES))
    return filled


def _fill_split(
    documents: Documents,
    filled: Filled,
    split: int,
    fraction: float,
    givers: np.ndarray,
    named: np.ndarray,
    length: int,
) -> None:
    """Fill one split from the domains that give to it, ``givers`` (G,); ``named`` are those wanted by name."""
    floor = CHARACTERS_A_TOKEN * length
    count = int(documents.domains.max()) + 1
    totals, has = (_characters(documents, here, count) for here in (slice(None), filled.splits == split))
    goals = np.minimum(floor, totals // 10).clip(min=1)
    lacking = has[givers].max() < floor
    asked = lacking | np.isin(givers, named) | (fraction * totals[givers] >= floor)
    short = givers[(has[givers] < goals[givers]) & asked]
    barred = documents.draws[~np.isin(documents.domains, givers)]  # texts that another domain has too
    units = {code: _units(documents, filled.splits, code, barred) for code in short.tolist()}
    chosen: list[np.ndarray] = []
    for code, (draws, sizes) in units.items():
        taken, now = _choose(sizes, int(has[code]), int(goals[code]), int(totals[code]) // 10)
        chosen.append(draws[taken])
        if 2 * now < goals[code]:
            filled.cut(code, _piece(sizes, int(goals[code]), int(totals[code] * min(fraction, 2 / _PIECES)) // 2))
    met = has[givers].any() or any(map(len, chosen))
    for code in sorted(units, key=lambda code: -totals[code]):
        if code not in filled.pieces and (not met or (code in named and not has[code])):
            draws, sizes = units[code]
            spare = int(_characters(documents, filled.splits == POOL, count)[code]) - int(totals[code]) // 2
            one = np.flatnonzero(sizes <= spare)[:1]
            chosen.append(draws[one])
            met = met or len(one) > 0
    moved = np.isin(documents.draws, np.concatenate([*chosen, barred[:0]])) & (filled.splits == POOL)
    filled.splits[moved] = split
    filled.moved[split] = int(moved.sum())


def _characters(documents: Documents, here: np.ndarray | slice, domains: int) -> np.ndarray:
    """Characters of some documents by domain, (domains,) int64."""
    return np.bincount(documents.domains[here], documents.sizes[here], minlength=domains).astype(np.int64)


def _units(documents: Documents, splits: np.ndarray, domain: int, barred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texts of a domain's pool, equal ones as one, in the hash's order: (hashes (U,), characters (U,) int64)."""
    members = np.flatnonzero((documents.domains == domain) & (splits == POOL))
    members = members[~np.isin(documents.draws[members], barred)]
    draws, place = np.unique(documents.draws[members], return_inverse=True)
    return draws, np.bincount(place, documents.sizes[members], minlength=len(draws)).astype(np.int64)


def _choose(sizes: np.ndarray, has: int, goal: int, most: int) -> tuple[list[int], int]:
    """Take in turn what fits below ``most`` until there is ``goal``: (places in ``sizes``, characters in all)."""
    taken = []
    for place, size in enumerate(sizes.tolist()):
        if has >= goal:
            break
        if has + size <= most:
            taken.append(place)
            has += size
    return taken, has


def _piece(sizes: np.ndarray, goal: int, usual: int) -> int:
    """Characters of the pieces to cut documents of such sizes (n,) into; 0: that would not help."""
    piece = max(goal, usual, _SMALLEST_PIECE)
    counts = np.maximum(1, np.round(sizes / piece))
    return piece if counts.max(initial=1) > 1 and counts.sum() >= _FEWEST_PIECES else 0
