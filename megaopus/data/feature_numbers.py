"""Works out the numbers that text features consist of: from tokens, and from counts of their hashed n-grams."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from megaopus.data.permutation import mix
from megaopus.logistic import fit_logistic

BUCKETS = 1 << 14
"""Of hashed uni- and bigrams, together."""
SKETCH_DIM = 256
"""Numbers that a sequence's n-gram vector is folded into."""
SHINGLE = 8
"""Tokens of the n-grams whose smallest hash is the near-duplicate signature."""
FITTED = 1 << 14
"""Sequences of the pool that importance is fitted to, at most."""
_KINDS = ("unigrams", "bigrams", "second tokens given the first")
LIKELIHOODS = tuple(f"{source} {kind}" for source in ("target", "pool") for kind in _KINDS)
SHAPES = ("distinct unigrams", "distinct bigrams")
SCALARS = len(LIKELIHOODS) + len(SHAPES)
_BAGS = 2
"""Sequences that are folded at a time, so that counts of all buckets of each stay in the processor's cache."""
_FURTHEST = 4.0
"""Standard deviations from the pool's mean at which a number is as far off as it counts."""
_U64 = np.uint64


class Tables(NamedTuple):
    """Holds what n-grams were counted for, by which sequences are described."""

    others: np.ndarray
    """(2 halves, 2 sources, 2 kinds, BUCKETS) float32: log probabilities, the target's and the pool's, in the other
    half: what a text is likely under must not have been counted in it."""
    odds: np.ndarray
    """(2 kinds, BUCKETS) float32: the target's less the pool's, of both halves together."""
    idf: np.ndarray
    """(BUCKETS,) float32: log of how many sequences there are for one that has such an n-gram, if that was counted."""


class Counts(NamedTuple):
    """Counts the n-grams of some sequences."""

    halves: np.ndarray
    """(2 halves, 2 kinds, BUCKETS) int64 occurrences."""
    sequences: np.ndarray
    """(BUCKETS,) int64: in how many sequences each bucket occurs."""

    @classmethod
    def none(cls) -> Counts:
        """Begin."""
        return cls(np.zeros((2, 2, BUCKETS), dtype=np.int64), np.zeros(BUCKETS, dtype=np.int64))

    def add(self, tokens: np.ndarray, halves: np.ndarray, present: bool) -> None:
        """Count tokens (c, T) of sequences of ``halves`` (c,); ``present``: also which buckets each sequence has."""
        both = hashed(tokens)
        for half in (0, 1):
            for kind, hashes in enumerate(both):
                self.halves[half, kind] += np.bincount(hashes[halves == half].ravel(), minlength=BUCKETS)
        if present:
            ordered = np.sort(np.concatenate(both, axis=1).astype(np.int32), axis=1)
            first = np.ones(ordered.shape, dtype=bool)
            first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
            self.sequences[:] += np.bincount(ordered[first], minlength=BUCKETS)


def tables_of(target: Counts, pool: Counts, counted: int) -> Tables:
    """Make the tables; ``counted``: sequences of the pool that were. Without a target idf alone says something."""
    others = [[log_probability(side.halves[1 - half]) for side in (target, pool)] for half in (0, 1)]
    odds = log_probability(target.halves.sum(axis=0)) - log_probability(pool.halves.sum(axis=0))
    return Tables(np.array(others), odds, np.log((1 + counted) / (1 + pool.sequences)).astype(np.float32))


class Described(NamedTuple):
    """Describes c sequences."""

    scalars: np.ndarray
    """(c, SCALARS) float32."""
    log_odds: np.ndarray
    """(c,) float32."""
    exact: np.ndarray
    """(c,) int64."""
    near: np.ndarray
    """(c,) int64."""


def described(tokens: np.ndarray, halves: np.ndarray, tables: Tables) -> Described:
    """Describe tokens (c, T) of sequences of ``halves`` (c,)."""
    uni, bi = hashed(tokens)
    log_odds = tables.odds[0][uni].mean(axis=1) + tables.odds[1][bi].mean(axis=1)
    return Described(_scalars(uni, bi, halves, tables), log_odds, exact_signature(tokens), near_signature(tokens))


def scalars(tokens: np.ndarray, halves: np.ndarray, tables: Tables) -> np.ndarray:
    """(c, SCALARS) float32 of tokens (c, T)."""
    return _scalars(*hashed(tokens), halves, tables)


def _scalars(uni: np.ndarray, bi: np.ndarray, halves: np.ndarray, tables: Tables) -> np.ndarray:
    """Mean log-likelihoods of ``_KINDS`` under each source, and ``SHAPES``."""
    found = np.empty((len(uni), SCALARS), dtype=np.float32)
    for half in np.unique(halves).tolist():
        rows = np.flatnonzero(halves == half)
        here, pairs = uni[rows], bi[rows]
        for source, (unigrams, bigrams) in enumerate(tables.others[half]):
            first, both = unigrams[here], bigrams[pairs]
            means = (first.mean(axis=1), both.mean(axis=1), (both - first[:, :-1]).mean(axis=1))
            found[rows, len(_KINDS) * source : len(_KINDS) * (source + 1)] = np.stack(means, axis=1)
    found[:, len(LIKELIHOODS) :] = np.stack([_distinct(uni), _distinct(bi)], axis=1)
    return found


def sketched(tokens: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """(c, SKETCH_DIM): log(1 + count) x idf of each bucket, to norm 1, folded with signs (feature hashing)."""
    buckets = np.concatenate(hashed(tokens), axis=1)
    signs = np.where(mix(np.arange(BUCKETS, dtype=_U64)) & _U64(1), 1, -1).astype(np.float32)
    logs = np.log1p(np.arange(buckets.shape[1] + 1, dtype=np.float32))
    parts = [buckets[first : first + _BAGS] for first in range(0, len(buckets), _BAGS)]
    return np.concatenate([_folded(part, logs, idf, signs) for part in parts])


def _folded(buckets: np.ndarray, logs: np.ndarray, idf: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """(c, SKETCH_DIM) of the buckets of all n-grams of each sequence (c, n); ``logs``: log(1 + count) by count."""
    places = buckets + BUCKETS * np.arange(len(buckets))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(buckets) * BUCKETS).reshape(len(buckets), BUCKETS)
    bag = logs[counts] * idf
    bag *= signs / np.maximum(np.linalg.norm(bag, axis=1, keepdims=True), 1e-12)
    return bag.reshape(len(bag), BUCKETS // SKETCH_DIM, SKETCH_DIM).sum(axis=1)


def hashed(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of the unigrams (c, T) and bigrams (c, T - 1)."""
    first = mix(tokens + _U64(1))
    pairs = mix(first[:, :-1] * _U64(3) + first[:, 1:])
    last = _U64(BUCKETS - 1)
    return (first & last).astype(np.int64), (pairs & last).astype(np.int64)


def log_probability(counts: np.ndarray) -> np.ndarray:
    """(2, BUCKETS) log probability of each bucket among its kind, one occurrence added to each."""
    return np.log((counts + 1) / (counts.sum(axis=1, keepdims=True) + BUCKETS)).astype(np.float32)


def spread(count: int, most: int) -> np.ndarray:
    """Numbers below ``count``, at most ``most`` of them, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def moments(scalars: np.ndarray) -> np.ndarray:
    """(2, F): mean and standard deviation of each column."""
    values = np.asarray(scalars, dtype=np.float64)
    return np.stack([values.mean(axis=0), np.maximum(values.std(axis=0), 1e-12)])


def design(scalars: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """(c, 2 F + 1) float64: columns of ``scalars`` in standard deviations, their squares, and ones."""
    z = np.clip((scalars - moments[0]) / moments[1], -_FURTHEST, _FURTHEST)
    return np.concatenate([z, z**2, np.ones((len(z), 1))], axis=1)


def fitted(pool: np.ndarray, proxy: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Weights of ``design`` whose sum is the log of density(proxy) / density(pool); last, its median in the proxy.

    ``pool``, ``proxy``: scalars (c, F) of some of their sequences.
    """
    x = design(np.concatenate([pool, proxy]), moments)
    is_proxy = np.arange(len(x)) >= len(pool)
    counts = np.where(is_proxy, 1.0, len(proxy) / len(pool))
    weights = fit_logistic(*(torch.from_numpy(each) for each in (x, is_proxy.astype(np.float64), counts))).numpy()
    return np.append(weights, np.median(x[is_proxy] @ weights))


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """(c,) share of a sequence's n-grams that are the first of their kind in it."""
    ordered = np.sort(hashes.astype(np.int32), axis=1)
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
