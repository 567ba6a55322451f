"""Scores documents as DSIR does: hashed n-grams of a target against those of the pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.corpus_tools.progress import Advance
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.feature_numbers import BUCKETS, hashed, log_probability
from megaopus.data.scores import HIGHEST
from megaopus.errors import DataError
from megaopus.score.base import Again, Begin, file_stamps, keep_array, spans

_COUNTS = "counts.npy"
_TEXTS = 256
"""Documents of a target file that are tokenised in one call."""


class Dsir:
    """Log-likelihood of a document's hashed n-grams under the target less that under the pool, nats a token.

    DSIR-like, as ``data.text_features`` has it of sequences (and says what the published package does): means over the
    document's unigrams and over its bigrams, added, so that length does not count; the end-of-document token is left
    out, all else counts.
    """

    best = HIGHEST
    batch_tokens = 1 << 20
    chunk_tokens = 1 << 24

    def __init__(self, corpus: Corpus, target: Source | None):
        """``target``: documents to be like; None: those of the split proxy."""
        self._corpus, self._target = corpus, target
        self.about: dict[str, Any] = {"method": "dsir", "target": str(target.path) if target else "proxy"}
        self.about["buckets"] = BUCKETS
        self.stamps = file_stamps(target) if target else []
        self._odds = np.empty(0)

    def units(self, again: Again, work: Path) -> CountChunks:
        """Return what tasks count before ``ready`` adds it up."""
        splits = ("pool",) if self._target is not None else ("pool", "proxy")
        chunks = [(split, number) for split in splits for number in range(len(self._chunks(split)))]
        return CountChunks(again, work, tuple(chunks))

    def ready(self, work: Path, begin: Begin) -> None:
        """Count the n-grams of target and pool."""
        kept = work / _COUNTS
        if not kept.is_file():
            pool = self._count_split("pool", work, begin)
            if self._target is None:
                target = self._count_split("proxy", work, begin)
            else:
                target = self._count_files(self._target)
            keep_array(kept, np.stack([target, pool]))
        target, pool = np.load(kept, allow_pickle=False)
        self._odds = log_probability(target) - log_probability(pool)

    def scores(self, documents: np.ndarray) -> np.ndarray:
        """(n,) float64."""
        corpus = self._corpus
        lengths = corpus.lengths[documents]
        start = corpus.offsets[documents[0]]
        tokens = corpus.tokens[start : start + lengths.sum()].astype(np.uint64)
        owners = np.repeat(np.arange(len(documents)), lengths)
        inside = np.ones(len(tokens), dtype=bool)
        inside[np.cumsum(lengths) - 1] = False  # what ends each document
        uni, bi = (each[0] for each in hashed(tokens[None]))
        found = _means(self._odds[0][uni], owners, inside, len(documents))
        pairs = inside[:-1] & inside[1:]
        return found + np.nan_to_num(_means(self._odds[1][bi], owners[:-1], pairs, len(documents)))

    def finish(self, folder: Path, work: Path) -> None:
        """Nothing but the column."""

    def close(self) -> None:
        """Nothing is held."""

    def _chunks(self, split: str) -> list[np.ndarray]:
        """Numbers of a split's documents, in runs of about ``chunk_tokens``. Raises DataError if there are none."""
        corpus = self._corpus
        members = np.flatnonzero(corpus.split_codes == SPLITS.index(split))
        if not len(members):
            raise DataError(f"{corpus.path}: its split {split!r} is empty; name a --target, or prepare it with a proxy")
        return [members[chunk] for chunk in spans(corpus.lengths[members], self.chunk_tokens)]

    def _count_split(self, split: str, work: Path, begin: Begin) -> np.ndarray:
        """Count a split; of chunks that tasks have counted their counts are read."""
        chunks = self._chunks(split)
        advance = begin(f"counting, {split}", sum(int(self._corpus.lengths[chunk].sum()) for chunk in chunks))
        counts = np.zeros((2, BUCKETS), dtype=np.int64)
        for number, chunk in enumerate(chunks):
            if (known := _counted(work, split, number)).is_file():
                counts += np.load(known, allow_pickle=False)
                advance(int(self._corpus.lengths[chunk].sum()))
            else:
                counts += self._count(chunk, advance)
        return counts

    def count_chunk(self, split: str, number: int) -> np.ndarray:
        """Count one chunk of a split: (2, BUCKETS)."""
        return self._count(self._chunks(split)[number], lambda count: None)

    def _count(self, chunk: np.ndarray, advance: Advance) -> np.ndarray:
        corpus = self._corpus
        counts = np.zeros((2, BUCKETS), dtype=np.int64)
        for batch in spans(corpus.lengths[chunk], self.batch_tokens):
            documents = chunk[batch]
            ends = corpus.offsets[documents] + corpus.lengths[documents]
            _add(counts, [corpus.tokens[a : b - 1] for a, b in zip(corpus.offsets[documents], ends, strict=True)])
            advance(int(corpus.lengths[documents].sum()))
        return counts

    def _count_files(self, target: Source) -> np.ndarray:
        tokenizer = self._corpus.tokenizer()
        counts = np.zeros((2, BUCKETS), dtype=np.int64)
        for texts in _several(SourceReader(target)):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            _add(counts, [np.array(encoding.ids) for encoding in encodings])
        return counts


@dataclass(frozen=True)
class CountChunks:
    """Counts the n-grams of chunks of splits, for tasks."""

    again: Again
    folder: Path
    """Of the results, absolute."""
    chunks: tuple[tuple[str, int], ...]
    """Split and number of each."""
    name: str = "counting n-grams"

    def numbers(self) -> Sequence[int]:
        """All of them."""
        return range(len(self.chunks))

    def done(self, number: int) -> bool:
        """Tell whether the counts are there."""
        return _counted(self.folder, *self.chunks[number]).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Count a chunk."""
        _, method = self.again.opened
        assert isinstance(method, Dsir)
        counts = method.count_chunk(*self.chunks[number])
        keep_array(_counted(self.folder, *self.chunks[number]), counts)
        return {"n-grams": int(counts.sum())}


def _counted(work: Path, split: str, number: int) -> Path:
    return work / f"counts-{split}-{number:06d}.npy"


def _several(reader: SourceReader) -> Iterator[list[str]]:
    texts: list[str] = []
    for document in reader:
        texts.append(document.text)
        if len(texts) == _TEXTS:
            yield texts
            texts = []
    if texts:
        yield texts


def _add(counts: np.ndarray, documents: list[np.ndarray]) -> None:
    """Add the n-grams of ``documents`` (tokens) to ``counts`` (2, BUCKETS); none spans two of them."""
    lengths = np.array([len(each) for each in documents])
    uni, bi = (each[0] for each in hashed(np.concatenate(documents).astype(np.uint64)[None]))
    owners = np.repeat(np.arange(len(documents)), lengths)
    counts[0] += np.bincount(uni, minlength=BUCKETS)
    counts[1] += np.bincount(bi[owners[:-1] == owners[1:]], minlength=BUCKETS)


def _means(values: np.ndarray, owners: np.ndarray, counted: np.ndarray, count: int) -> np.ndarray:
    """(count,) mean of the ``counted`` (m,) of ``values`` (m,) by owner; NaN where there are none."""
    sums = np.bincount(owners[counted], values[counted], minlength=count)
    numbers = np.bincount(owners[counted], minlength=count)
    return np.where(numbers > 0, sums / np.maximum(numbers, 1), np.nan)
