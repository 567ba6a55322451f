"""A keyed permutation of 0..n-1 that is computed, not stored."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 8
_U64 = np.uint64


def permute(indices: np.ndarray, n: int, key: str) -> np.ndarray:
    """Images of ``indices`` under the permutation of range(n) that ``key`` names.

    A balanced Feistel network over the smallest 2k-bit range that holds n (Luby and Rackoff 1988), walked on until
    the image falls below n (Black and Rogaway 2002): each walk takes fewer than 4 steps on average, and no state is
    kept, so any index can be looked up alone.

    Args:
        indices: (m,) integers in [0, n).
        n: size of the range, 1 to 2^62.
        key: any text.

    Returns:
        (m,) int64 in [0, n).
    """
    assert 1 <= n <= 1 << 62
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * _ROUNDS), dtype="<u8")
    values = _feistel(np.asarray(indices).astype(_U64), half, keys)
    outside = np.flatnonzero(values >= _U64(n))
    while len(outside):
        walked = _feistel(values[outside], half, keys)
        values[outside] = walked
        outside = outside[walked >= _U64(n)]
    return values.astype(np.int64)


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 one to one: the output function of splitmix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = _U64(half), _U64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right
