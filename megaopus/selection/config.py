"""Settings of the selector. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megaopus.selection.estimators import registry as estimators
from megaopus.selection.methods import registry as methods
from megaopus.selection.samplers import registry as samplers

UTILITIES = ("standardised", "raw")
SIDES = ("central", "one")
WINDOWS = ("first", "random", "strided")
MUON_OPERATORS = ("paper", "full")
PRESCREENS = ("off", "cascade", "predict")
TRAITS = ("ngrams", "domain", "likelihood", "shape")
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a scoring pass beyond which larger ones are hardly faster (CPU: docs/benchmarks.md; CUDA: not measured)."""


def most_per_pass(count: int, tokens: int, device: str) -> int:
    """The largest power of two of ``count`` candidates that has about PASS_TOKENS tokens at most, at least 1."""
    by_tokens = round(math.log2(PASS_TOKENS.get(device, PASS_TOKENS["cuda"]) / tokens))
    return 2 ** max(0, min(by_tokens, count.bit_length() - 1))


@dataclass(slots=True, kw_only=True)
class PrescreenConfig:
    """An online predictor of utility from traits of a sequence that need no model (docs/selection.md)."""

    mode: str = "off"
    """cascade: it screens a larger buffer, the promising part is scored exactly; predict: it picks, and a small uniform
    slice scored exactly keeps it trained."""
    multiple: int = 4
    """The buffer is this many times num_candidates."""
    slice: int = 32
    """Candidates drawn uniformly and scored exactly at a time, over all ranks."""
    every: int = 8
    """predict: steps from one such slice to the next; in between nothing is scored."""
    window: int = 1024
    """Scores that the predictor is fitted to, the latest."""
    refit: int = 64
    """New scores after which it is fitted again."""
    prior: float = 1.0
    """Weight of the log of a sequence's importance (as method importance) beside what is learnt. Utilities are about
    one step and do not unlearn it: what text like the proxy's is worth shows in the long run (docs/decisions/007)."""
    traits: list[str] = field(default_factory=lambda: list(TRAITS))
    """What it sees. ngrams: hashed uni- and bigrams; domain; likelihood: of them under proxy and pool (DSIR's); shape:
    shares of distinct n-grams."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if self.mode not in PRESCREENS:
            yield "mode", "unknown choice", f"use one of: {', '.join(PRESCREENS)}"
        for key in ("multiple", "slice", "every", "refit"):
            if getattr(self, key) < 1:
                yield key, "must be at least 1", "see docs/selection.md"
        if self.prior < 0:
            yield "prior", "must not be negative", "0 begins with nothing, 1 is usual"
        if self.window < 64:
            yield "window", "must be at least 64", "1024 is usual"
        if not self.traits or set(self.traits) - set(TRAITS):
            yield "traits", "unknown or empty", f"name some of: {', '.join(TRAITS)}"


@dataclass(slots=True, kw_only=True)
class GuardConfig:
    """What keeps selection from repeating itself or collapsing (docs/selection.md)."""

    exposure_cap: int = 1
    """Times a sequence (and its exact copies) may be trained on within the window; 0: no cap."""
    exposure_window: int = 1000
    """Steps over which exposures are counted."""
    near_duplicates: bool = False
    """Count sequences that share most of their 8-grams as copies too."""
    domain_floor: float = 0.0
    """Fraction of its share of the buffer that each domain keeps among the picks."""
    min_ess: float = 1.2
    """Alarm when the effective sample size is below this many candidates."""
    min_distinct: float = 0.5
    """Alarm when the picks have fewer different token pairs than this times those of a uniform draw."""
    min_unique: float = 0.5
    """Alarm when the share of picks that are new in the window is below this times the candidates' share."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        if self.exposure_cap < 0:
            yield "exposure_cap", "must not be negative", "0 lifts the cap"
        if self.exposure_window < 1:
            yield "exposure_window", "must be at least 1", "1000 is usual"
        for key in ("domain_floor", "min_distinct", "min_unique"):
            if not 0 <= getattr(self, key) <= 1:
                yield key, "must lie in [0, 1]", "0 switches it off"
        if self.min_ess < 0:
            yield "min_ess", "must not be negative", "0 switches it off"


@dataclass(slots=True, kw_only=True)
class SelectionConfig:
    """How the global batch is chosen from a buffer of candidates (symbols of arXiv 2602.05400 in brackets)."""

    method: str = "uniform"
    """uniform: at random; opus: by utility for the proxy; greats: the same of raw gradients, greedily, less the overlap
    with what is picked; high_ppl, low_ppl, mid_ppl: by the candidate's own loss; dsir: by n-gram log-odds of proxy over
    pool; importance: by the log of how much likelier the proxy holds such text; domain_oracle: the wanted domains."""
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
    """Steps before utilities are used (the optimizer's state must mean something first): picked by the prescreen's
    prior if there is one, else uniformly."""
    score_length: int | None = None
    """Tokens of each candidate that are scored [L_score]; null: all. The proxy is never cut."""
    score_window: str = "first"
    """Where those tokens lie: first; random (a run drawn per step and candidate); strided (evenly spread)."""
    score_micro_batch_size: int | None = None
    """Candidates per forward pass while scoring, on each rank; null: found from the free memory."""
    proxy_batch_size: int = 32
    """Proxy sequences drawn anew each step, over all ranks."""
    contrast: bool = False
    """Less the gradient of as many sequences of the pool: what helps the proxy more than it helps any text."""
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
    bounded: bool = True
    """Adam's second moment with the proxy gradient in it, which bounds the step that utilities are about; false: as it
    stands (the paper), where an embedding row hardly ever seen can outweigh all others."""
    check_every: int = 0
    """Every that many steps, those chosen by the proxy compare the predicted fall of its loss with the real one (two
    forward passes of the proxy batch); 0: never."""
    proxy_every: int = 1
    """Steps between two proxy gradients; the average stands in between."""
    score_every: int = 1
    """Steps that one scored buffer serves; it has that many times num_candidates."""
    prescreen: PrescreenConfig = field(default_factory=PrescreenConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)

    @property
    def needs_proxy(self) -> bool:
        """Whether candidates are scored against a proxy batch."""
        return "proxy" in methods.needs(self.method)

    @property
    def needs_pool(self) -> bool:
        """Whether utilities are relative to a batch of the pool."""
        return self.needs_proxy and self.contrast

    @property
    def has_prior(self) -> bool:
        """Whether there is something to pick by before there are utilities."""
        return self.prescreen.mode != "off" and self.prescreen.prior > 0

    @property
    def screened(self) -> int:
        """Candidates in the buffer for each one that rho stands for."""
        return 1 if self.prescreen.mode == "off" else self.prescreen.multiple

    @property
    def needs_text_features(self) -> str:
        """The setting that needs traits of the candidates; empty: none."""
        if self.prescreen.mode != "off":
            return f"selection.prescreen.mode={self.prescreen.mode}"
        if "text_features" in methods.needs(self.method):
            return f"selection.method={self.method}"
        if self.guards.domain_floor > 0:
            return "selection.guards.domain_floor"
        return "selection.guards.near_duplicates" if self.guards.near_duplicates else ""

    def needs(self) -> dict[str, tuple[str, str, str]]:
        """What method and estimator need (``registry.NEEDS``): need -> (setting, its value, the reason in words)."""
        found = {need: ("method", self.method, why) for need, why in methods.needs(self.method).items()}
        entry = estimators.ESTIMATORS.get(self.estimator)
        if methods.by_estimator(self.method) and entry is not None:
            found |= {need: ("estimator", self.estimator, why) for need, why in entry.needs.items()}
        return found

    def derived_layers(self) -> str:
        """``layers`` with auto resolved for the estimator."""
        return estimators.ESTIMATORS.find(self.estimator).auto_layers if self.layers == "auto" else self.layers

    def ghost_layers(self) -> str:
        """The layers whose sketches are taken."""
        return "linear" if self.layers == "auto" else self.layers

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used."""
        choices = {
            "method": methods.names(),
            "estimator": estimators.names(),
            "sampler": samplers.names(),
            "utilities": UTILITIES,
            "sides": SIDES,
            "gram": estimators.sketch_names(),
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
        if self.redundancy > 0 and not methods.by_estimator(self.method):
            yield "redundancy", f"method {self.method} has no Gram matrix", "set selection.redundancy=0"
        if self.check_every < 0:
            yield "check_every", "must not be negative", "0 switches the check off"
        if self.check_every > 0 and not self.needs_proxy:
            yield "check_every", f"method {self.method} predicts nothing for a proxy", "set selection.check_every=0"
        if self.check_every > 0 and self.contrast:
            yield "check_every", "utilities are relative to the pool", "set selection.contrast=false"
        if self.check_every > 0 and self.prescreen.mode == "predict":
            yield "check_every", "picks are predicted, not scored", "use selection.prescreen.mode=cascade or off"
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
        for key in ("proxy_batch_size", "sketch_dim", "proxy_every", "score_every"):
            if getattr(self, key) < 1:
                yield key, "must be at least 1", "see docs/selection.md"
        if not 0 <= self.proxy_ema < 1:
            yield "proxy_ema", "must lie in [0, 1)", "0 uses each step's proxy gradient alone"
        if self.epsilon is not None and not self.epsilon > 0:
            yield "epsilon", "must be positive", "null chooses by precision; 1 is one optimizer step"
        for section in ("prescreen", "guards"):
            for key, reason, remedy in getattr(self, section).problems():
                yield f"{section}.{key}", reason, remedy
        if self.prescreen.mode in PRESCREENS[1:] and not self.needs_proxy:
            yield "prescreen.mode", f"method {self.method} has no utilities to predict", "use selection.method=opus"
