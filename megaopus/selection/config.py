"""Settings of the selector. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

METHODS = ("uniform", "opus", "greats", "high_ppl", "low_ppl", "mid_ppl", "domain_oracle")
BY_LOSS = ("high_ppl", "low_ppl", "mid_ppl")
BY_PROXY = ("opus", "greats")
ESTIMATORS = ("directional", "adjoint", "countsketch", "kronecker", "exact")
SKETCHES = ("countsketch", "kronecker")
SAMPLERS = ("top_k", "boltzmann")
UTILITIES = ("standardised", "raw")
SIDES = ("central", "one")
WINDOWS = ("first", "random", "strided")
MUON_OPERATORS = ("paper", "full")
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a scoring pass beyond which larger ones are hardly faster (CPU: docs/benchmarks.md; CUDA: not measured)."""


def most_per_pass(count: int, tokens: int, device: str) -> int:
    """The largest power of two of ``count`` candidates that has about PASS_TOKENS tokens at most, at least 1."""
    by_tokens = round(math.log2(PASS_TOKENS.get(device, PASS_TOKENS["cuda"]) / tokens))
    return 2 ** max(0, min(by_tokens, count.bit_length() - 1))


@dataclass(slots=True, kw_only=True)
class SelectionConfig:
    """How the global batch is chosen from a buffer of candidates (symbols of arXiv 2602.05400 in brackets)."""

    method: str = "uniform"
    """uniform: at random; opus: by utility for the proxy; greats: the same of raw gradients, greedily, less the overlap
    with what is picked; high_ppl, low_ppl, mid_ppl: by the candidate's own loss; domain_oracle: the wanted domains."""
    rho: float = 0.5
    """Share of the buffer that is picked [rho]: num_candidates N = global_batch_size / rho."""
    estimator: str = "directional"
    """directional: two forwards along the optimizer's step on the proxy; adjoint: exact alignment of the matrices;
    countsketch: the paper's; kronecker: two-sided sketches; exact: per-sample gradients in float64 (oracle)."""
    sampler: str = "top_k"
    """top_k: the K highest utilities; boltzmann: K draws without replacement, p ~ exp(utility / temperature)."""
    utilities: str = "standardised"
    """standardised: z-scored over the global buffer before any temperature; raw: as estimated (the paper's text)."""
    temperature: float = 0.9
    """Boltzmann temperature [tau], in units of the utilities."""
    redundancy: float = 0.0
    """Coefficient of the redundancy term; directional and adjoint take its Gram matrix from sketches (``gram``)."""
    gram: str = "countsketch"
    """Sketches that stand in for the updates in the Gram matrix of directional and adjoint: countsketch, kronecker."""
    warmup_steps: int = 0
    """Steps picked uniformly before utilities are used (the optimizer's state must mean something first)."""
    score_length: int | None = None
    """Tokens of each candidate that are scored [L_score]; null: all. The proxy is never cut."""
    score_window: str = "first"
    """Where those tokens lie: first; random (a run drawn per step and candidate); strided (evenly spread)."""
    score_micro_batch_size: int | None = None
    """Candidates per forward pass while scoring, on each rank; null: found from the free memory."""
    proxy_batch_size: int = 32
    """Proxy sequences drawn anew each step, over all ranks."""
    proxy_ema: float = 0.5
    """Decay of the running average of the proxy gradient; 0: this step's gradient alone."""
    epsilon: float | None = None
    """Finite-difference step of directional scoring in optimizer steps; null: 0.25, or 1 with 16-bit weights."""
    sides: str = "central"
    """central: (L(-e) - L(+e)) / 2e; one: (L(0) - L(+e)) / e."""
    sketch_dim: int = 8192
    """Length of each layer's CountSketch [m]."""
    sketch_seed: int = 42
    """Seed of the sketch's hashes."""
    layers: str = "auto"
    """What is summed over. linear: matrices used at least once as one; all: every parameter (ghost estimators: every
    matrix and embedding); else a regular expression in names. auto: all for directional and exact, else linear."""
    muon_operator: str = "paper"
    """paper: the first Newton-Schulz factor S_1; full: the product S_5..S_1 at frozen momentum."""

    @property
    def needs_proxy(self) -> bool:
        """Whether candidates are scored against a proxy batch."""
        return self.method in BY_PROXY

    def derived_layers(self) -> str:
        """``layers`` with auto resolved for the estimator."""
        if self.layers != "auto":
            return self.layers
        return "all" if self.estimator in ("directional", "exact") else "linear"

    def ghost_layers(self) -> str:
        """The layers whose sketches are taken."""
        return "linear" if self.layers == "auto" else self.layers

    def derived_sketch(self) -> str:
        """The kind of sketch: the estimator's own, or the one chosen for the Gram matrix."""
        return self.estimator if self.estimator in SKETCHES else self.gram

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        choices = {
            "method": METHODS,
            "estimator": ESTIMATORS,
            "sampler": SAMPLERS,
            "utilities": UTILITIES,
            "sides": SIDES,
            "gram": SKETCHES,
            "score_window": WINDOWS,
            "muon_operator": MUON_OPERATORS,
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                yield key, "unknown choice", f"use one of: {', '.join(allowed)}"
        if not 0 < self.rho <= 1:
            yield "rho", "must lie in (0, 1]", "0.5 picks half of the candidates"
        if not self.temperature > 0:
            yield "temperature", "must be positive", "0.9 is the paper's value"
        if self.redundancy < 0:
            yield "redundancy", "must not be negative", "0 switches the redundancy term off"
        if self.redundancy > 0 and self.method not in BY_PROXY:
            yield "redundancy", f"method {self.method} has no Gram matrix", "set selection.redundancy=0"
        try:
            re.compile(self.layers)
        except re.error as error:
            yield "layers", f"is no regular expression ({error})", "use auto, linear, all, or a valid expression"
        if self.warmup_steps < 0:
            yield "warmup_steps", "must not be negative", "0 starts selecting as soon as the optimizer has state"
        if self.score_length is not None and self.score_length < 1:
            yield "score_length", "must be at least 1", "null scores whole sequences"
        if self.score_micro_batch_size is not None and self.score_micro_batch_size < 1:
            yield "score_micro_batch_size", "must be at least 1", "null finds it from the free memory"
        for key in ("proxy_batch_size", "sketch_dim"):
            if getattr(self, key) < 1:
                yield key, "must be at least 1", "see docs/selection.md"
        if not 0 <= self.proxy_ema < 1:
            yield "proxy_ema", "must lie in [0, 1)", "0 uses each step's proxy gradient alone"
        if self.epsilon is not None and not self.epsilon > 0:
            yield "epsilon", "must be positive", "null chooses by precision; 1 is one optimizer step"
