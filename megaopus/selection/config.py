"""Declares the settings of the selector. Needs the standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megaopus.selection.estimators import registry as estimators
from megaopus.selection.methods import registry as methods
from megaopus.selection.presets import read_preset
from megaopus.selection.samplers import registry as samplers
from megaopus.settings import FIXED, HARMLESS, TRAINING, problems, renamed, replaced, setting

UTILITIES = ("standardised", "raw", "odds")
SIDES = ("central", "one")
WINDOWS = ("first", "random", "strided")
MUON_OPERATORS = ("paper", "full")
GRAM_SKETCHES = ("summed", "per_layer")
PRESCREENS = ("off", "importance", "cascade", "predict")
CADENCES = ("every", "auto")
PREDICTING = ("cascade", "predict")
"""Those whose predictor learns from utilities."""
TEXT_FEATURES = ("ngrams", "domain", "likelihood", "shape")
CHUNK = 304 * 65536
"""Numbers of the temporaries at a time of what goes through a gradient piece by piece. One CUDA kernel takes 320 blocks
of 65536 numbers of several tensors (torch: MultiTensorApply.cuh), of which the last of each tensor may be short."""
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a scoring pass beyond which larger ones are hardly faster (CPU: docs/benchmarks.md; CUDA: not measured)."""

NO_EXPERTS = "activations are captured sequence by sequence, and experts are given tokens of several"
"""Why estimators that capture activations cannot score a mixture of experts."""


def most_per_pass(count: int, tokens: int, device: str) -> int:
    """The largest power of two of ``count`` candidates that has about PASS_TOKENS tokens at most, at least 1."""
    by_tokens = round(math.log2(PASS_TOKENS.get(device, PASS_TOKENS["cuda"]) / tokens))
    return 2 ** max(0, min(by_tokens, count.bit_length() - 1))


def largest_divisor(count: int, most: int) -> int:
    """The largest number up to ``most``, at least 1, of which ``count`` is a multiple."""
    return next(size for size in range(max(1, min(most, count)), 0, -1) if count % size == 0)


_SEE = "see docs/selection.md"
_OFF = "0 switches it off"


def _named(value: list[str]) -> str | None:
    return None if value else "none is named"


@renamed(traits="text_features")
@dataclass(slots=True, kw_only=True)
class PrescreenConfig:
    """An online predictor of utility from features of a sequence's text that need no model (docs/selection.md)."""

    mode: str = setting(
        "off",
        choices=PRESCREENS,
        resume=FIXED,
        doc="importance: the part of a larger buffer that is most important by n-grams is scored exactly; cascade: the "
        "part that a predictor finds promising is; predict: the predictor picks, and a small uniform slice scored "
        "exactly keeps it trained.",
    )
    multiple: int = setting(4, min=1, resume=FIXED, doc="The buffer is this many times num_candidates.", hint=_SEE)
    slice: int = setting(
        32, min=1, doc="Candidates drawn uniformly and scored exactly at a time, over all ranks.", hint=_SEE
    )
    every: int = setting(
        8, min=1, doc="predict: steps from one such slice to the next; in between nothing is scored.", hint=_SEE
    )
    window: int = setting(1024, min=64, doc="Scores that the predictor is fitted to, the latest.")
    refit: int = setting(64, min=1, doc="New scores after which it is fitted again.", hint=_SEE)
    prior: float = setting(
        1.0,
        min=0,
        doc="Weight of the log of a sequence's importance (as method importance) beside what is learnt. Utilities are "
        "about one step and do not unlearn it: what text like the proxy's is worth shows in the long run "
        "(docs/decisions/007).",
        hint="0 begins with nothing, 1 is usual",
    )
    text_features: list[str] = setting(
        list(TEXT_FEATURES),
        choices=TEXT_FEATURES,
        check=_named,
        doc="What it sees. ngrams: hashed uni- and bigrams; domain; likelihood: of them under proxy and pool (DSIR's); "
        "shape: shares of distinct n-grams.",
    )


@dataclass(slots=True, kw_only=True)
class GuardConfig:
    """Says what keeps selection from repeating itself or collapsing (docs/selection.md)."""

    exposure_cap: int = setting(
        1,
        min=0,
        doc="Times a sequence (and its exact copies) may be trained on within the window; 0: no cap.",
        hint="0 lifts the cap",
    )
    exposure_window: int = setting(1000, min=1, doc="Steps over which exposures are counted.")
    near_duplicates: bool = setting(False, doc="Count sequences that share most of their 8-grams as copies too.")
    domain_floor: float = setting(
        0.0, min=0, max=1, doc="Fraction of its share of the buffer that each domain keeps among the picks.", hint=_OFF
    )
    min_ess: float = setting(
        1.2,
        min=0,
        doc="Alarm when the effective sample size of a draw (boltzmann) is below this many candidates, outliers aside.",
        hint=_OFF,
    )
    min_distinct: float = setting(
        0.5,
        min=0,
        max=1,
        doc="Alarm when the picks have fewer different token pairs than this times those of a uniform draw.",
        hint=_OFF,
    )
    min_unique: float = setting(
        0.5,
        min=0,
        max=1,
        doc="Alarm when the share of picks that are new in the window is below this times the candidates' share.",
        hint=_OFF,
    )


def half_life(decay: float, period: int) -> float:
    """Steps in which a weight halves that is multiplied by ``decay`` (0 to below 1) every ``period`` steps.

    Of the numbers next to it the one that gives ``decay`` back, to the last bit where there is one.
    """
    if decay == 0:
        return 0.0
    first = -period * math.log(2) / math.log(decay)
    near = (first + places * math.ulp(first) for places in (0, -1, 1, -2, 2, -3, 3, -4, 4))
    return min(near, key=lambda steps: abs(0.5 ** (period / steps) - decay))


def _expression(value: str) -> str | None:
    try:
        re.compile(value)
    except re.error as error:
        return f"is no regular expression ({error})"
    return None


def _half_life(config: SelectionConfig, decay: float) -> float:
    if not 0 <= decay < 1:
        raise ValueError(f"proxy_ema={decay!r} must lie in [0, 1); proxy_half_life says it in training steps")
    return half_life(decay, config.proxy_period)


@renamed(needs_traits="needs_text_features")
@replaced("proxy_ema", "proxy_half_life", _half_life, lambda config: config.proxy_decay)
@dataclass(slots=True, kw_only=True)
class SelectionConfig:
    """Says how the global batch is chosen from a buffer of candidates (symbols of arXiv 2602.05400 in brackets)."""

    RESUME: ClassVar[str] = TRAINING

    method: str = setting(
        "uniform",
        choices=methods.names,
        doc="uniform: at random; opus: by utility for the proxy; greats: the same of raw gradients, greedily, less the "
        "overlap with what is picked; high_ppl, low_ppl, mid_ppl: by the candidate's own loss; dsir: DSIR-like, "
        "by log-odds of tokens' n-grams in proxy over pool; importance: by the log of how much likelier the proxy "
        "holds such text; grad_norm: by the norm of the candidate's own gradient; domain_oracle: the target domains.",
    )
    rho: float = setting(
        0.5,
        above=0,
        max=1,
        resume=FIXED,
        doc="Share of the buffer that is picked [rho]: num_candidates N = global_batch_size / rho.",
        hint="0.5 picks half of the candidates",
    )
    groups: int = setting(
        1,
        min=1,
        doc="Equal runs of the buffer that give equally many picks each; as many as there are data-parallel ranks make "
        "each rank choose among its own candidates, as the paper's script does.",
        hint="1 chooses among all",
    )
    estimator: str = setting(
        "directional",
        choices=estimators.names,
        doc="directional: two forwards along the optimizer's step on the proxy; adjoint: exact alignment of the "
        "matrices; countsketch: the paper's; kronecker: two-sided sketches; exact: per-sample gradients in float64 "
        "(oracle).",
    )
    sampler: str = setting(
        "top_k",
        choices=samplers.names,
        doc="top_k: the K highest utilities; boltzmann: K draws without replacement, p ~ exp(utility / temperature).",
    )
    utilities: str = setting(
        "standardised",
        choices=UTILITIES,
        doc="standardised: z-scored over the global buffer before any temperature; raw: as estimated (the paper's "
        "text); odds: log-odds of proxy against candidates by importance, utility and loss, weighed as training goes.",
    )
    temperature: float = setting(
        0.9, above=0, doc="Boltzmann temperature [tau], in units of the utilities.", hint="0.9 is the paper's value"
    )
    redundancy: float = setting(
        0.0,
        min=0,
        doc="Coefficient of the redundancy term; directional and adjoint take its Gram matrix from sketches (`gram`).",
        hint="0 switches the redundancy term off",
    )
    gram: str = setting(
        "countsketch",
        choices=estimators.sketch_names,
        doc="Sketches that stand in for the updates in the Gram matrix of directional and adjoint.",
    )
    gram_sketch: str = setting(
        "summed",
        choices=GRAM_SKETCHES,
        doc="Sketches of a Gram matrix. summed: one of each candidate, the sum over its layers; per_layer: one of each "
        "layer (the paper), for as many times the memory and traffic.",
    )
    warmup_steps: int = setting(
        0,
        min=0,
        doc="Steps before utilities are used (the optimizer's state must mean something first): picked by the "
        "prescreen's prior if there is one, else uniformly.",
        hint="0 starts selecting as soon as the optimizer has state",
    )
    score_length: int | None = setting(
        None,
        min=2,
        doc="Tokens of each candidate that are scored [L_score]; null, or more than there are: all. The proxy is never "
        "cut.",
        hint="one token predicts no other; null scores whole sequences",
    )
    score_window: str = setting(
        "first",
        choices=WINDOWS,
        doc="Where those tokens, a run of neighbours, begin: first; random (drawn per step and candidate); strided "
        "(spread evenly over the sequence from one candidate to the next).",
    )
    score_micro_batch_size: int | None = setting(
        None,
        min=1,
        resume=HARMLESS,
        doc="Candidates per forward pass while scoring, on each rank; null: found from the free memory.",
        hint="null finds it from the free memory",
    )
    proxy_micro_batch_size: int | None = setting(
        None,
        min=1,
        resume=HARMLESS,
        doc="Proxy sequences per forward and backward pass on each rank, at most; null: as many as in training, on a "
        "GPU more where the free memory has room.",
        hint="null takes training's, or finds it from the free memory",
    )
    proxy_batch_size: int = setting(32, min=1, doc="Proxy sequences drawn anew each step, over all ranks.", hint=_SEE)
    contrast: bool = setting(
        False,
        doc="Subtract the gradient of as many sequences of the pool: for what helps the proxy more than any text.",
    )
    proxy_half_life: float = setting(
        1.0,
        min=0,
        doc="Training steps in which the weight of a proxy gradient in the running average halves, however few of them "
        "have one; 0: no average, the latest gradient alone.",
        hint="0 uses the latest proxy gradient alone",
    )
    epsilon: float | None = setting(
        None,
        above=0,
        doc="Finite-difference step of directional scoring in optimizer steps; null: what changes the proxy's loss by "
        "0.005 nats, or 0.025 where the model computes in 16 bits, and less where the loss bends.",
        hint="null follows the learning rate; 1 is one optimizer step",
    )
    sides: str = setting("central", choices=SIDES, doc="central: (L(-e) - L(+e)) / 2e; one: (L(0) - L(+e)) / e.")
    sketch_dim: int = setting(
        8192, min=1, doc="Length of each layer's CountSketch [m], and so of their sum (`gram_sketch`).", hint=_SEE
    )
    sketch_seed: int = setting(42, doc="Seed of the sketch's hashes.")
    layers: str = setting(
        "auto",
        check=_expression,
        doc="What is summed over. linear: matrices used at least once as one; all: every parameter (ghost estimators: "
        "every matrix and embedding); else a regular expression in names. auto: all for directional and exact, else "
        "linear.",
        hint="use auto, linear, all, or a valid expression",
    )
    muon_operator: str = setting(
        "paper",
        choices=MUON_OPERATORS,
        doc="Muon's, NAMO's and NAMO-D's. paper: the first Newton-Schulz factor S_1; full: the derivative of the step.",
    )
    bounded: bool = setting(
        True,
        doc="Adam's second moment with the proxy gradient in it, which bounds the step that utilities are about; "
        "false: as it stands (the paper), where an embedding row hardly ever seen can outweigh all others.",
    )
    check_every: int = setting(
        0,
        min=0,
        resume=HARMLESS,
        doc="Every that many steps, those chosen by the proxy compare the predicted fall of its loss with the real one "
        "(two forward passes of the proxy batch); 0: never.",
        hint="0 switches the check off",
    )
    proxy_every: int = setting(
        1, min=1, doc="Steps between two proxy gradients; the average stands in between.", hint=_SEE
    )
    cadence: str = setting(
        "every",
        choices=CADENCES,
        doc="Of utilities=odds. every: every buffer is scored; auto: the less the scores weigh the fewer are, down to "
        "one in 32, and importance picks alone in between.",
    )
    score_every: int = setting(
        1,
        min=1,
        resume=FIXED,
        doc="Steps that one scored buffer serves; it has that many times num_candidates.",
        hint=_SEE,
    )
    prescreen: PrescreenConfig = field(default_factory=PrescreenConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> SelectionConfig:
        """Make the settings of a shipped recipe, as the command line's ``selection=NAME`` does.

        ``settings``: instead of the recipe's own; those of ``prescreen`` and ``guards`` as dictionaries, which change
        what they name. Raises ValueError for an unknown recipe or setting, and for a value that cannot be used.
        """
        tree = read_preset(name)
        for key, value in settings.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        sections = {"prescreen": PrescreenConfig, "guards": GuardConfig}
        try:
            made = {key: sections[key](**value) if key in sections else value for key, value in tree.items()}
            config = cls(**made)
        except TypeError as error:
            raise ValueError(f"selection settings: {error}") from None
        config.refuse()
        return config

    def refuse(self) -> None:
        """Raise ValueError, with every reason, if the settings cannot be used."""
        if wrong := [f"{each.key}={each.value!r}: {each.reason} ({each.remedy})" for each in problems(self)]:
            raise ValueError("selection settings: " + "; ".join(wrong))

    @property
    def needs_proxy(self) -> bool:
        """Return whether candidates are scored against a proxy batch."""
        return "proxy" in methods.needs(self.method)

    @property
    def needs_pool(self) -> bool:
        """Return whether utilities are relative to a batch of the pool."""
        return self.needs_proxy and self.contrast

    @property
    def has_prior(self) -> bool:
        """Return whether there is something to pick by before there are utilities."""
        return self.prescreen.mode != "off" and self.prescreen.prior > 0

    @property
    def instead(self) -> str:
        """Say how candidates are picked where utilities tell nothing."""
        return "picked by importance alone" if self.utilities == "odds" else "picked uniformly"

    @property
    def screened(self) -> int:
        """Candidates in the buffer for each one that rho stands for."""
        return 1 if self.prescreen.mode == "off" else self.prescreen.multiple

    @property
    def needs_text_features(self) -> str:
        """Name the setting that needs text features of the candidates; empty: none."""
        if self.prescreen.mode != "off":
            return f"selection.prescreen.mode={self.prescreen.mode}"
        if "text_features" in methods.needs(self.method):
            return f"selection.method={self.method}"
        if self.guards.domain_floor > 0:
            return "selection.guards.domain_floor"
        return "selection.guards.near_duplicates" if self.guards.near_duplicates else ""

    @property
    def seen_blocks(self) -> tuple[str, ...]:
        """Name the blocks of the text features that a predictor sees; none where there is no predictor."""
        return tuple(self.prescreen.text_features) if self.prescreen.mode in PREDICTING else ()

    @property
    def proxy_period(self) -> int:
        """Training steps from one proxy gradient to the next."""
        scored = self.score_every * (self.prescreen.every if self.prescreen.mode == "predict" else 1)
        return math.lcm(scored, self.proxy_every)

    @property
    def proxy_decay(self) -> float:
        """Weight that the average of proxy gradients keeps when the next one comes."""
        return 0.5 ** (self.proxy_period / self.proxy_half_life) if self.proxy_half_life else 0.0

    def needs(self) -> dict[str, tuple[str, str, str]]:
        """Return what method and estimator need (``registry.NEEDS``): need -> (setting, its value, why)."""
        found = {need: ("method", self.method, why) for need, why in methods.needs(self.method).items()}
        entry = estimators.ESTIMATORS.get(self.estimator)
        if methods.by_estimator(self.method) and entry is not None:
            found |= {need: ("estimator", self.estimator, why) for need, why in entry.needs.items()}
        return found

    def derived_layers(self) -> str:
        """``layers`` with auto resolved for the estimator."""
        return estimators.ESTIMATORS.find(self.estimator).auto_layers if self.layers == "auto" else self.layers

    @property
    def captures(self) -> bool:
        """Return whether the estimator, or what it borrows sketches from, captures activations of layers."""
        entry = estimators.ESTIMATORS.find(self.estimator)
        return "hooks" in entry.needs or (entry.gram is None and self.redundancy > 0)

    def captured_for(self) -> tuple[str, str] | None:
        """Name the setting, and its value, for which layers are looked for to be captured; None: they are not."""
        if "hooks" in methods.needs(self.method):
            return "method", self.method
        if not methods.by_estimator(self.method):
            return None
        if not self.captures:
            return ("layers", self.layers) if self.layers == "linear" else None
        if "hooks" in estimators.ESTIMATORS.find(self.estimator).needs:
            return "estimator", self.estimator
        return "gram", self.gram

    def ghost_layers(self) -> str:
        """The layers whose sketches are taken."""
        return "linear" if self.layers == "auto" else self.layers

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for each setting that cannot be used, alone or beside the others."""
        return ((each.key, each.reason, each.remedy) for each in problems(self))

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for settings that do not go together."""
        if self.redundancy > 0 and not methods.by_estimator(self.method):
            yield "redundancy", f"method {self.method} has no Gram matrix", "set selection.redundancy=0"
        if self.groups > 1 and self.guards.domain_floor > 0:
            reason = "a floor of domains is kept over the whole buffer"
            yield "groups", reason, "set selection.guards.domain_floor=0, or selection.groups=1"
        if self.check_every > 0 and not self.needs_proxy:
            yield "check_every", f"method {self.method} predicts nothing for a proxy", "set selection.check_every=0"
        if self.check_every > 0 and self.contrast:
            yield "check_every", "utilities are relative to the pool", "set selection.contrast=false"
        if self.check_every > 0 and self.prescreen.mode == "predict":
            yield "check_every", "picks are predicted, not scored", "use selection.prescreen.mode=cascade or off"
        if self.utilities == "odds" and not (self.prescreen.mode == "importance" and self.prescreen.prior > 0):
            reason = "odds are of importance too, for which the buffer is screened"
            yield "utilities", reason, "set selection.prescreen.mode=importance and selection.prescreen.prior=1"
        if self.utilities == "odds" and not methods.by_estimator(self.method):
            yield "utilities", f"method {self.method} scores no proxy sequences", "set selection.method=opus"
        if self.cadence == "auto" and self.utilities != "odds":
            yield "cadence", f"utilities={self.utilities} have no weight", "set selection.utilities=odds"
        if self.prescreen.mode in PREDICTING and not self.needs_proxy:
            yield "prescreen.mode", f"method {self.method} has no utilities to predict", "use selection.method=opus"
