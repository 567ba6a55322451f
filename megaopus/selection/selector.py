"""One step of selection: score the buffer, choose K of N, say what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaopus.selection import noise, sampler
from megaopus.selection.adjoint import adjoint_consumer, adjoint_utilities
from megaopus.selection.backend import Batch, Candidates, Gradient, Proxy, ScoringBackend, UpdateOperator
from megaopus.selection.candidates import Windowed, as_candidates
from megaopus.selection.config import BY_LOSS, SelectionConfig
from megaopus.selection.direction import directional_utilities
from megaopus.selection.exact import exact_estimate
from megaopus.selection.kronecker import KroneckerEstimator
from megaopus.selection.layers import ghost_layers, parameter_names, require_some
from megaopus.selection.proxy import ProxyGradient
from megaopus.selection.sketch import CountSketchEstimator

_UNIFORM_RATIO = 1.01  # largest probability over the uniform one below which a draw is uniform for all purposes


@dataclass(frozen=True, slots=True)
class Selection:
    """What one step picked, and why. Tensors are on the CPU and equal on every rank."""

    step: int
    indices: Tensor
    """(K,) int64, ascending positions in the buffer."""
    ids: Tensor
    """(N,) int64 ids of the candidates."""
    picked_ids: Tensor
    """(K,) int64 ids at ``indices``."""
    utilities: Tensor | None
    """(N,) float64 as estimated (not standardised, without redundancy); None when picked uniformly."""
    method: str
    """What really chose: 'uniform' in warm-up and after a fallback."""
    ess: float
    """1 / sum p^2, p = softmax(utility as used / temperature) whatever the sampler; uniform: the number drawn from."""
    max_p_ratio: float
    """N times the largest p."""
    events: list[str]
    """Fallbacks and candidates never picked, in words."""
    seconds: float
    """Wall time of the selection."""


class Selector:
    """Chooses ``num_selected`` of each step's candidates; a function of (seed, step, candidates, weights).

    ``proxy``: step -> the proxy mini-batch of that step (``Candidates``, or plain tensors), the whole batch on every
    rank; methods 'opus' and 'greats' need it. ``wanted``: candidates -> (N,) which are of a wanted domain; method
    'domain_oracle' needs it. Raises ValueError for unusable settings.
    """

    def __init__(
        self,
        config: SelectionConfig,
        backend: ScoringBackend,
        *,
        num_selected: int,
        proxy: Proxy | None,
        seed: int,
        wanted: Callable[[Candidates], Tensor] | None = None,
    ):
        problems = [f"{key}={getattr(config, key)!r}: {why} ({remedy})" for key, why, remedy in config.problems()]
        if problems:
            raise ValueError("selection settings: " + "; ".join(problems))
        if num_selected < 1:
            raise ValueError(f"num_selected={num_selected} must be at least 1")
        if config.needs_proxy and proxy is None:
            raise ValueError(
                f"method {config.method!r} scores candidates against a proxy: pass proxy=, a function of the step"
            )
        if config.method == "domain_oracle" and wanted is None:
            raise ValueError("method 'domain_oracle' must know what is wanted: pass wanted=, candidates -> (N,) bool")
        self.config = config
        self.backend = backend
        self.num_selected = num_selected
        self.seed = seed
        self._proxy = proxy
        self._wanted = wanted
        self._proxy_gradient = ProxyGradient(config.proxy_ema)
        self._layers = config.derived_layers()
        kind = CountSketchEstimator if config.derived_sketch() == "countsketch" else KroneckerEstimator
        self._sketch: CountSketchEstimator | KroneckerEstimator = kind(
            config.sketch_dim, config.sketch_seed, config.ghost_layers()
        )
        self._matched = False
        self._told_uniform = False

    def select(self, candidates: Candidates | Batch, step: int) -> Selection:
        """Pick from ``candidates``: the global buffer of N sequences, the same on every rank, each scoring N / ranks.

        Plain tensors get the ids step * N + 0..N-1. Raises ValueError if N < K or N does not divide over the ranks.
        """
        started = time.perf_counter()
        buffer = as_candidates(candidates, step)
        size, ranks = len(buffer), self.backend.world_size
        if size < self.num_selected:
            raise ValueError(f"step {step}: the buffer has {size} candidates, {self.num_selected} are to be picked")
        if size % ranks:
            raise ValueError(f"step {step}: {size} candidates do not divide over {ranks} data-parallel ranks")
        events: list[str] = []
        ids = buffer.ids.cpu()
        utilities, gram = self._score(buffer, step, events)
        allowed = torch.arange(size)
        if utilities is not None:
            allowed, usable = self._usable(utilities, gram, ids, events)
            if not usable:
                utilities = None
        if utilities is None:
            picked = sampler.pick_uniform(ids[allowed], self.num_selected, self.seed, step)
            p = torch.full((len(allowed),), 1 / len(allowed), dtype=torch.float64)
        else:
            gram = None if gram is None else gram[allowed][:, allowed]
            picked, p = self._pick(utilities[allowed], gram, ids[allowed], step)
        indices = allowed[picked].sort().values
        ratio = float(p.max()) * size
        if utilities is not None:
            self._tell_uniform(utilities[allowed], ratio, events)
        return Selection(
            step=step,
            indices=indices,
            ids=ids,
            picked_ids=ids[indices],
            utilities=utilities,
            method="uniform" if utilities is None else self.config.method,
            ess=float(1 / p.square().sum()),
            max_p_ratio=ratio,
            events=events,
            seconds=time.perf_counter() - started,
        )

    def state_dict(self) -> dict[str, Any]:
        """The running proxy gradient (``ProxyGradient.state_dict``); empty where there is none (yet)."""
        return self._proxy_gradient.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; picks are then the same to the last bit."""
        self._proxy_gradient.load_state_dict(state)

    def _score(self, buffer: Candidates, step: int, events: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """(utilities (N,), Gram matrix (N, N) or None) of the whole buffer; (None, None): pick uniformly."""
        if self.config.method == "uniform" or step < self.config.warmup_steps:
            return None, None
        share = len(buffer) // self.backend.world_size
        mine = buffer.take(torch.arange(share) + self.backend.rank * share)
        if self.config.score_window != "first":
            mine = Windowed(mine, self.config.score_window, self.seed, step)
        if self.config.method == "domain_oracle":
            assert self._wanted is not None  # checked on construction
            noise_N = noise.uniform(noise.key(self.seed, "domain_oracle", step), buffer.ids.cpu())
            return self._wanted(buffer).cpu().double() + noise_N, None
        if self.config.method in BY_LOSS:
            parts = self.backend.losses(mine, **self._passes())
            losses = self.backend.combine(parts, parts.new_zeros(1))[0].cpu()
            return by_loss(self.config.method, losses), None
        raw = self.config.method == "greats"
        operator = self.backend.operator("raw" if raw else self.config.muon_operator)
        if operator is None:
            events.append("the optimizer has no state yet, so its step is not known: picked uniformly")
            return None, None
        assert self._proxy is not None  # checked on construction
        gradient = self.backend.gradient(as_candidates(self._proxy(step), step))
        parts, features = self._estimate(mine, operator, self._proxy_gradient.offer(gradient))
        # A stage or shard may be the only one to see a bad gradient: the word travels with the utilities.
        bad = torch.stack([~value.isfinite().all() for value in gradient.values()]).any()
        utilities, count = self.backend.combine(parts, bad.double().view(1))
        gram = None if features is None else self._gram(features, len(buffer))
        if bool(count > 0):
            events.append(
                "the proxy gradient is not finite: picked uniformly, and the gradient was left out of its average"
            )
            return None, None
        self._proxy_gradient.keep()
        return utilities.cpu(), gram

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
        return {"length": self.config.score_length, "micro_batch_size": self.config.score_micro_batch_size}

    def _usable(self, utilities: Tensor, gram: Tensor | None, ids: Tensor, events: list[str]) -> tuple[Tensor, bool]:
        """(positions that may be picked, whether their utilities can rank them)."""
        finite = utilities.isfinite()
        if gram is not None:
            finite &= gram.diagonal().isfinite()
        allowed = finite.nonzero().flatten()
        if len(allowed) < len(ids):
            events.append(f"utility not finite: candidates {ids[~finite].tolist()}")
        if len(allowed) < self.num_selected:
            events.append(
                f"only {len(allowed)} candidates have a finite utility, {self.num_selected} are to be picked:"
                " picked uniformly from the whole buffer"
            )
            return torch.arange(len(ids)), False
        values = utilities[allowed]
        if bool(values.max() == values.min()):
            events.append("all utilities are equal (so they are at a learning rate of 0): picked uniformly")
            return allowed, False
        return allowed, True

    def _pick(self, utilities: Tensor, gram: Tensor | None, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """((K,) positions, (n,) probabilities of the first draw)."""
        config, count = self.config, self.num_selected
        standardised = config.utilities == "standardised"
        used = sampler.standardise(utilities) if standardised else utilities
        p = sampler.probabilities(used, config.temperature)
        drawn = config.sampler == "boltzmann"
        if gram is not None:
            scale = 1 / (count * gram.diagonal().mean()) if standardised else 1.0
            penalty = config.redundancy * scale * gram
            temperature = config.temperature if drawn else None
            picked = sampler.pick_diverse(used, penalty, ids, count, temperature=temperature, seed=self.seed, step=step)
        elif drawn:
            picked = sampler.pick_boltzmann(used, ids, count, config.temperature, self.seed, step)
        else:
            picked = sampler.pick_top_k(used, ids, count)
        return picked, p

    def _tell_uniform(self, utilities: Tensor, ratio: float, events: list[str]) -> None:
        """Say once that raw utilities are too small for the temperature."""
        raw = self.config.utilities == "raw" and self.config.sampler == "boltzmann"
        if raw and ratio < _UNIFORM_RATIO and not self._told_uniform:
            self._told_uniform = True
            spread = float(utilities.std(correction=0))
            events.append(
                f"raw utilities spread {spread:.2g} against a temperature of {self.config.temperature:g}: the largest"
                f" probability is {ratio:.5f}x uniform, so sampling is practically uniform (utilities=standardised)"
            )


def by_loss(method: str, losses: Tensor) -> Tensor:
    """(N,) utilities from the candidates' own losses: the highest, the lowest, or those nearest the median."""
    if method == "high_ppl":
        return losses
    if method == "low_ppl":
        return -losses
    finite = losses[losses.isfinite()]
    return -(losses - (finite.median() if len(finite) else 0)).abs()
