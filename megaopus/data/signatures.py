"""Reads what tells copies apart of every sequence of a pool, worked out when its corpus was prepared.

Which tokens a sequence has depends on the split, its length and what a filter keeps (``Sequences.key``), so a corpus
has signatures for the length it was prepared for; runs of another hash their candidates' tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megaopus.errors import DataError

if TYPE_CHECKING:
    from megaopus.data.sequences import Sequences


def signatures_path(pool: Sequences) -> Path:
    """Say where they lie: in the corpus folder, under a name that stands for corpus, split, length and filter."""
    return pool.corpus.path / f"signatures-{hashlib.sha256(pool.key.encode()).hexdigest()[:16]}.npy"


def read_signatures(pool: Sequences) -> np.ndarray | None:
    """Map the signatures of all sequences, (n,) int64 as ``guards.token_signatures``; None: there are none of these.

    Raises DataError if the file is broken.
    """
    path = signatures_path(pool)
    if not path.is_file():
        return None
    remedy = "delete it, runs work without it"
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if found.shape != (len(pool),) or found.dtype != np.dtype("<i8"):
        raise DataError(f"{path}: {found.dtype} of shape {found.shape} for {len(pool):,} sequences; {remedy}")
    return found
