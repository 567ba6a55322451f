"""What can be said of every sequence without a model, computed once and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megaopus.data.folder import new_folder
from megaopus.data.permutation import mix
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 1
BUCKETS = 1 << 14
"""Of hashed uni- and bigrams, together."""
SKETCH_DIM = 256
"""Numbers that a sequence's n-gram vector is folded into."""
SHINGLE = 8
"""Tokens of the n-grams whose smallest hash is the near-duplicate signature."""
BLOCKS = ("ngrams", "domain", "likelihood", "shape")
_LIKELIHOODS = ("target unigrams", "target bigrams", "pool unigrams", "pool bigrams")
_SHAPES = ("distinct unigrams", "distinct bigrams")
_FILES = ("sketch", "scalars", "exact", "near")
_CHUNK = 512
_U64 = np.uint64


class SequenceTraits:
    """Traits of the sequences of one pool, by candidate id; implements ``selection.backend.Traits``.

    The files lie in a folder of their own beside the corpus, under a name that stands for the pool, the proxy and this
    version of the features.
    """

    def __init__(self, pool: Sequences, folder: Path, blocks: Items[str] = BLOCKS):
        """Map the files in ``folder`` (see ``ensure_traits``). Raises DataError if they are not of this pool."""
        self._pool = pool
        self._blocks = tuple(blocks)
        arrays = {name: _load(folder / f"{name}.npy", len(pool)) for name in _FILES}
        self._sketch, self._scalars, self._exact, self._near = (arrays[name] for name in _FILES)
        values = np.asarray(self._scalars, dtype=np.float64)
        self._mean, self._scale = values.mean(axis=0), np.maximum(values.std(axis=0), 1e-12)
        odds = values[:, :2].sum(axis=1) - values[:, 2:4].sum(axis=1)
        self._log_odds = (odds - odds.mean()) / max(float(odds.std()), 1e-12)

    @property
    def domain_names(self) -> list[str]:
        """What ``domains`` counts."""
        return self._pool.domains

    def features(self, ids: Tensor) -> Tensor:
        """(n, F) float32: the blocks side by side; the n-gram block has norm 1, the others entries of about 1."""
        rows = self._rows(ids)
        parts = []
        for block in self._blocks:
            if block == "ngrams":
                part = np.asarray(self._sketch[rows], dtype=np.float32)
            elif block == "domain":
                part = np.eye(len(self._pool.domains), dtype=np.float32)[self._pool.domain_of(rows)]
            else:
                cut = slice(0, len(_LIKELIHOODS)) if block == "likelihood" else slice(len(_LIKELIHOODS), None)
                part = ((self._scalars[rows] - self._mean) / self._scale).astype(np.float32)[:, cut]
            parts.append(part)
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def log_odds(self, ids: Tensor) -> Tensor:
        """(n,) float64: log-likelihood of hashed n-grams under the proxy less that under the pool, z-scored.

        The importance weight of DSIR (Xie et al. 2023, arXiv 2302.03169): a mean over n-grams, since all sequences have
        one length, in standard deviations over the pool.
        """
        return torch.from_numpy(self._log_odds[self._rows(ids)])

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        """(n,) int64: equal for equal tokens; ``near``: for sequences that share most of their 8-grams, mostly."""
        return torch.from_numpy(np.array((self._near if near else self._exact)[self._rows(ids)]))

    def domains(self, ids: Tensor) -> Tensor:
        """(n,) int64 index into ``domain_names``."""
        return torch.from_numpy(self._pool.domain_of(self._rows(ids)))

    def _rows(self, ids: Tensor) -> np.ndarray:
        return ids.cpu().numpy() % len(self._pool)


def traits_folder(pool: Sequences, proxy: Sequences, parent: str | None) -> Path:
    """Where the traits of ``pool`` lie; another proxy, seq_len or corpus has another place."""
    stands_for = json.dumps([VERSION, BUCKETS, SKETCH_DIM, SHINGLE, pool.key, proxy.key])
    digest = hashlib.sha256(stands_for.encode()).hexdigest()[:16]
    path = pool.corpus.path
    return (Path(parent) if parent else path.with_name(f"{path.name}.traits")) / digest


def ensure_traits(pool: Sequences, proxy: Sequences, parent: str | None, console: Console) -> Path:
    """The folder of the pool's traits, computed with a progress bar if it is not there.

    ``parent``: where it lies; None: beside the corpus, in a folder called like it with ``.traits`` added.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = traits_folder(pool, proxy, parent)
    if folder.is_dir():
        return folder
    with new_folder(folder, console) as place:
        _write(pool, proxy, place, console)
    return folder


def _load(path: Path, count: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete its folder, it is made again") from error
    if len(array) != count:
        raise DataError(f"{path}: {len(array):,} rows for {count:,} sequences; delete its folder, it is made again")
    return array


# -- computing ---------------------------------------------------------------------------------------------------------


def _write(pool: Sequences, proxy: Sequences, folder: Path, console: Console) -> None:
    from rich.progress import Progress

    n = len(pool)
    shapes = {
        "sketch": ((n, SKETCH_DIM), "<f2"),
        "scalars": ((n, 6), "<f4"),
        "exact": ((n,), "<i8"),
        "near": ((n,), "<i8"),
    }
    out = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    with Progress(console=console, transient=True) as bar:
        work = bar.add_task("sequence features", total=2 * n + len(proxy))
        target, _ = _counts(proxy, lambda done: bar.advance(work, done))
        whole, documents = _counts(pool, lambda done: bar.advance(work, done))
        tables = np.stack([_log_probability(counts) for counts in (target, whole)])  # (2, uni/bi, BUCKETS)
        idf = np.log((1 + n) / (1 + documents)).astype(np.float32)
        signs = np.where(mix(np.arange(BUCKETS, dtype=_U64)) & _U64(1), 1, -1).astype(np.float32)
        for rows, tokens in _chunks(pool):
            uni, bi = _hashed(tokens)
            out["sketch"][rows] = _sketch(uni, bi, idf, signs)
            out["scalars"][rows] = np.stack(
                [tables[source, kind][hashes].mean(axis=1) for source in (0, 1) for kind, hashes in ((0, uni), (1, bi))]
                + [_distinct(hashes) for hashes in (uni, bi)],
                axis=1,
            )
            out["exact"][rows], out["near"][rows] = exact_signature(tokens), near_signature(tokens)
            bar.advance(work, len(rows))
    for array in out.values():
        array.flush()


def _chunks(sequences: Sequences) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers (c,), tokens (c, seq_len + 1) uint64)."""
    for start in range(0, len(sequences), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(sequences)))
        yield rows, sequences.tokens(rows).numpy().astype(_U64)


def _hashed(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of the unigrams (c, T) and bigrams (c, T - 1)."""
    first = mix(tokens + _U64(1))
    pairs = mix(first[:, :-1] * _U64(3) + first[:, 1:])
    return (first % _U64(BUCKETS)).astype(np.int64), (pairs % _U64(BUCKETS)).astype(np.int64)


def _counts(sequences: Sequences, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """(2, BUCKETS) occurrences of uni- and bigrams, and in how many sequences each bucket occurs, (BUCKETS,)."""
    counts = np.zeros((2, BUCKETS), dtype=np.int64)
    documents = np.zeros(BUCKETS, dtype=np.int64)
    for rows, tokens in _chunks(sequences):
        both = _hashed(tokens)
        for kind, hashes in enumerate(both):
            counts[kind] += np.bincount(hashes.ravel(), minlength=BUCKETS)
        documents += (_bag(*both) > 0).sum(axis=0)
        advance(len(rows))
    return counts, documents


def _bag(uni: np.ndarray, bi: np.ndarray) -> np.ndarray:
    """(c, BUCKETS) float32 counts of a sequence's n-grams of both kinds."""
    both = np.concatenate([uni, bi], axis=1) + BUCKETS * np.arange(len(uni))[:, None]
    return np.bincount(both.ravel(), minlength=len(uni) * BUCKETS).reshape(len(uni), BUCKETS).astype(np.float32)


def _log_probability(counts: np.ndarray) -> np.ndarray:
    """(2, BUCKETS) log probability of each bucket among its kind, one occurrence added to each."""
    return np.log((counts + 1) / (counts.sum(axis=1, keepdims=True) + BUCKETS)).astype(np.float32)


def _sketch(uni: np.ndarray, bi: np.ndarray, idf: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """(c, SKETCH_DIM): log(1 + count) x idf of each bucket, to norm 1, folded with signs (feature hashing)."""
    bag = np.log1p(_bag(uni, bi)) * idf
    bag *= signs / np.maximum(np.linalg.norm(bag, axis=1, keepdims=True), 1e-12)
    return bag.reshape(len(bag), BUCKETS // SKETCH_DIM, SKETCH_DIM).sum(axis=1)


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """(c,) share of a sequence's n-grams that are the first of their kind in it."""
    ordered = np.sort(hashes, axis=1)
    return (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)) / hashes.shape[1]


def exact_signature(tokens: np.ndarray) -> np.ndarray:
    """(c,) int64 hash of each row of (c, T) uint64 tokens, every token and its place counted."""
    places = np.arange(tokens.shape[1], dtype=_U64) << _U64(32)
    return mix(mix(tokens + places).sum(axis=1, dtype=_U64)).view(np.int64)


def near_signature(tokens: np.ndarray) -> np.ndarray:
    """(c,) int64: the smallest hash among each row's ``SHINGLE``-grams.

    Two sequences have it in common with the probability that is the Jaccard similarity of their sets of n-grams
    (Broder 1997).
    """
    width = min(SHINGLE, tokens.shape[1])
    state = np.zeros((len(tokens), tokens.shape[1] - width + 1), dtype=_U64)
    for place in range(width):
        state = mix(state * _U64(3) + tokens[:, place : place + state.shape[1]] + _U64(1))
    return state.min(axis=1).view(np.int64)
