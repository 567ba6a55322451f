"""Lays the documents of a split out domain after domain, once for all processes of a machine.

Sequences are cut from this line. Of a large corpus it is written to the corpus folder when a run first needs it, and
mapped from there by every process: its pages are the file's. Of a small one each process has its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console

from megaopus.data.corpus import INDEX, SPLIT_NAMES, Corpus
from megaopus.data.index import BLOCK, LARGE, check_index
from megaopus.data.locks import alone
from megaopus.errors import DataError

_VERSION = 1
_DOCUMENTS, _STARTS, _FIRST, _MASK = "documents.npy", "starts.npy", "first.npy", "kept.npy"


class Filter(Protocol):
    """Says which documents of a split are left."""

    identity: dict[str, Any]
    """Equal for filters that mean the same."""

    @property
    def documents(self) -> np.ndarray:
        """(D,) bool."""


class Layout(NamedTuple):
    """Has the n documents of a split one after the other, those of a domain together and in corpus order."""

    documents: np.ndarray
    """(n,) int64, their numbers in the corpus."""
    starts: np.ndarray
    """(n + 1,) int64, tokens before each of them on the line; last, all tokens."""
    first: np.ndarray
    """(domains + 1,) int64, the place on the line of each domain's first document; last, n."""


def layout_of(corpus: Corpus, split: str, kept: Filter | None = None) -> Layout:
    """Lay a split out, of documents that a filter has ``kept`` if there is one, or map what was laid out before.

    Where the file system refuses a large corpus's files, a warning says so, and each process has its own.

    Raises:
        DataError: what was laid out before cannot be read, or documents do not lie one after the other.
    """
    if len(corpus) >= LARGE:
        folder = layout_folder(corpus, split, kept)
        try:
            if not folder.is_dir():
                _write(folder, corpus, split, kept)
        except OSError as error:
            remedy = "let this user write there once, and all runs to come share them"
            warnings.warn(f"{folder}: {error}; each process holds 16 bytes a document instead: {remedy}", stacklevel=2)
        else:
            return _read(folder)
    count = _count(corpus, split, kept)
    return _fill(corpus, split, kept, count, np.empty(count.sum(), "<i8"), np.empty(count.sum() + 1, "<i8"))


def mapped_mask(corpus: Corpus, split: str, kept: Filter) -> np.ndarray | None:
    """Map which documents a filter keeps, (D,) bool, from a layout of them; None: there is none yet."""
    path = layout_folder(corpus, split, kept) / _MASK
    if len(corpus) < LARGE or not path.is_file():
        return None
    found: np.ndarray = np.load(path, mmap_mode="r")
    return found


def layout_folder(corpus: Corpus, split: str, kept: Filter | None = None) -> Path:
    """Say where it lies: in the corpus folder, under a name that stands for corpus, split and filter."""
    return corpus.path / f"layout-{hashlib.sha256(_meaning(corpus, split, kept).encode()).hexdigest()[:16]}"


def _meaning(corpus: Corpus, split: str, kept: Filter | None) -> str:
    filtered = [] if kept is None else [kept.identity]
    return json.dumps([_VERSION, corpus.fingerprint, split, *filtered], sort_keys=True)


def _blocks(corpus: Corpus, split: str, kept: Filter | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (numbers of the split's documents, their domains' codes), block by block of the corpus.

    Codes stay of 16 bits, which numpy sorts in a time that grows with their count alone.
    """
    code = SPLIT_NAMES.index(split)
    for first in range(0, len(corpus), BLOCK):
        part = slice(first, first + BLOCK)
        taken = corpus.split_codes[part] == code
        if kept is not None:
            taken &= kept.documents[part]
        places = np.flatnonzero(taken)
        yield first + places, corpus.domain_codes[part][places]


def _count(corpus: Corpus, split: str, kept: Filter | None) -> np.ndarray:
    """Count the split's documents of each domain, (domains,) int64."""
    count = np.zeros(len(corpus.domains), dtype=np.int64)
    for _, domains in _blocks(corpus, split, kept):
        count += np.bincount(domains, minlength=len(count))
    return count


def _fill(
    corpus: Corpus, split: str, kept: Filter | None, count: np.ndarray, documents: np.ndarray, starts: np.ndarray
) -> Layout:
    """Lay the documents out in the arrays given, which may be of files."""
    first = np.concatenate([[0], np.cumsum(count)])
    begin = first.copy()
    for numbers, domains in _blocks(corpus, split, kept):
        order = np.argsort(domains, kind="stable")
        numbers = numbers[order]
        here = np.bincount(domains, minlength=len(count))
        ends = np.cumsum(here)
        for domain in np.flatnonzero(here).tolist():
            found = numbers[ends[domain] - here[domain] : ends[domain]]
            documents[begin[domain] : begin[domain] + len(found)] = found
            starts[begin[domain] + 1 : begin[domain] + 1 + len(found)] = corpus.lengths_of(found)
            begin[domain] += len(found)
    starts[0] = 0
    for at in range(1, len(starts), BLOCK):
        part = starts[at : at + BLOCK]
        np.cumsum(part, out=part)
        part += starts[at - 1]
    return Layout(documents, starts, first)


def _write(folder: Path, corpus: Corpus, split: str, kept: Filter | None) -> None:
    """Write it, whole or not at all; a process that finds another one at it waits. Raises OSError."""
    with alone(corpus.path):
        if folder.is_dir():
            return
        growing = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir()
        told = f"laying out {len(corpus):,} documents of {corpus.path}, once for all runs"
        Console(stderr=True).print(told, highlight=False, markup=False, soft_wrap=True)
        check_index(corpus.path / INDEX, corpus.index)
        count = _count(corpus, split, kept)
        total = int(count.sum())
        # an empty file cannot be mapped
        documents = np.lib.format.open_memmap(growing / _DOCUMENTS, "w+", "<i8", (max(1, total),))
        starts = np.lib.format.open_memmap(growing / _STARTS, "w+", "<i8", (total + 1,))
        found = _fill(corpus, split, kept, count, documents[:total], starts)
        np.save(growing / _FIRST, found.first)
        if kept is not None:
            np.save(growing / _MASK, kept.documents)
        documents.flush()
        starts.flush()
        growing.rename(folder)


def _read(folder: Path) -> Layout:
    try:
        documents, starts = (np.load(folder / name, mmap_mode="r") for name in (_DOCUMENTS, _STARTS))
        first = np.load(folder / _FIRST)
        found = Layout(documents[: first[-1]], starts, first)
        if len(starts) != first[-1] + 1 or len(found.documents) != first[-1]:
            raise ValueError(f"{len(starts):,} starts of {first[-1]:,} documents")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder}: cannot be read ({error}); delete it, the next run lays it out again") from error
    return found
