"""Utilities of a buffer of candidates, scored by the ranks together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaopus.selection import counter_rng
from megaopus.selection.backend import Candidates, Gradient, Proxy, ScoringBackend, TextFeatures, UpdateOperator
from megaopus.selection.candidates import Windowed, as_candidates, tensors_of
from megaopus.selection.config import BY_LOSS, BY_TEXT_FEATURES, SelectionConfig, most_per_pass
from megaopus.selection.estimators.adjoint import adjoint_consumer, adjoint_utilities
from megaopus.selection.estimators.countsketch import CountSketchEstimator
from megaopus.selection.estimators.directional import directional_utilities
from megaopus.selection.estimators.exact import exact_estimate
from megaopus.selection.estimators.kronecker import KroneckerEstimator
from megaopus.selection.estimators.layers import ghost_layers, parameter_names, require_some
from megaopus.selection.memory import find_micro_batch_size
from megaopus.selection.proxy import ProxyGradient


class Scorer:
    """What each candidate is worth by ``config.method``; every method but 'uniform' has a number for it."""

    def __init__(
        self,
        config: SelectionConfig,
        backend: ScoringBackend,
        *,
        proxy: Proxy | None,
        pool: Proxy | None,
        wanted: Callable[[Candidates], Tensor] | None,
        text_features: TextFeatures | None,
        seed: int,
    ):
        self.config = config
        self.backend = backend
        self._proxy = proxy
        self._pool = pool
        self._wanted = wanted
        self._text_features = text_features
        self._seed = seed
        self._proxy_gradient = ProxyGradient(config.proxy_ema, kept=config.proxy_every > 1)
        self._layers = config.derived_layers()
        kind = CountSketchEstimator if config.derived_sketch() == "countsketch" else KroneckerEstimator
        self._sketch: CountSketchEstimator | KroneckerEstimator = kind(
            config.sketch_dim, config.sketch_seed, config.ghost_layers()
        )
        self._matched = False
        self.micro_batch_size = config.score_micro_batch_size or 1
        self._sized_for: str | None = None
        self._notes: list[str] = []

    def told(self) -> list[str]:
        """Notes since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def state_dict(self) -> dict[str, Any]:
        """The running proxy gradient (``ProxyGradient.state_dict``) and the micro-batch size found; empty before."""
        state = self._proxy_gradient.state_dict()
        if self._sized_for is not None:
            state |= {"micro_batch_size": self.micro_batch_size, "sized_for": self._sized_for}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        A micro-batch size found under other settings, or on another number of data-parallel ranks, is found anew.
        """
        self._proxy_gradient.load_state_dict(state)
        if self.config.score_micro_batch_size is None:
            self.micro_batch_size, self._sized_for = state.get("micro_batch_size", 1), state.get("sized_for")

    def score(self, buffer: Candidates, step: int, events: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """(utilities (N,), Gram matrix (N, N) or None) of the whole buffer, on the CPU; (None, None): no way to tell.

        Each data-parallel rank scores its contiguous N / ranks of the buffer; the result is the same on all.
        """
        share = len(buffer) // self.backend.world_size
        mine = buffer.take(torch.arange(share) + self.backend.rank * share)
        if self.config.score_window != "first":
            mine = Windowed(mine, self.config.score_window, self._seed, step)
        if self.config.method in BY_TEXT_FEATURES:
            assert self._text_features is not None  # checked on construction
            known = self._text_features.log_odds if self.config.method == "dsir" else self._text_features.importance
            return known(buffer.ids), None
        if self.config.method == "domain_oracle":
            assert self._wanted is not None  # checked on construction
            noise_N = counter_rng.uniform(counter_rng.key(self._seed, "domain_oracle", step), buffer.ids.cpu())
            return self._wanted(buffer).cpu().double() + noise_N, None
        if self.config.method in BY_LOSS:
            self._find_size(mine, lambda: self.backend.losses(mine, **self._passes()))
            parts = self.backend.losses(mine, **self._passes())
            losses = self.backend.combine(parts, parts.new_zeros(1))[0].cpu()
            return by_loss(self.config.method, losses), None
        raw = self.config.method == "greats"
        operator = self.backend.operator("raw" if raw else self.config.muon_operator)
        if operator is None:
            events.append("the optimizer has no state yet, so its step is not known: picked uniformly")
            return None, None
        average, bad = self._proxy_average(step)
        if self.config.bounded:
            operator = operator.bounded(average)
        self._find_size(mine, lambda: self._estimate(mine, operator, average))
        parts, features = self._estimate(mine, operator, average)
        # A stage or shard may be the only one to see a bad gradient: the word travels with the utilities.
        utilities, count = self.backend.combine(parts, bad.double().view(1))
        gram = None if features is None else self._gram(features, len(buffer))
        if bool(count > 0):
            events.append(
                "the proxy gradient is not finite: picked uniformly, and the gradient was left out of its average"
            )
            return None, None
        self._proxy_gradient.keep()
        return utilities.cpu(), gram

    def foresee(self, candidates: Candidates, scored: Tensor, step: int) -> list[Candidates]:
        """Say, to read ahead, whose tokens this rank needs to score the candidates at positions ``scored`` (n,)."""
        if not len(scored):
            return []
        ranks, rank = self.backend.world_size, self.backend.rank
        share = (len(scored) + -len(scored) % self.backend.multiple) // ranks
        found = [candidates.take(scored[rank * share : (rank + 1) * share])]
        if self.config.needs_proxy and step % self.config.proxy_every == 0:
            batches = [self._proxy, self._pool if self.config.contrast else None]
            for batch in (as_candidates(each(step), step) for each in batches if each is not None):
                found.append(batch.take(torch.arange(len(batch)).tensor_split(ranks)[rank]))
        return found

    def _proxy_average(self, step: int) -> tuple[Gradient, Tensor]:
        """(the average to score by, whether this step's gradient is not finite)."""
        if step % self.config.proxy_every and (average := self._proxy_gradient.last()) is not None:
            return average, torch.zeros((), device=self.backend.device)
        assert self._proxy is not None  # checked on construction
        gradient = self.backend.gradient(as_candidates(self._proxy(step), step))
        if self.config.contrast:
            assert self._pool is not None  # checked on construction
            other = self.backend.gradient(as_candidates(self._pool(step), step))
            gradient = {name: value - other[name] for name, value in gradient.items()}
        bad = torch.stack([~value.isfinite().all() for value in gradient.values()]).any()
        return self._proxy_gradient.offer(gradient), bad

    def _estimate(
        self, mine: Candidates, operator: UpdateOperator, gradient: Gradient
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """(parts of the utilities (n,) float64, by layer the rows whose inner products make the Gram matrix or None).

        Both are of this rank's share of the candidates and of its part of the model.
        """
        config, passes, diverse = self.config, self._passes(), self.config.redundancy > 0
        names = parameter_names(self.backend, gradient, self._layers)
        if not self._matched:
            of_parameters = config.estimator in ("directional", "exact")
            uses = names if of_parameters else ghost_layers(self.backend, self._layers)
            require_some(self.backend, len(uses), self._layers)
            if config.method == "greats" and of_parameters and config.epsilon is None and self.backend.coarse:
                raise ValueError(
                    "method greats scores along lr * gradient, a step too small for weights rounded to 16 bits, so that"
                    " directional scoring would measure the rounding: use estimator=adjoint (or set epsilon)"
                )
            self._matched = True
        given = (self.backend, mine, operator, gradient)
        if config.estimator == "exact":
            parts, updates = exact_estimate(*given, parameters=names, length=config.score_length, keep_updates=diverse)
            return parts, None if updates is None else {"": updates}
        if config.estimator in ("countsketch", "kronecker"):
            return self._sketch.estimate(*given, keep_sketches=diverse, **passes)
        if config.estimator == "adjoint" and diverse:  # one pass for both
            uses = ghost_layers(self.backend, self._layers)
            parts, consume = adjoint_consumer(self.backend, len(mine), operator, gradient, uses)
            return parts, self._sketch.estimate(*given, keep_sketches=True, also=consume, **passes)[1]
        if config.estimator == "adjoint":
            return adjoint_utilities(*given, layers=self._layers, **passes), None
        parts = directional_utilities(*given, layers=self._layers, epsilon=config.epsilon, sides=config.sides, **passes)
        return parts, self._sketch.estimate(*given, keep_sketches=True, **passes)[1] if diverse else None

    def _gram(self, features: dict[str, Tensor], size: int) -> Tensor:
        """(N, N) float64 on the CPU: inner products of the candidates' updates, over every layer of every stage."""
        total = torch.zeros(size, size, dtype=torch.float64, device=self.backend.device)
        for value in self.backend.sum_parts(features).values():
            rows = self.backend.gather_candidates(value).double()
            total += rows @ rows.t()
        return self.backend.sum_stages(total).cpu()

    def _passes(self) -> dict[str, Any]:
        return {"length": self.config.score_length, "micro_batch_size": self.micro_batch_size}

    def _find_size(self, mine: Candidates, estimate: Callable[[], Any]) -> None:
        """Unless it is set or known, find the micro-batch size of the passes that ``estimate`` makes over ``mine``."""
        config, device = self.config, self.backend.device
        passes = f"{self.backend.world_size} {replace(config, check_every=0)}"  # a check measures no candidates
        sized_for = hashlib.sha256(passes.encode()).hexdigest()[:16]
        exact = config.needs_proxy and config.estimator == "exact"  # one candidate at a time
        if config.score_micro_batch_size is not None or exact or self._sized_for == sized_for:
            return

        def run(size: int) -> None:
            self.micro_batch_size = size
            estimate()

        first = next(tensors_of(mine.take(torch.arange(1)).batch(config.score_length)))
        most = most_per_pass(len(mine), first.shape[1] if first.ndim > 1 else 1, device.type)
        self.micro_batch_size, note = find_micro_batch_size(run, most, device, self._least)
        self._sized_for = sized_for
        self._notes.append(note)

    def _least(self, value: int) -> int:
        """The smallest over all ranks of a number below 64: each votes for its own in one message."""
        votes = torch.zeros(64, dtype=torch.float64, device=self.backend.device)
        votes[value] = 1
        return int(self.backend.combine(votes[:0], votes)[1].nonzero()[0])


def by_loss(method: str, losses: Tensor) -> Tensor:
    """(N,) utilities from the candidates' own losses: the highest, the lowest, or those nearest the median."""
    if method == "high_ppl":
        return losses
    if method == "low_ppl":
        return -losses
    finite = losses[losses.isfinite()]
    return -(losses - (finite.median() if len(finite) else 0)).abs()
