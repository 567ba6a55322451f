"""Makes normal numbers of their place alone, on any device: a rank draws its part of a tensor and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the step of its counter, and the factors of its mixing function
_STEP, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROWS_OF = 1 << 23
"""Numbers that are made at a time: of each several 64-bit ones are there."""


def fill_normal(part: Tensor, std: float, key: int, rows: Tensor, columns: Tensor, width: int) -> None:
    """Fill ``part`` (R, C) with the numbers at ``rows`` (R,) and ``columns`` (C,) of a whole tensor ``width`` wide.

    Each is normal with mean 0 and deviation ``std``, and follows from ``key`` (64 bits) and its place in the whole.
    """
    for some in torch.arange(len(rows), device=rows.device).split(max(1, _ROWS_OF // len(columns))):
        places = rows[some].unsqueeze(1) * width + columns
        part[some[0] : some[-1] + 1].copy_(normals(key, places) * std)


def normals(key: int, places: Tensor) -> Tensor:
    """Standard normal fp32 numbers, one for each of ``places`` (int64): the Box-Muller transform of mixed counters."""
    mixed = (places + 1) * _signed(_STEP) + _signed(key)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shifted(mixed, 31)
    # in (0, 1] and [0, 1]
    radius = (((_shifted(mixed, 32)).float() + 1) * 2.0**-32).log().mul_(-2).sqrt_()
    return radius * ((mixed & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)).cos_()


def _shifted(values: Tensor, by: int) -> Tensor:
    """Shift to the right with zeros from the left, which torch does for positive numbers alone."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The signed 64-bit number of the same bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
