"""Says what a method of selection is given to score a buffer with, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection.backend import Candidates, Gradient, Proxy, ScoringBackend, TextFeatures
from megaopus.selection.config import SelectionConfig
from megaopus.selection.estimators.registry import Estimator
from megaopus.selection.proxy import ProxyGradient

Result = TypeVar("Result")


class Judged(NamedTuple):
    """Says what was found out of sequences of the proxy of which no gradient is made, each (j,), in their order."""

    utilities: Tensor
    losses: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Says what was found out of n candidates, on the CPU and equal on every rank."""

    utilities: Tensor | None
    """(n,) float64, the largest worth most; None: there is no way to tell, and ``events`` say why."""
    gram: Tensor | None = None
    """(n, n) float64 inner products of their updates, where there is a redundancy term."""
    events: tuple[Event, ...] = ()
    losses: Tensor | None = None
    """(n,) float64 mean token loss of what was scored of each; None: not asked for, or the estimator sees none."""
    judged: Judged | None = None
    """Sequences of the proxy that were scored beside them."""
    signal_to_error: float | None = None
    """Spread of the utilities over the error of each (``estimators.registry.Refining``); None: not known."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """More numbers of them for the record: column (``candidate_table.COLUMNS``) -> (n,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringStep:
    """One buffer to be scored by all ranks together; each takes its ``share`` through its part of the model."""

    config: SelectionConfig
    backend: ScoringBackend
    seed: int
    step: int
    buffer: Candidates
    """Everyone that is scored: n candidates, the last ``judged`` of which are of the proxy."""
    share: Candidates
    """The m that this data-parallel rank scores, cut to the window of ``score_window``; m is the same on every rank:
    where n does not divide, the last ranks have copies of the last candidate at the end."""
    judged: int
    """Sequences of the proxy at the end of ``buffer``."""
    proxy: Proxy | None
    """Gives the sequences of a step that a gradient is made of."""
    pool: Proxy | None
    wanted: Callable[[Candidates], Tensor] | None
    text_features: TextFeatures | None
    average: ProxyGradient
    estimator: Estimator | None
    """The one that ``config.estimator`` names, for methods that score by it."""
    measured: Callable[[Callable[[Mapping[str, Any]], Any]], Any]
    """``measured(run)`` is ``run({"length": ..., "micro_batch_size": ...})``; it finds the micro-batch size, if it is
    not known, by running ``run`` at several."""
    proxy_gradient: Callable[[Candidates, Candidates | None], Gradient]
    """``proxy_gradient(proxy, pool)``: the mean gradient of one batch, less that of the other if there is one, as
    ``backend.gradient`` gives it; in passes of the size that is set or found. Collective."""
    once: Callable[[str, Callable[[], None]], None]
    """``once(name, check)`` runs ``check`` in the first step that asks for it."""

    def lost_labels(self, losses: Tensor) -> tuple[Event, ...]:
        """The event of losses of the whole buffer (n,) none of which is a number other than 0, by its cause.

        Masked labels make a mean of nothing, which is nan, or zero, as the caller's loss function has it; nan may as
        well come from the model. Which it is follows from how many candidates have a label that is scored. Collective
        where no loss is such a number.
        """
        finite = losses.isfinite()
        if bool((losses[finite] != 0).any()):
            return ()
        backend, length = self.backend, self.config.score_length
        # a backend of version 0.1 cannot count them
        count = backend.count_labelled(self.share, length=length) if hasattr(backend, "count_labelled") else 0
        tally = torch.tensor([count], dtype=torch.float64, device=backend.device)
        if not float(backend.sum_over_ranks(tally[:0], tally)[1]):
            text = (
                "no label of a candidate counts in what is scored of it (are all masked, or is selection.score_length"
            )
            text += f"={length} too short?): {self.config.instead}"
            return (Event("selection.fallback.no_scored_label", text, score_length=length),)
        if bool(finite.any()):
            return ()
        text = (
            "no candidate's loss is finite, though labels count in it: weights, inputs or outputs of the model are nan"
        )
        return (Event("selection.fallback.losses_not_finite", f"{text} or too large: {self.config.instead}"),)

    def sum_parts(self, parts: Tensor) -> Tensor:
        """(m,) float64 parts of this rank's share -> (n,) for the buffer, on the CPU. Collective."""
        return self.backend.sum_over_ranks(parts, parts.new_zeros(1))[0][: len(self.buffer)].cpu()
