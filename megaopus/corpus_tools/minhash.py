"""Finds documents that are nearly the same by MinHash, with datatrove's steps: signatures, buckets, clusters.

Its settings are datatrove's own (14 buckets of 8 hashes of 5 words in a row, as FineWeb). Words are ours, for its would
need spaCy. Which documents are alike depends on no number of tasks: signatures are of pieces, pairs of buckets.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from megaopus.corpus_tools.piece_work import Sought, load_reading

_SIGNATURES, _PAIRS, _CLUSTERS = "signatures", "pairs", "clusters"


_CONFIG = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""A word: letters and digits in a row; of Chinese and Japanese, which write no blanks, a sign."""


class _Words(WordTokenizer):
    """Finds words in any language."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def _mark(folder: Path, step: str, number: int) -> Path:
    """Name the file that says that a unit of a step is done: its results appear bit by bit."""
    return folder / f"{step}-{number:06d}.done"


@dataclass(frozen=True)
class SignPieces:
    """Works out the signatures of a piece's documents."""

    sought: Sought
    reading: Path
    """What ``save_reading`` wrote."""
    places: tuple[int, ...]
    """Of the first document of each piece, and the number of all."""
    pieces: tuple[int, ...]
    name: str = "comparing signatures"

    @property
    def folder(self) -> Path:
        """Name the folder of all results of the comparison."""
        return self.sought.folder / "minhash"

    def numbers(self) -> Sequence[int]:
        """Return ``pieces``."""
        return self.pieces

    def done(self, number: int) -> bool:
        """Tell whether all buckets are written."""
        return _mark(self.folder, _SIGNATURES, number).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Sign."""
        reading = load_reading(self.reading, *self.places[number : number + 2])
        reader, counted = self.sought.reader(number), 0

        def documents() -> Iterator[Document]:
            nonlocal counted
            for document in reading.taken(reader, 0):
                counted += 1
                yield Document(text=document.text, id=document.id)

        step = MinhashDedupSignature(str(self.folder / _SIGNATURES), _CONFIG, _Words())
        step.run(documents(), rank=number)
        _mark(self.folder, _SIGNATURES, number).touch()
        return {"documents": counted}


@dataclass(frozen=True)
class PairBuckets:
    """Finds the pairs of documents that have a bucket in common."""

    folder: Path
    name: str = "comparing buckets"

    def numbers(self) -> Sequence[int]:
        """One for each bucket."""
        return range(_CONFIG.num_buckets)

    def done(self, number: int) -> bool:
        """Tell whether the bucket's pairs are there."""
        return _mark(self.folder, _PAIRS, number).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Go through one bucket of all pieces."""
        _allow_files()
        step = MinhashDedupBuckets(str(self.folder / _SIGNATURES), str(self.folder / _PAIRS), config=_CONFIG)
        step.run(None, rank=number, world_size=len(self.numbers()))
        _mark(self.folder, _PAIRS, number).touch()
        return {}


@dataclass(frozen=True)
class ClusterPairs:
    """Joins pairs to clusters."""

    folder: Path
    name: str = "joining copies"

    def numbers(self) -> Sequence[int]:
        """One, for all."""
        return [0]

    def done(self, number: int) -> bool:
        """Tell whether the clusters are there."""
        return _mark(self.folder, _CLUSTERS, number).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Join."""
        _allow_files()
        step = MinhashDedupCluster(
            str(self.folder / _PAIRS), str(self.folder / _CLUSTERS), config=_CONFIG, save_cluster_id=True
        )
        with redirect_stderr(StringIO()):  # its bar would run through the progress
            step.run(None, number, 1)
        _mark(self.folder, _CLUSTERS, number).touch()
        return {}


def first_alike(folder: Path, places: Sequence[int], kept: np.ndarray) -> np.ndarray:
    """Return the place of the first document of each one's cluster, (D,) int64; of one without a cluster, its own.

    Args:
        folder: of the results.
        places: of the first document of each piece, and the number of all.
        kept: (D,) bool: the documents that were compared.
    """
    first = np.arange(len(kept), dtype=np.int64)
    found: list[np.ndarray] = []
    for path in sorted((folder / _CLUSTERS).glob("*.clusters")):
        piece, pairs = int(path.stem), np.fromfile(path, "<u4").reshape(-1, 2).astype(np.int64)
        inside = places[piece] + np.flatnonzero(kept[places[piece] : places[piece + 1]])
        found.append(np.stack([inside[pairs[:, 0]], pairs[:, 1]], axis=1))
    if found:
        members = np.concatenate(found)
        _, cluster = np.unique(members[:, 1], return_inverse=True)
        earliest: Any = np.full(cluster.max() + 1, len(kept), dtype=np.int64)
        np.minimum.at(earliest, cluster, members[:, 0])
        first[members[:, 0]] = earliest[cluster]
    return first


def _allow_files() -> None:
    """Let this process open as many files as it may: a step opens one for each piece."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
