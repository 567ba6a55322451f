"""Reads blends as Megatron-LM's command line has them: a number before each path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megaopus.errors import DataError


def blend_of(given: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Give the paths, and the number before each; None: there is none. One text may hold a whole blend.

    Raises DataError for paths of which some have a number.
    """
    words = [word for text in given for word in _words(text)]
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return words, None
    weights, places = [number for number in numbers[::2] if number is not None], words[1::2]
    if 2 * len(weights) != len(words) or any(number is not None for number in numbers[1::2]):
        raise DataError(f"--adopt {' '.join(words)}: a blend is a number before each path: 0.3 PREFIX 0.7 PREFIX")
    if wrong := [weight for weight in weights if not 0 < weight < math.inf]:
        raise DataError(f"--adopt {' '.join(words)}: a weight is a number above 0, not {wrong[0]:g}")
    return places, weights


def weights_of(domains: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """Give the weight of each domain; none where there is no blend. Raises DataError if two paths have one domain."""
    if weights is None:
        return {}
    found: dict[str, float] = {}
    for domain, weight in zip(domains, weights, strict=True):
        if domain in found:
            raise DataError(f"--adopt: two paths of the blend have the domain {domain}; name others: DOMAIN=PATH")
        found[domain] = weight
    return found


def told(blend: Mapping[str, float]) -> list[str]:
    """Say how a run draws by the blend; nothing where there is none."""
    if not blend:
        return []
    stage = ",".join(f"{domain}:{weight:g}" for domain, weight in blend.items())
    return [f"the blend is a setting of the run: 'data.weights=[[0,{{{stage}}}]]'"]


def _words(text: str) -> list[str]:
    """Split a text that is a whole blend."""
    words = text.split()
    whole = len(words) > 1 and len(words) % 2 == 0 and all(_number(word) is not None for word in words[::2])
    return words if whole else [text]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
