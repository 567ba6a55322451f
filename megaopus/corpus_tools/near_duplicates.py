"""Counts the texts seen before that are nearly the same as another: most of their distinct words are shared."""

from __future__ import annotations

import numpy as np

from megaopus.corpus_tools.similarity import distinct_words
from megaopus.data.permutation import mix

ALIKE = 0.7
"""Jaccard similarity of two texts' sets of words, |A and B| / |A or B|, from which on they are near-duplicates."""
_BANDS, _ROWS = 32, 4
"""Of smallest hashes (Broder 1997). Sets of a similarity s meet in one of the bands with a probability of
1 - (1 - s^4)^32: .9998 at ALIKE; those that meet are compared word by word."""
_SEEDS = mix(np.arange(_BANDS * _ROWS, dtype=np.uint64))


class NearDuplicates:
    """Remembers texts, and counts those of them that a new one is a near-duplicate of."""

    def __init__(self) -> None:
        self._words: list[np.ndarray] = []
        self._met: dict[tuple[int, ...], list[int]] = {}

    def count(self, text: str) -> int:
        """Count the remembered texts that share most of their words with ``text``; 0 for a text without words."""
        words = distinct_words(text)
        known = {number for band in _bands(words) for number in self._met.get(band, ())}
        return sum(_similarity(words, self._words[number]) >= ALIKE for number in known)

    def add(self, text: str) -> None:
        """Remember a text."""
        words = distinct_words(text)
        for band in _bands(words):
            self._met.setdefault(band, []).append(len(self._words))
        self._words.append(words)


def _bands(words: np.ndarray) -> list[tuple[int, ...]]:
    """The band's number and its smallest hashes, of each band; none of no words."""
    if not len(words):
        return []
    smallest = mix(words[:, None] ^ _SEEDS).min(axis=0).reshape(_BANDS, _ROWS)
    return [(band, *row) for band, row in enumerate(smallest.tolist())]


def _similarity(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
