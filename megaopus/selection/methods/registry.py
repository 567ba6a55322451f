"""Names every method of selection, with what the rest must know of it. Torch is imported when one is looked up.

A new one is a file beside this that calls ``register_method``; so do other packages (docs/library.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from megaopus.selection.registry import Flops, Registry, origin_of

Score = Callable[[Any], Any]
"""``scoring.ScoringStep`` -> ``scoring.Scores``: puts a number on each candidate of a buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodEntry:
    """Says what is known of a method before it scores."""

    name: str
    score: Score
    flops: Flops | None
    """Of scoring; None: those of the estimator that ``selection.estimator`` names, by which it scores."""
    micro_batches: bool
    """Whether its own passes take ``score_micro_batch_size`` candidates at a time."""
    needs: Mapping[str, str]
    """Need (``registry.NEEDS``) -> the reason for it, as a sentence goes on."""
    example: Mapping[str, Any]
    """Settings with which tests compare it over layouts."""
    origin: str

    @property
    def by_estimator(self) -> bool:
        """Return whether it scores by an estimator of utilities."""
        return self.flops is None


METHODS: Registry[MethodEntry] = Registry("method", __name__.rpartition(".")[0])
"""Every method but ``UNIFORM``, which scores nothing."""
UNIFORM = "uniform"
Scoring = TypeVar("Scoring", bound=Callable[..., Any])


def register_method(
    name: str,
    *,
    flops: tuple[float, str] | None,
    micro_batches: bool = False,
    needs: Mapping[str, str] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Scoring], Scoring]:
    """Decorate a function ScoringStep -> Scores, so that ``selection.method`` can name it.

    ``flops``: (FLOPs per scored token over FLOPs per trained token, why), or None for a method that scores by the
    estimator chosen. ``MethodEntry`` says what the others mean. Raises ValueError for a name that is taken and for an
    unknown need.
    """
    if name == UNIFORM:
        raise ValueError(f"method {UNIFORM!r} scores nothing: choose another name")

    def register(score: Scoring) -> Scoring:
        entry = MethodEntry(
            name=name,
            score=score,
            flops=None if flops is None else Flops(*flops),
            micro_batches=micro_batches,
            needs=dict(needs or {}),
            example=dict(example or {}),
            origin=f"{origin_of(score)}:{name}",
        )
        METHODS.add(entry)
        return score

    return register


def names() -> tuple[str, ...]:
    """Every method that ``selection.method`` can name."""
    return (UNIFORM, *METHODS.names())


def by_estimator(name: str) -> bool:
    """Return whether a method scores by an estimator of utilities; False for 'uniform' and for an unknown one."""
    entry = METHODS.get(name)
    return entry is not None and entry.by_estimator


def needs(name: str) -> Mapping[str, str]:
    """Return what a method needs, and why; nothing for 'uniform' and for an unknown one."""
    entry = METHODS.get(name)
    return {} if entry is None else entry.needs
