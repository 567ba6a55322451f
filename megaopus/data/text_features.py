"""Says what can be said of every sequence without a model, computed once and memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megaopus.data.folder import new_folder, where_else
from megaopus.data.permutation import mix
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError
from megaopus.logistic import fit_logistic

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 5
BUCKETS = 1 << 14
"""Of hashed uni- and bigrams, together."""
SKETCH_DIM = 256
"""Numbers that a sequence's n-gram vector is folded into."""
JUDGES = 4
"""Of so many documents of the proxy one is kept to judge scores by."""
SHINGLE = 8
"""Tokens of the n-grams whose smallest hash is the near-duplicate signature."""
BLOCKS = ("ngrams", "domain", "likelihood", "shape")
_KINDS = ("unigrams", "bigrams", "second tokens given the first")
_LIKELIHOODS = tuple(f"{source} {kind}" for source in ("target", "pool") for kind in _KINDS)
_SHAPES = ("distinct unigrams", "distinct bigrams")
_FILES = ("sketch", "scalars", "log_odds", "exact", "near")
_CHUNK = 512
_FITTED = 1 << 14
"""Sequences of the pool that importance is fitted to, at most."""
_FURTHEST = 4.0
"""Standard deviations from the pool's mean at which a number is as far off as it counts."""
_U64 = np.uint64


class SequenceTextFeatures:
    """TextFeatures of the sequences of one pool, by candidate id; implements ``selection.backend.TextFeatures``.

    The files lie in a folder of their own beside the corpus, under a name that stands for the pool, the proxy and this
    version of the features.
    """

    def __init__(self, pool: Sequences, folder: Path, blocks: Items[str] = BLOCKS):
        """Map the files in ``folder`` (see ``ensure_text_features``). Raises DataError if they are not of this pool."""
        self._pool = pool
        self._blocks = tuple(blocks)
        arrays = {name: _load(folder / f"{name}.npy", len(pool)) for name in _FILES}
        self._sketch, self._scalars, self._log_odds, self._exact, self._near = (arrays[name] for name in _FILES)
        self._moments = _moments(self._scalars)
        fitted = _load(folder / "importance.npy", 2 * self._scalars.shape[1] + 2)
        self._weights, self._most = fitted[:-1], float(fitted[-1])
        self._beside = _beside(folder)

    @property
    def domain_names(self) -> list[str]:
        """Return what ``domains`` counts."""
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
                part = ((self._scalars[rows] - self._moments[0]) / self._moments[1]).astype(np.float32)[:, cut]
            parts.append(part)
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def log_odds(self, ids: Tensor) -> Tensor:
        """(n,) float64: log-likelihood of hashed n-grams under the proxy less that under the pool, nats a token.

        DSIR-like: the importance weight of Xie et al. (2023, arXiv 2302.03169) for n-grams of tokens, a table for each
        order, and means over unigrams and over bigrams, added. Their package ``data-selection`` sums over lower-cased
        words and pairs of them in one table, and ranks otherwise.
        """
        return torch.from_numpy(np.array(self._log_odds[self._rows(ids)], dtype=np.float64))

    def importance(self, ids: Tensor) -> Tensor:
        """(n,) float64: log of how much likelier the proxy holds such a sequence than the pool, as a classifier tells.

        Logistic regression of proxy against pool, as much weight on one as on the other, on how likely the sequence is
        under n-grams of both and how often it repeats its own, and on the squares of these numbers. At most what the
        proxy's median is: no text is more like the proxy than the proxy itself.
        """
        return self._importance(self._scalars[self._rows(ids)])

    def proxy_importance(self, ids: Tensor) -> Tensor:
        """(n,) float64: the same of sequences of the proxy, by their ids; n-grams of the other half describe each."""
        return self._importance(self._proxy[ids.cpu().numpy() % len(self._proxy), :-1])

    def judges(self, ids: Tensor) -> Tensor:
        """(n,) bool: which sequences of the proxy are kept to judge scores by, all of every fourth document."""
        return torch.from_numpy(self._proxy[ids.cpu().numpy() % len(self._proxy), -1] > 0)

    @cached_property
    def _proxy(self) -> np.ndarray:
        """(proxy sequences, F + 1): their numbers, and whether they judge."""
        return _load(self._beside / "proxy.npy", None)

    def _importance(self, scalars: np.ndarray) -> Tensor:
        return torch.from_numpy(np.minimum(_design(scalars, self._moments) @ self._weights, self._most))

    def signatures(self, ids: Tensor, near: bool = False) -> Tensor:
        """(n,) int64: equal for equal tokens; ``near``: for sequences that share most of their 8-grams, mostly."""
        return torch.from_numpy(np.array((self._near if near else self._exact)[self._rows(ids)]))

    def domains(self, ids: Tensor) -> Tensor:
        """(n,) int64 index into ``domain_names``."""
        return torch.from_numpy(self._pool.domain_of(self._rows(ids)))

    def _rows(self, ids: Tensor) -> np.ndarray:
        return ids.cpu().numpy() % len(self._pool)


def text_features_folder(pool: Sequences, proxy: Sequences, parent: str | None) -> Path:
    """Return where the traits of ``pool`` lie; another proxy, seq_len or corpus has another place."""
    stands_for = json.dumps([VERSION, BUCKETS, SKETCH_DIM, SHINGLE, pool.key, proxy.key])
    digest = hashlib.sha256(stands_for.encode()).hexdigest()[:16]
    path = pool.corpus.path
    return (Path(parent) if parent else path.with_name(f"{path.name}.traits")) / digest


def ensure_text_features(
    pool: Sequences, proxy: Sequences, parent: str | None, console: Console, *, judges: bool = False
) -> Path:
    """The folder of the pool's traits, computed with a progress bar if it is not there.

    ``parent``: where it lies; None: beside the corpus, in a folder called like it with ``.traits`` added. ``judges``:
    the same numbers of the proxy too, in a folder beside it, for what asks about sequences of the proxy.

    Raises:
        DataError: the folder cannot be written; ``data.text_features_path`` is named.
    """
    folder = text_features_folder(pool, proxy, parent)
    wanted = {folder: _write, _beside(folder): _write_proxy} if judges else {folder: _write}
    remedy = "set data.text_features_path to a folder that can be written"
    for place, write in wanted.items():
        if not place.is_dir():
            with where_else(place, remedy), new_folder(place, console) as partial:
                write(pool, proxy, partial, console)
    return folder


def _beside(folder: Path) -> Path:
    """Say where what is known of the proxy lies; version 0.1 had none of it."""
    return folder.with_name(f"{folder.name}.proxy")


def _load(path: Path, count: int | None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete its folder, it is made again") from error
    if count is not None and len(array) != count:
        raise DataError(f"{path}: {len(array):,} rows for {count:,} sequences; delete its folder, it is made again")
    return array


# -- computing ---------------------------------------------------------------------------------------------------------


def _write(pool: Sequences, proxy: Sequences, folder: Path, console: Console) -> None:
    from rich.progress import Progress

    n = len(pool)
    shapes = {
        "sketch": ((n, SKETCH_DIM), "<f2"),
        "scalars": ((n, len(_LIKELIHOODS) + len(_SHAPES)), "<f4"),
        "log_odds": ((n,), "<f4"),
        "exact": ((n,), "<i8"),
        "near": ((n,), "<i8"),
    }
    out = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    with Progress(console=console, transient=True) as bar:
        work = bar.add_task("sequence features", total=2 * (n + len(proxy)))
        counted = _counted(pool, proxy, lambda done: bar.advance(work, done))
        target, whole = (log_probability(counted[side, 0][0] + counted[side, 1][0]) for side in ("target", "pool"))
        others = _others(counted)
        odds = target - whole
        idf = np.log((1 + n) / (1 + counted["pool", 0][1] + counted["pool", 1][1])).astype(np.float32)
        signs = np.where(mix(np.arange(BUCKETS, dtype=_U64)) & _U64(1), 1, -1).astype(np.float32)
        for half, numbers in enumerate(_halves(pool)):
            for rows, tokens in _chunks(pool, numbers):
                uni, bi = hashed(tokens)
                out["sketch"][rows] = _sketch(uni, bi, idf, signs)
                out["scalars"][rows] = _scalars(uni, bi, others[half])
                out["log_odds"][rows] = odds[0][uni].mean(axis=1) + odds[1][bi].mean(axis=1)
                out["exact"][rows], out["near"][rows] = exact_signature(tokens), near_signature(tokens)
                bar.advance(work, len(rows))
        wanted = _described(proxy, others, lambda done: bar.advance(work, done))
    np.save(folder / "importance.npy", _fitted(out["scalars"], wanted[np.concatenate(_halves(proxy))]))
    for array in out.values():
        array.flush()


def _write_proxy(pool: Sequences, proxy: Sequences, folder: Path, console: Console) -> None:
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        work = bar.add_task("proxy features", total=len(pool) + 2 * len(proxy))
        counted = _counted(pool, proxy, lambda done: bar.advance(work, done))
        wanted = _described(proxy, _others(counted), lambda done: bar.advance(work, done))
    judges = np.zeros((len(proxy), 1), dtype=np.float32)
    judges[_parts(proxy, JUDGES)[-1]] = 1
    np.save(folder / "proxy.npy", np.concatenate([wanted, judges], axis=1))


Counted = dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]
"""(target or pool, half) -> what ``_counts`` gives of it."""


def _counted(pool: Sequences, proxy: Sequences, advance: Callable[[int], None]) -> Counted:
    return {
        (side, half): _counts(sequences, numbers, advance)
        for side, sequences in (("target", proxy), ("pool", pool))
        for half, numbers in enumerate(_halves(sequences))
    }


def _others(counted: Counted) -> list[list[np.ndarray]]:
    """Of each half the log probabilities, target's and pool's, in the other half.

    What a text is likely under must not have been counted in it.
    """
    return [[log_probability(counted[side, 1 - half][0]) for side in ("target", "pool")] for half in (0, 1)]


def _described(proxy: Sequences, others: list[list[np.ndarray]], advance: Callable[[int], None]) -> np.ndarray:
    """(n, F) float32 numbers of the proxy's sequences, as of the pool's."""
    found = np.empty((len(proxy), len(_LIKELIHOODS) + len(_SHAPES)), dtype=np.float32)
    for half, numbers in enumerate(_halves(proxy)):
        for rows, tokens in _chunks(proxy, numbers):
            found[rows] = _scalars(*hashed(tokens), others[half])
            advance(len(rows))
    return found


def _halves(sequences: Sequences) -> list[np.ndarray]:
    """The numbers of the sequences of each half: those that begin in every other document."""
    return _parts(sequences, 2)


def _parts(sequences: Sequences, count: int) -> list[np.ndarray]:
    """The numbers of the sequences of each part: those that begin in every ``count``-th document."""
    numbers = np.arange(len(sequences))
    found, places = np.unique(sequences.first_document_of(numbers), return_inverse=True)
    part = places % count if len(found) >= count else numbers * count // len(numbers)
    return [np.flatnonzero(part == each) for each in range(count)]


def _chunks(sequences: Sequences, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of the sequences ``numbers``: (their numbers (c,), tokens (c, seq_len + 1) uint64)."""
    for start in range(0, len(numbers), _CHUNK):
        rows = numbers[start : start + _CHUNK]
        yield rows, sequences.tokens(rows).numpy().astype(_U64)


def hashed(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of the unigrams (c, T) and bigrams (c, T - 1)."""
    first = mix(tokens + _U64(1))
    pairs = mix(first[:, :-1] * _U64(3) + first[:, 1:])
    return (first % _U64(BUCKETS)).astype(np.int64), (pairs % _U64(BUCKETS)).astype(np.int64)


def _counts(sequences: Sequences, numbers: np.ndarray, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """(2, BUCKETS) occurrences of uni- and bigrams, and in how many sequences each bucket occurs, (BUCKETS,)."""
    counts = np.zeros((2, BUCKETS), dtype=np.int64)
    documents = np.zeros(BUCKETS, dtype=np.int64)
    for rows, tokens in _chunks(sequences, numbers):
        both = hashed(tokens)
        for kind, hashes in enumerate(both):
            counts[kind] += np.bincount(hashes.ravel(), minlength=BUCKETS)
        documents += (_bag(*both) > 0).sum(axis=0)
        advance(len(rows))
    return counts, documents


def _bag(uni: np.ndarray, bi: np.ndarray) -> np.ndarray:
    """(c, BUCKETS) float32 counts of a sequence's n-grams of both kinds."""
    both = np.concatenate([uni, bi], axis=1) + BUCKETS * np.arange(len(uni))[:, None]
    return np.bincount(both.ravel(), minlength=len(uni) * BUCKETS).reshape(len(uni), BUCKETS).astype(np.float32)


def log_probability(counts: np.ndarray) -> np.ndarray:
    """(2, BUCKETS) log probability of each bucket among its kind, one occurrence added to each."""
    return np.log((counts + 1) / (counts.sum(axis=1, keepdims=True) + BUCKETS)).astype(np.float32)


def _sketch(uni: np.ndarray, bi: np.ndarray, idf: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """(c, SKETCH_DIM): log(1 + count) x idf of each bucket, to norm 1, folded with signs (feature hashing)."""
    bag = np.log1p(_bag(uni, bi)) * idf
    bag *= signs / np.maximum(np.linalg.norm(bag, axis=1, keepdims=True), 1e-12)
    return bag.reshape(len(bag), BUCKETS // SKETCH_DIM, SKETCH_DIM).sum(axis=1)


def _scalars(uni: np.ndarray, bi: np.ndarray, sources: Items[np.ndarray]) -> np.ndarray:
    """(c, 8): mean log-likelihoods of ``_KINDS`` under each of ``sources`` (2, BUCKETS), and ``_SHAPES``."""
    columns = []
    for unigrams, bigrams in sources:
        first, both = unigrams[uni], bigrams[bi]
        columns += [first.mean(axis=1), both.mean(axis=1), (both - first[:, :-1]).mean(axis=1)]
    return np.stack([*columns, _distinct(uni), _distinct(bi)], axis=1)


def _moments(scalars: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(means, standard deviations) of each column."""
    values = np.asarray(scalars, dtype=np.float64)
    return values.mean(axis=0), np.maximum(values.std(axis=0), 1e-12)


def _design(scalars: np.ndarray, moments: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(c, 2 F + 1) float64: columns of ``scalars`` in standard deviations, their squares, and ones."""
    z = np.clip((scalars - moments[0]) / moments[1], -_FURTHEST, _FURTHEST)
    return np.concatenate([z, z**2, np.ones((len(z), 1))], axis=1)


def _fitted(pool: np.ndarray, proxy: np.ndarray) -> np.ndarray:
    """Weights of ``_design`` whose sum is the log of density(proxy) / density(pool); last, its median in the proxy.

    ``pool``, ``proxy``: their ``_scalars`` (c, F).
    """
    some = pool[np.linspace(0, len(pool) - 1, min(len(pool), _FITTED)).astype(np.int64)]
    x = _design(np.concatenate([some, proxy]), _moments(pool))
    is_proxy = np.arange(len(x)) >= len(some)
    counts = np.where(is_proxy, 1.0, len(proxy) / len(some))
    weights = fit_logistic(*(torch.from_numpy(each) for each in (x, is_proxy.astype(np.float64), counts))).numpy()
    return np.append(weights, np.median(x[is_proxy] @ weights))


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
