"""Finds documents that are copies of an earlier one: of the same text, or by MinHash of nearly the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EXACT, MINHASH = "exact", "minhash"
COPIES = (EXACT, MINHASH)
_EXAMPLES = 5


@dataclass(slots=True)
class Copies:
    """Says which documents are copies of which; D documents by their places."""

    method: str
    """Of ``COPIES``."""
    first: np.ndarray
    """(D,) int64: the place of the document that each is a copy of, the first of its like; its own: it is none."""
    domains: dict[str, int] = field(default_factory=dict)
    """Domain -> copies in it."""

    def mask(self) -> bytes:
        """A byte for each place, 1 for a copy; empty if there is none."""
        copies = self.first != np.arange(len(self.first))
        return copies.astype(np.uint8).tobytes() if copies.any() else b""

    def join(self, near: np.ndarray) -> None:
        """Add what is ``near`` (D,), as ``first``, among the documents that were no copies."""
        self.first = near[self.first]

    def count(self, names: Sequence[str], codes: np.ndarray) -> None:
        """Count copies by domain; ``codes`` (D,): index into ``names``."""
        copies = self.first != np.arange(len(self.first))
        counts = np.bincount(codes[copies], minlength=len(names)).tolist()
        self.domains = {name: count for name, count in sorted(zip(names, counts, strict=True)) if count}

    def examples(self) -> frozenset[int]:
        """Places of the first copies and of what they are copies of."""
        return frozenset(place for pair in self._pairs() for place in pair)

    def _pairs(self) -> list[tuple[int, int]]:
        places = np.flatnonzero(self.first != np.arange(len(self.first)))[:_EXAMPLES]
        return list(zip(places.tolist(), self.first[places].tolist(), strict=True))

    def described(self, found: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
        """Describe them for the manifest; ``found``: place -> id and where it stands, of the examples."""
        examples = []
        for copy, first in self._pairs():
            (copied, at), (original, there) = found[copy], found[first]
            examples.append({"id": copied, "at": at, "copy_of": {"id": original, "at": there}})
        total = sum(self.domains.values())
        return {"method": self.method, "documents": total, "domains": self.domains, "examples": examples}


def exact_copies(draws: np.ndarray, texts: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Find equal texts: (D,) int64, the place of the first document with each one's text.

    Args:
        draws: (D,) uint32, and
        texts: (D,) uint64: together 96 bits of each text's digest.
        kept: (D,) bool: the documents that count; others are no copies, and nothing is a copy of them.
    """
    first = np.arange(len(draws), dtype=np.int64)
    places = np.flatnonzero(kept)
    order = places[np.lexsort((places, draws[places], texts[places]))]  # equal texts in a row, the earliest first
    if len(order):
        new = np.append(True, (texts[order[1:]] != texts[order[:-1]]) | (draws[order[1:]] != draws[order[:-1]]))
        starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        first[order] = order[starts]
    return first
