"""Says how near documents are to a set of items: largest cosine similarity, and which words they share in a row."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megaopus.corpus_tools.readers.stored import needed

_BUCKETS = 1 << 18
WORD = re.compile(r"[^\W_]+")
"""A word: letters and digits in a row."""
_ITEMS_AT_ONCE = 1024
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class HashedTfidf:
    """TF-IDF of hashed words, inverse document frequencies from ``sample``.

    (1 + log count) x log((1 + D) / (1 + documents with the word)) per bucket of words, rows of length 1.
    """

    def __init__(self, items: Sequence[str], sample: Iterable[str]):
        import torch  # here: the command's help is light

        self._torch = torch
        documents, frequency = 0, np.zeros(_BUCKETS)
        for text in sample:
            documents += 1
            frequency[np.unique(_buckets(text))] += 1
        self._idf = np.log((1 + documents) / (1 + frequency)).astype(np.float32) + 1e-3
        rows = [self._row(text) for text in items]
        self._columns = np.unique(np.concatenate([buckets for buckets, _ in rows]))
        self._items = torch.zeros(len(self._columns), len(items))
        for number, (buckets, weights) in enumerate(rows):
            self._items[np.searchsorted(self._columns, buckets), number] = torch.from_numpy(weights)

    def _row(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(buckets ascending (k,), weights (k,) float32 of norm 1, or empty)."""
        buckets, counts = np.unique(_buckets(text), return_counts=True)
        weights = (1 + np.log(counts)).astype(np.float32) * self._idf[buckets]
        norm = np.linalg.norm(weights)
        return buckets, weights / norm if norm else weights

    def nearest(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(largest cosine similarity with any item (n,) float32, that item's number (n,) int64) of each text.

        Products with the items' buckets alone, as sparse rows.
        """
        torch = self._torch
        owners, columns, values = [], [], []
        for number, text in enumerate(texts):
            buckets, weights = self._row(text)
            place = np.searchsorted(self._columns, buckets).clip(max=len(self._columns) - 1)
            shared = self._columns[place] == buckets
            columns.append(place[shared])
            values.append(weights[shared])
            owners.append(np.full(int(shared.sum()), number))
        places = torch.from_numpy(np.stack([np.concatenate(owners), np.concatenate(columns)]))
        size = (len(texts), len(self._columns))
        rows = torch.sparse_coo_tensor(places, torch.from_numpy(np.concatenate(values)), size, check_invariants=False)
        best, which = torch.full((len(texts),), -1.0), torch.zeros(len(texts), dtype=torch.int64)
        for first in range(0, self._items.shape[1], _ITEMS_AT_ONCE):
            found, nearest = (rows @ self._items[:, first : first + _ITEMS_AT_ONCE]).max(1)
            better = found > best
            best[better], which[better] = found[better], nearest[better] + first
        return best.numpy(), which.numpy()


class SentenceEncoder:
    """Embeddings of a sentence-transformers model by name or path; raises DataError if the package is not there."""

    def __init__(self, name: str, items: Sequence[str]):
        module: Any = needed("sentence_transformers", f"--encoder {name}", "sentence-transformers")
        self._model = module.SentenceTransformer(name)
        self._items = self._embed(items)

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))

    def nearest(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As ``HashedTfidf.nearest``."""
        similarity = self._embed(texts) @ self._items.T
        return similarity.max(1).astype(np.float32), similarity.argmax(1)


def distinct_words(text: str) -> np.ndarray:
    """(k,) uint64 digests of a text's distinct words, ascending; lower case, marks left out."""
    return np.unique(word_digests(text))


def shared_runs(text: str, length: int) -> np.ndarray:
    """(words - length + 1,) uint64 digests of each run of ``length`` words in a row; lower case, marks left out."""
    return runs_of_words(word_digests(text), length)


def word_digests(text: str) -> np.ndarray:
    """(words,) uint64 digests of a text's words in their order; lower case, marks left out."""
    return np.array([_digest(word) for word in WORD.findall(text.lower())], dtype=np.uint64)


def runs_of_words(words: np.ndarray, length: int) -> np.ndarray:
    """(words - length + 1,) uint64 digests of each run of ``length`` of the words whose digests are given."""
    count = max(0, len(words) - length + 1)
    total = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        total = total * _FACTOR + words[place : place + count]
        total ^= total >> np.uint64(29)
    return total


def among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Those of ``values`` that are in ``known``, which is sorted."""
    if not len(known):
        return values[:0]
    return values[known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values]


def _buckets(text: str) -> np.ndarray:
    return np.array([_digest(word) % _BUCKETS for word in WORD.findall(text.lower())], dtype=np.int64)


@lru_cache(1 << 20)
def _digest(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
