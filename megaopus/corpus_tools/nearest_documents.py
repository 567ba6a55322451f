"""Says how near each document of a corpus is to benchmark items, chunk by chunk, by one process a core.

A chunk's file appears when it is whole: a killed run loses no chunk that was finished.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from megaopus.corpus_tools.progress import stages
from megaopus.corpus_tools.similarity import HashedTfidf, SentenceEncoder, among, shared_runs
from megaopus.corpus_tools.tasks.hands import Hands
from megaopus.corpus_tools.workers import worker_pool
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.folder import StoppedError
from megaopus.data.permutation import permute
from megaopus.errors import DataError

HASHED = "hashed"
"""The encoder that needs no download; another name is a sentence-transformers model's."""
OVERLAP_WORDS = 13
"""Words in a row that an item and a document must share to overlap (as GPT-3's, arXiv 2005.14165, appendix C)."""
CHUNK = 1024
"""Documents between two files of a run that may be killed."""
_SAMPLE = 20_000
"""Documents that inverse document frequencies are taken from."""


class Item(NamedTuple):
    """A benchmark item: what it is called and all its text."""

    name: str
    text: str


@dataclass
class Found:
    """Says what was found of each candidate document, (n,) each, in the order of ``documents``."""

    documents: np.ndarray
    """Numbers in the corpus: all of the pool and the old proxy."""
    similarity: np.ndarray
    item: np.ndarray
    overlaps: np.ndarray
    """Whether a run of words is shared with any item."""
    overlaps_held_out: np.ndarray
    """Whether one is with an item that is held out."""
    digest: np.ndarray
    """Of the tokens, equal for equal documents."""
    items_met: np.ndarray
    """(items,) whether the item shares a run of words with any candidate; of those held out too, which come last."""


def search(
    corpus: Corpus,
    items: Sequence[Item],
    held_out: Sequence[Item],
    encoder: str,
    work: Path,
    workers: int,
    chunk: int,
    console: Console,
    hands: Hands | None = None,
) -> Found:
    """Every document that is not held out for validation, ``chunk`` of them a file in ``work``.

    Similarity is to ``items`` alone; shared words are looked for in those ``held_out`` too. ``hands``: who searches, in
    place of ``workers`` processes. Raises StoppedError if a worker dies.
    """
    documents = _documents(corpus)
    files = [_file(work, number) for number in range(-(-len(documents) // chunk))]
    left = [(number, file) for number, file in enumerate(files) if not file.is_file()]
    given = (tuple(items), tuple(held_out), encoder, chunk)
    if hands is not None:
        units = SearchChunks(corpus.path, corpus.fingerprint, *given, work.absolute(), len(files))
        with stages(console) as stage:
            hands(units, stage(units.name, len(files), "chunks/s", 1))
        left = []
    if workers == 1 or len(left) <= 1:
        done = _alone(Searcher(corpus, *given), left) if left else iter(())
    else:
        done = _shared(corpus, *given, left, min(workers, len(left)))
    for _ in track(done, "finding the nearest", total=len(left), console=console, disable=console.quiet or not left):
        pass
    parts = []
    for file in files:
        with np.load(file, allow_pickle=False) as held:
            parts.append(dict(held))
    names = ("similarity", "item", "overlaps", "overlaps_held_out", "digest")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in names}
    met_anywhere = np.unique(np.concatenate([part["met"] for part in parts]))
    items_met = np.array([bool(np.isin(run, met_anywhere).any()) for run in _runs([*items, *held_out])])
    return Found(documents, items_met=items_met, **joined)


def _file(work: Path, number: int) -> Path:
    return work / f"near-{number:06d}.npz"


def _documents(corpus: Corpus) -> np.ndarray:
    return np.flatnonzero(corpus.split_codes != SPLITS.index("validation"))


def _runs(items: Sequence[Item]) -> list[np.ndarray]:
    return [shared_runs(item.text, OVERLAP_WORDS) for item in items]


def _alone(searcher: Searcher, left: Sequence[tuple[int, Path]]) -> Iterator[None]:
    for number, file in left:
        searcher.write(number, file)
        yield


def _shared(
    corpus: Corpus,
    items: Sequence[Item],
    held_out: Sequence[Item],
    encoder: str,
    chunk: int,
    left: Sequence[tuple[int, Path]],
    workers: int,
) -> Iterator[None]:
    pool = worker_pool(workers, _start, corpus.path.resolve(), list(items), list(held_out), encoder, chunk)
    try:
        for future in as_completed([pool.submit(_work, number, file) for number, file in left]):
            future.result()
            yield
    except BrokenProcessPool as error:
        raise StoppedError(
            "a worker process died while it searched, for want of memory perhaps; start again with fewer --workers:"
            " what is finished is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Searcher:
    """Items as the encoder sees them, beside a corpus."""

    def __init__(self, corpus: Corpus, items: Sequence[Item], held_out: Sequence[Item], encoder: str, chunk: int):
        self._corpus, self._chunk = corpus, chunk
        self._documents = documents = _documents(corpus)
        self._known, self._held_out = (
            np.unique(np.concatenate([*_runs(part), np.empty(0, np.uint64)]))
            for part in ([*items, *held_out], held_out)
        )
        asked = [item.text for item in items]
        self._encoding: HashedTfidf | SentenceEncoder
        if encoder == HASHED:
            count = min(_SAMPLE, len(documents))
            sampled = documents[np.sort(permute(np.arange(count), len(documents), "bench proxy"))]
            parts = np.array_split(sampled, -(-count // chunk))
            self._encoding = HashedTfidf(asked, (text for part in parts for text in corpus.texts(part)))
        else:
            self._encoding = SentenceEncoder(encoder, asked)

    def write(self, number: int, file: Path) -> None:
        """Chunk ``number``, whole or not at all."""
        here = self._documents[number * self._chunk : (number + 1) * self._chunk]
        content = self._corpus.texts(here)
        similarity, item = self._encoding.nearest(content)
        met = [among(shared_runs(text, OVERLAP_WORDS), self._known) for text in content]
        partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
        with partial.open("wb") as stream:
            np.savez(
                stream,
                similarity=similarity,
                item=item,
                overlaps=np.array([len(each) > 0 for each in met]),
                overlaps_held_out=np.array([len(among(each, self._held_out)) > 0 for each in met]),
                digest=np.array([_digest(self._corpus, n) for n in here], dtype=np.uint64),
                met=np.unique(np.concatenate(met)),
            )
        os.replace(partial, file)


@dataclass(frozen=True)
class SearchChunks:
    """Compares chunks of documents with items, for tasks."""

    corpus: Path
    fingerprint: str
    items: tuple[Item, ...]
    held_out: tuple[Item, ...]
    encoder: str
    chunk: int
    """Documents of one."""
    folder: Path
    """Of the results, absolute."""
    count: int
    """Chunks."""
    name: str = "finding the nearest"

    def numbers(self) -> Sequence[int]:
        """All of them."""
        return range(self.count)

    def done(self, number: int) -> bool:
        """Tell whether the chunk's file is there."""
        return _file(self.folder, number).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Compare a chunk. Raises DataError if another corpus lies there now."""
        self._searcher.write(number, _file(self.folder, number))
        return {"chunks": 1}

    @cached_property
    def _searcher(self) -> Searcher:
        corpus = Corpus.open(self.corpus)
        if corpus.fingerprint != self.fingerprint:
            raise DataError(f"{self.corpus}: changed while its documents were compared; start again")
        return Searcher(corpus, self.items, self.held_out, self.encoder, self.chunk)


def _digest(corpus: Corpus, document: int) -> int:
    start = corpus.offsets[document]
    content = np.ascontiguousarray(corpus.tokens[start : start + corpus.lengths[document]]).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# -- in the workers ----------------------------------------------------------------------------------------------------

_searcher: Searcher | None = None


def _start(corpus: Path, items: list[Item], held_out: list[Item], encoder: str, chunk: int) -> None:
    global _searcher
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _searcher = Searcher(Corpus.open(corpus), items, held_out, encoder, chunk)


def _work(number: int, file: Path) -> None:
    assert _searcher is not None
    _searcher.write(number, file)
