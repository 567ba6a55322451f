"""Works out what tells copies apart of every sequence of a new corpus's pool, so that no run hashes their tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megaopus.corpus_tools.progress import Advance
from megaopus.data.corpus import Corpus
from megaopus.data.permutation import mix
from megaopus.data.signatures import signatures_path
from megaopus.errors import DataError

if TYPE_CHECKING:
    from megaopus.data.sequences import Sequences

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_CACHED = 1 << 15
"""Tokens that are hashed at a time: they stay in the processor's cache."""
_CHUNK = 256
"""Sequences that a thread reads at a time."""


def token_signatures(tokens: np.ndarray) -> np.ndarray:
    """(n,) int64 hash of each row of (n, T) integers, every number and its place counted.

    The numbers of ``selection.guards.token_signatures``, by which checkpoints count exposures.
    """
    places = np.arange(tokens.shape[1], dtype=np.uint64) << np.uint64(32)
    sums = np.empty(len(tokens), dtype=np.uint64)
    rows = max(1, _CACHED // tokens.shape[1])
    for first in range(0, len(tokens), rows):
        part = tokens[first : first + rows].astype(np.int64).view(np.uint64) + places
        part *= _GAMMA
        sums[first : first + rows] = mix(part).sum(axis=1, dtype=np.uint64)
    return mix(sums * _GAMMA).view(np.int64)


def write_signatures(pool: Sequences, workers: int, advance: Advance) -> None:
    """Write the signatures of all sequences into the corpus folder.

    Args:
        pool: whose; the tokens as ``CandidateBuffer.batch`` gives them are hashed.
        workers: threads.
        advance: called with numbers of sequences that are done.
    """

    def work(first: int) -> np.ndarray:
        return token_signatures(pool.read(np.arange(first, min(first + _CHUNK, len(pool)))))

    found = np.empty(len(pool), dtype="<i8")
    starts = range(0, len(pool), _CHUNK)
    with ThreadPoolExecutor(workers) as threads:
        for first, part in zip(starts, threads.map(work, starts), strict=True):
            found[first : first + _CHUNK] = part
            advance(len(part))
    np.save(signatures_path(pool), found)


def sign_pool(folder: Path, seq_len: int, workers: int, line: Callable[[int], Advance]) -> None:
    """Write the signatures of a corpus folder that is whole but for them, for runs of this ``seq_len``.

    ``line``: starts a line of progress for so many sequences. Where no domain fills a sequence there are none.
    """
    from megaopus.data.sequences import Sequences  # and torch, which --help is to do without

    corpus = Corpus.open(folder)
    try:
        pool = Sequences(corpus, "pool", seq_len)
    except DataError:
        return
    write_signatures(pool, workers, line(len(pool)))
