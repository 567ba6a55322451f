"""Names every sampler. Torch is imported when one is looked up.

A new one is a file beside this that calls ``register_sampler``; so do other packages (docs/library.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaopus.selection.registry import Registry, origin_of

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[["Tensor", "Tensor", float, int], "Tensor"]
"""(utilities (n,), ids (n,), temperature, key) -> (n,) float64, of which the largest are picked.

A draw without replacement is one noise for all picks, or with a redundancy term a new one for each: ``key`` names it.
Noise must be a function of (key, id) alone (``counter_rng``), so that every rank and layout draws the same.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerEntry:
    """Says what is known of a sampler."""

    name: str
    draw: Draw
    greedy: bool
    """Tells whether it takes the largest utilities whatever the temperature, so that nothing is drawn."""
    needs: Mapping[str, str]
    origin: str


SAMPLERS: Registry[SamplerEntry] = Registry("sampler", __name__.rpartition(".")[0])
"""Every sampler."""


def register_sampler(name: str, *, greedy: bool = False) -> Callable[[Draw], Draw]:
    """Decorate a ``Draw``, so that ``selection.sampler`` can name it. Raises ValueError for a name that is taken.

    ``greedy``: as in ``SamplerEntry``.
    """

    def register(draw: Draw) -> Draw:
        SAMPLERS.add(SamplerEntry(name=name, draw=draw, greedy=greedy, needs={}, origin=origin_of(draw)))
        return draw

    return register


def names() -> tuple[str, ...]:
    """Every sampler."""
    return SAMPLERS.names()
