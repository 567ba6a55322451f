"""Draws random numbers as a function of their key: no generator state, the same on every rank, device and layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    for shift, factor in _MIX:
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 31)


def key(*parts: int | str) -> int:
    """A 64-bit key of integers and strings, in order."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = _mix((_mix((state + _GAMMA) & _MASK) ^ part) & _MASK)
    return state


def bits(seed: int, counters: Tensor) -> Tensor:
    """64 pseudo-random bits per counter: int64 in, int64 of the same shape out."""
    # int64 arithmetic wraps; a new tensor, changed in place from here on
    x = counters.to(torch.int64) * _signed(_GAMMA)
    x += _signed(seed)
    for shift, factor in _MIX:
        x ^= _logical_shift(x, shift)
        x *= _signed(factor)
    x ^= _logical_shift(x, 31)
    return x


def _logical_shift(x: Tensor, shift: int) -> Tensor:
    """``>>`` on int64 copies the sign bit; the mask clears those copies. A new tensor."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def uniform(seed: int, counters: Tensor) -> Tensor:
    """float64 in the open interval (0, 1), one per counter."""
    return _logical_shift(bits(seed, counters), 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def spread(counters: Tensor) -> Tensor:
    """float64 in [0, 1), one per counter, without noise: counters in a row lie evenly spread (a Weyl sequence)."""
    return _logical_shift(counters.to(torch.int64) * _signed(_GAMMA), 12).to(torch.float64) * 2.0**-52


def gumbel(seed: int, counters: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, one per counter."""
    return uniform(seed, counters).log_().neg_().log_().neg_()
