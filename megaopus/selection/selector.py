"""One step of selection: what to score, which K of N to take, whether to trust it, what to say of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megaopus.selection import counter_rng, guards, sampler
from megaopus.selection.backend import Batch, Candidates, Proxy, ScoringBackend, TextFeatures
from megaopus.selection.candidates import as_candidates
from megaopus.selection.config import BY_PROXY, SelectionConfig
from megaopus.selection.foresight import foresee
from megaopus.selection.prescreen import Prescreen
from megaopus.selection.scorer import Scorer
from megaopus.settings import problems

_UNIFORM_RATIO = 1.01  # largest probability over the uniform one below which a draw is uniform for all purposes
_DEBT = 1e9  # standardised utilities are small beside it; those of one level still differ in float64


@dataclass(frozen=True, slots=True)
class Redundancy:
    """The part of the Gram matrix of the candidates' updates that a choice rests on, all float64; nan: not scored."""

    squared_norms: Tensor
    """(N,) its diagonal."""
    positions: Tensor
    """(P,) in the buffer of what was chosen, for all steps that it serves, before an alarm undid the choice."""
    overlaps: Tensor
    """(P, N) its columns there: inner products with every candidate's update."""


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
    """(N,) float64 as estimated (not standardised, without redundancy), nan where not scored; None in a step that
    scores nothing: in warm-up, and where the buffer was scored in an earlier step (``score_every``)."""
    scored: Tensor | None
    """(N,) bool which of them ``utilities`` is about: a nan there is a utility that is not finite."""
    standing: Tensor | None
    """(N,) float64 in the prescreen, before it learnt from this step; None where there is none yet."""
    exposures: Tensor | None
    """(N,) int64 times that each would have been trained on in the window if it were picked now; None: not counted, or
    counted in an earlier step (``score_every``)."""
    redundancy: Redundancy | None
    """What the redundancy term took off; None where there was none, as where nothing was scored."""
    probabilities: Tensor
    """(N,) float64 that add up to 1: softmax(utility as used / temperature) over the candidates that may be picked (0
    for others), whatever the sampler: the chance of each at the first draw, before any redundancy term. 'uniform': the
    same for each that may be picked. With ``score_every`` those of the buffer when its picks were made."""
    correlation: float | None
    """Rank correlation of standing with the utilities of uniform draws, the latest of them."""
    method: str
    """What really chose: 'uniform' in a warm-up without a prior and after a fallback."""
    ess: float
    """1 / sum p^2 of ``probabilities``; uniform: the number drawn from."""
    max_p_ratio: float
    """N times the largest p."""
    events: list[str]
    """Fallbacks, alarms and candidates never picked, in words."""
    notes: list[str]
    """What was found out on the way and goes as it should: the micro-batch size, once."""
    seconds: float
    """Wall time of the selection."""

    @property
    def predicted_fall(self) -> float:
        """Mean utility of the picks: to first order, how much one update on them lowers the proxy loss, in nats.

        Methods 'opus' and 'greats' only. For the optimizer's history see docs/selection.md.
        """
        assert self.utilities is not None
        return float(self.utilities[self.indices].mean())

    @property
    def uniform_fall(self) -> float:
        """The same for a uniform draw: the mean over all candidates with a finite utility."""
        assert self.utilities is not None
        return float(self.utilities[self.utilities.isfinite()].mean())


@dataclass(slots=True)
class _Choice:
    """The picks of the ``score_every`` steps that one buffer serves."""

    period: int
    positions: Tensor
    """(score_every * K,) positions in the buffer: K of each step, one step after the other."""
    method: str
    ess: float
    max_p_ratio: float
    probabilities: Tensor
    utilities: Tensor | None = None
    scored: Tensor | None = None
    standing: Tensor | None = None
    exposures: Tensor | None = None
    redundancy: Redundancy | None = None


@dataclass(frozen=True, slots=True)
class _Buffer:
    """The candidates of ``score_every`` steps, before anything is scored."""

    candidates: Candidates
    ids: Tensor
    """(N,) on the CPU."""
    step: int
    period: int
    times: Tensor | None
    """(N,) how often each would have been trained on if it were picked now; None: not counted."""
    allowed: Tensor
    """Positions within the exposure cap, lifted where it must be."""
    debt: Tensor
    """(N,) float64 off each candidate's standing: more than any utility for each time above the cap."""
    events: list[str]


class Selector:
    """Chooses ``num_selected`` of each step's candidates; a function of (seed, step, candidates, weights).

    ``proxy``: step -> the proxy mini-batch of that step (``Candidates``, or plain tensors), the whole batch on every
    rank; methods 'opus' and 'greats' need it. ``pool``: the same of any text; ``contrast`` needs it. ``wanted``:
    candidates -> (N,) which are of a wanted domain; method 'domain_oracle' needs it. ``text_features``: what is
    known of candidates without a model; a prescreen, methods 'dsir' and 'importance', and some guards need it. Raises
    ValueError for unusable settings.
    """

    def __init__(
        self,
        config: SelectionConfig,
        backend: ScoringBackend,
        *,
        num_selected: int,
        proxy: Proxy | None,
        seed: int,
        pool: Proxy | None = None,
        wanted: Callable[[Candidates], Tensor] | None = None,
        text_features: TextFeatures | None = None,
    ):
        if wrong := [f"{each.key}={each.value!r}: {each.reason} ({each.remedy})" for each in problems(config)]:
            raise ValueError("selection settings: " + "; ".join(wrong))
        if num_selected < 1:
            raise ValueError(f"num_selected={num_selected} must be at least 1")
        if config.needs_proxy and proxy is None:
            raise ValueError(
                f"method {config.method!r} scores candidates against a proxy: pass proxy=, a function of the step"
            )
        if config.needs_pool and pool is None:
            raise ValueError("contrast is with a batch of the pool: pass pool=, a function of the step like proxy=")
        if config.method == "domain_oracle" and wanted is None:
            raise ValueError("method 'domain_oracle' must know what is wanted: pass wanted=, candidates -> (N,) bool")
        if config.needs_text_features and text_features is None:
            raise ValueError(
                f"{config.needs_text_features} needs text features of the candidates: pass text_features="
                " (backend.TextFeatures)"
            )
        self.config, self.backend = config, backend
        self.num_selected, self.seed = num_selected, seed
        self._proxy, self._text_features = proxy, text_features
        self._scorer = Scorer(
            config, backend, proxy=proxy, pool=pool, wanted=wanted, text_features=text_features, seed=seed
        )
        self._exposure = guards.Exposure(config.guards.exposure_window)
        self._prescreen = None
        if config.prescreen.mode != "off":
            assert text_features is not None
            self._prescreen = Prescreen(config.prescreen, text_features)
        self._choice: _Choice | None = None
        self._told: set[str] = set()

    def select(self, candidates: Candidates | Batch, step: int) -> Selection:
        """Pick from ``candidates``: the global buffer of N sequences, the same on every rank, each scoring N / ranks.

        Plain tensors get the ids step * N + 0..N-1. With ``score_every`` = k the buffer is that of step - step % k.
        Raises ValueError if N is too small or does not divide over the ranks.
        """
        started = time.perf_counter()
        period, turn = divmod(step, self.config.score_every)
        candidates = as_candidates(candidates, period)
        ids = candidates.ids.cpu()
        events: list[str] = []
        served = turn > 0 and self._choice is not None and self._choice.period == period
        if not served:
            self._check_size(len(ids), step)
            self._choice = self._choose(candidates, ids, step, events)
        choice = self._choice
        assert choice is not None
        turn_of = slice(turn * self.num_selected, (turn + 1) * self.num_selected)
        indices = choice.positions[turn_of].sort().values
        if self._exposed:
            self._exposure.record(step, self._signatures(candidates.take(indices)))
        return Selection(
            step=step,
            indices=indices,
            ids=ids,
            picked_ids=ids[indices],
            utilities=None if served else choice.utilities,
            scored=None if served else choice.scored,
            standing=None if served else choice.standing,
            exposures=None if served else choice.exposures,
            redundancy=None if served else choice.redundancy,
            probabilities=choice.probabilities,
            correlation=None if self._prescreen is None else self._prescreen.correlation,
            method=choice.method,
            ess=choice.ess,
            max_p_ratio=choice.max_p_ratio,
            events=events,
            notes=self._scorer.told(),
            seconds=time.perf_counter() - started,
        )

    def foresee(self, candidates: Candidates, step: int) -> tuple[list[Candidates], Tensor]:
        """Say whose tokens ``select`` will read on this rank at ``step``, the next one, and which (K,) it will pick.

        For reading ahead: as far as known before any scoring; changes nothing, asks no other rank, decides nothing.
        """
        period, turn = divmod(step, self.config.score_every)
        turn_of = slice(turn * self.num_selected, (turn + 1) * self.num_selected)
        if turn and self._choice is not None and self._choice.period == period:
            return [], self._choice.positions[turn_of].sort().values
        ids, blind = candidates.ids.cpu(), self._exposed and self._text_features is None
        times = self._exposure.times(self._signatures(candidates), ids) if self._exposed and not blind else None
        sizes = self._num_chosen, self._num_scored(len(ids))
        scored, picked, by_value = foresee(self.config, ids, step, times, self._prescreen, *sizes, self.seed)
        reads = self._scorer.foresee(candidates, scored, step)
        if blind:  # signatures are of tokens then
            reads.append(candidates.take(picked[turn_of]) if len(picked) else candidates)
        if self.config.guards.min_distinct > 0 and by_value:
            picks = [candidates.take(picked)] if len(picked) else []
            reads += guards.as_many([*picks, *self._others(candidates, ids, step)])
        return reads, picked[turn_of].sort().values

    def check_due(self, selection: Selection) -> bool:
        """Whether the step is one of every ``check_every``, and all its picks were scored by the proxy."""
        every, utilities = self.config.check_every, selection.utilities
        if every == 0 or selection.step % every or selection.method not in BY_PROXY or utilities is None:
            return False
        return bool(utilities[selection.indices].isfinite().all())

    def proxy_loss(self, step: int) -> float:
        """Mean token loss of the step's proxy batch, whole, dropout off, as the weights are; the same on every rank.

        Each data-parallel rank takes its share, as for the gradient (``ScoringBackend.gradient``). Collective.
        """
        if self._proxy is None:
            raise ValueError(f"method {self.config.method!r} has no proxy: pass proxy=, a function of the step")
        proxy, backend = as_candidates(self._proxy(step), step), self.backend
        share = torch.arange(len(proxy)).tensor_split(backend.world_size)[backend.rank]
        parts = torch.zeros(0, dtype=torch.float64, device=backend.device)
        if len(share):
            parts = backend.losses(proxy.take(share), micro_batch_size=self._scorer.micro_batch_size)
        return float(backend.combine(parts[:0], parts.sum().view(1))[1]) / len(proxy)

    def state_dict(self) -> dict[str, Any]:
        """Everything the coming picks depend on: the scorer's state, exposures, predictor and picks still to serve.

        'average' is a dictionary of tensors by parameter, everything else plain values.
        """
        state = self._scorer.state_dict()
        if self._exposed:
            state["exposure"] = self._exposure.state_dict()
        if self._prescreen is not None:
            state["prescreen"] = self._prescreen.state_dict()
        if self._choice is not None and self.config.score_every > 1:
            choice = self._choice
            kept = {name: getattr(choice, name) for name in ("period", "method", "ess", "max_p_ratio")}
            tensors = {name: getattr(choice, name).tolist() for name in ("positions", "probabilities")}
            state["choice"] = {**kept, **tensors}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; picks are then the same to the last bit."""
        self._scorer.load_state_dict(state)
        if self._exposed and "exposure" in state:
            self._exposure.load_state_dict(state["exposure"])
        if self._prescreen is not None and "prescreen" in state:
            self._prescreen.load_state_dict(state["prescreen"])
        self._choice = None
        if "choice" in state:
            dtypes = {"positions": torch.int64, "probabilities": torch.float64}
            tensors = {name: torch.tensor(state["choice"][name], dtype=dtype) for name, dtype in dtypes.items()}
            self._choice = _Choice(**{**state["choice"], **tensors})

    # -- one buffer ---------------------------------------------------------------------------------------------------

    def _check_size(self, size: int, step: int) -> None:
        if size < self._num_chosen:
            raise ValueError(f"step {step}: the buffer has {size} candidates, {self._num_chosen} are to be picked")
        scored, ranks = self._num_scored(size), self.backend.world_size
        if scored + (-scored % self.backend.multiple) > size:
            raise ValueError(f"step {step}: {scored} candidates do not divide over {ranks} data-parallel ranks")

    @property
    def _num_chosen(self) -> int:
        """Picks from one buffer."""
        return self.num_selected * self.config.score_every

    def _num_scored(self, size: int) -> int:
        """How many of a buffer of ``size`` are scored exactly."""
        if self.config.prescreen.mode == "predict":
            return min(self.config.prescreen.slice, size)
        return size // self.config.screened

    def _choose(self, candidates: Candidates, ids: Tensor, step: int, events: list[str]) -> _Choice:
        everyone = torch.arange(len(ids))
        period = step // self.config.score_every
        warm = step >= self.config.warmup_steps
        if self.config.method == "uniform" or not (warm or self.config.has_prior):
            return self._uniform(ids, everyone, period)
        times = self._exposure.times(self._signatures(candidates), ids) if self._exposed else None
        allowed, debt = self._allowed(times, len(ids), events)
        buffer = _Buffer(candidates, ids, step, period, times, allowed, debt, events)
        scored, standing, uniform, doubt = everyone, None, None, None
        predicting = self.config.prescreen.mode == "predict" or not warm
        due = warm and not (predicting and period % self.config.prescreen.every)
        if self._prescreen is not None:
            doubt = self._prescreen.doubt()
            standing = self._prescreen.standing(ids)
            if standing is not None:  # another processor may have rounded otherwise
                standing = self.backend.from_rank_0(standing)
        if self._prescreen is not None and due:
            trusted = None if doubt or standing is None else standing - debt
            scored, uniform = self._prescreen.screen(
                ids, buffer.allowed, trusted, self._num_scored(len(ids)), counter_rng.key(self.seed, "slice", period)
            )
        found, gram = self._score(candidates, scored, step, events) if due else (None, None)
        utilities = None
        if found is not None:
            utilities = torch.full((len(ids),), torch.nan, dtype=torch.float64).index_copy(0, scored, found)
            finite = found.isfinite() if gram is None else found.isfinite() & gram.diagonal().isfinite()
            if not bool(finite.all()):
                events.append(f"utility not finite: candidates {ids[scored][~finite].tolist()}")
            if self._prescreen is not None and uniform is not None:
                self._prescreen.learn(ids[scored], found, uniform, step)
        if doubt:
            events.append(doubt)
        values = utilities
        if predicting:
            values, gram = None if doubt else standing, None
        if values is None:
            choice = self._uniform(ids, buffer.allowed, period)
        else:
            choice = self._pick(buffer, values, None if gram is None else (scored, gram))
        choice.utilities, choice.standing, choice.exposures = utilities, standing, times
        if utilities is not None:
            choice.scored = torch.zeros(len(ids), dtype=torch.bool).index_fill(0, scored, True)
        return choice

    def _score(
        self, candidates: Candidates, scored: Tensor, step: int, events: list[str]
    ) -> tuple[Tensor | None, Tensor | None]:
        """``Scorer.score`` of the candidates at ``scored`` (n,); where n does not divide over the ranks, of a few more.

        Those are left out of the answer, so that it does not depend on the layout.
        """
        count = len(scored)
        if extra := -count % self.backend.multiple:
            rest = torch.ones(len(candidates), dtype=torch.bool).index_fill(0, scored, False)
            scored = torch.cat([scored, rest.nonzero().flatten()[:extra]])
        found, gram = self._scorer.score(candidates.take(scored), step, events)
        return None if found is None else found[:count], None if gram is None else gram[:count, :count]

    def _uniform(self, ids: Tensor, among: Tensor, period: int) -> _Choice:
        """Any of the candidates at ``among``, each as likely as the others."""
        positions = among[sampler.pick_uniform(ids[among], self._num_chosen, self.seed, period)]
        p = torch.zeros(len(ids), dtype=torch.float64).index_fill(0, among, 1 / len(among))
        return _Choice(period, positions, "uniform", len(among), len(ids) / len(among), p)

    def _pick(self, buffer: _Buffer, values: Tensor, gram: tuple[Tensor, Tensor] | None) -> _Choice:
        """By ``values`` (N,), uniformly where they tell nothing. ``gram``: (positions (n,), their (n, n) matrix)."""
        config, ids, period, count = self.config, buffer.ids, buffer.period, self._num_chosen
        usable = values.isfinite()
        if gram is not None:
            usable[gram[0]] &= gram[1].diagonal().isfinite()
        among = buffer.allowed[usable[buffer.allowed]]
        if len(among) < count:
            buffer.events.append(
                f"only {len(among)} candidates have a finite utility, {count} are to be picked:"
                " picked uniformly from the whole buffer"
            )
            return self._uniform(ids, torch.arange(len(ids)), period)
        if bool(values[among].max() == values[among].min()):
            buffer.events.append("all utilities are equal (so they are at a learning rate of 0): picked uniformly")
            return self._uniform(ids, among, period)
        standardised = config.utilities == "standardised"
        used = sampler.standardise(values[among]) if standardised else values[among]
        penalty = None
        if gram is not None:
            rows = torch.full((len(ids),), -1).index_copy(0, gram[0], torch.arange(len(gram[0])))[among]
            overlap = gram[1][rows][:, rows]
            scale = 1 / (self.num_selected * overlap.diagonal().mean()) if standardised else 1.0
            penalty = config.redundancy * scale * overlap
        quotas = None
        if config.guards.domain_floor > 0:
            assert self._text_features is not None  # checked on construction
            domains = self._text_features.domains(ids)
            floor = config.guards.domain_floor
            quotas = domains[among], guards.quotas(floor, domains, domains[among], count, self.seed, period)
        temperature = config.temperature if config.sampler == "boltzmann" else None
        picked = among[
            sampler.pick(used - buffer.debt[among], ids[among], count, temperature, penalty, quotas, self.seed, period)
        ]
        redundancy = None if gram is None else _redundancy(*gram, picked, len(ids))
        p = sampler.probabilities(used, config.temperature)
        ess, ratio = float(1 / p.square().sum()), float(p.max()) * len(ids)
        if alarm := self._alarm(buffer, picked, ess):
            buffer.events.append(f"alarm: {alarm}; picked uniformly")
            return replace(self._uniform(ids, buffer.allowed, period), redundancy=redundancy)
        self._tell_uniform(values[among], ratio, buffer.events)
        if config.score_every > 1:  # a fair mix in each step
            picked = picked[counter_rng.uniform(counter_rng.key(self.seed, "turns", period), ids[picked]).argsort()]
        everyone = torch.zeros(len(ids), dtype=torch.float64).index_copy(0, among, p)
        return _Choice(period, picked, config.method, ess, ratio, everyone, redundancy=redundancy)

    # -- guards -------------------------------------------------------------------------------------------------------

    @property
    def _exposed(self) -> bool:
        """Whether exposures are counted."""
        config = self.config
        return config.method != "uniform" and (config.guards.exposure_cap > 0 or config.guards.min_unique > 0)

    def _signatures(self, candidates: Candidates) -> Tensor:
        if self._text_features is not None:
            return self._text_features.signatures(candidates.ids, self.config.guards.near_duplicates)
        return guards.token_signatures(candidates.batch())

    def _allowed(self, times: Tensor | None, size: int, events: list[str]) -> tuple[Tensor, Tensor]:
        """(positions within the exposure cap, (N,) their debts); the cap is lifted by as little as leaves enough."""
        cap = self.config.guards.exposure_cap
        if times is None or not cap:
            return torch.arange(size), torch.zeros(size, dtype=torch.float64)
        needed = self._num_chosen if self._prescreen is None else max(self._num_chosen, self._num_scored(size))
        lifted = max(cap, int(times.sort().values[needed - 1]))
        if lifted > cap and f"cap {lifted}" not in self._told:
            self._told.add(f"cap {lifted}")
            events.append(
                f"fewer than {needed} candidates would be trained on at most {cap} time(s) in"
                f" {self.config.guards.exposure_window} steps: cap lifted to {lifted} where it must be"
            )
        return (times <= lifted).nonzero().flatten(), _DEBT * (times - cap).clamp_min(0).double()

    def _alarm(self, buffer: _Buffer, picked: Tensor, ess: float) -> str | None:
        """What is wrong with the picks, in words."""
        levels, candidates = self.config.guards, buffer.candidates
        if ess < levels.min_ess:
            return f"effective sample size {ess:.2f}, below {levels.min_ess:g}"
        if levels.min_unique > 0 and buffer.times is not None:
            new = (buffer.times == 1).double()
            share, usual = float(new[picked].mean()), float(new.mean())
            if share < levels.min_unique * usual:
                return f"{share:.0%} of the picks are new in the window, {usual:.0%} of the candidates"
        if levels.min_distinct > 0:
            others = self._others(candidates, buffer.ids, buffer.step)
            return guards.alarm_of_pairs(candidates.take(picked), others, levels.min_distinct)
        return None

    def _others(self, candidates: Candidates, ids: Tensor, step: int) -> list[Candidates]:
        """Give what the picks' pairs of tokens are compared with: a uniform draw, and the proxy if there is one."""
        drawn = sampler.pick_uniform(ids, self._num_chosen, self.seed, step // self.config.score_every)
        proxy = [] if self._proxy is None else [as_candidates(self._proxy(step), step)]
        return [candidates.take(drawn), *proxy]

    def _tell_uniform(self, utilities: Tensor, ratio: float, events: list[str]) -> None:
        """Say once that raw utilities are too small for the temperature."""
        raw = self.config.utilities == "raw" and self.config.sampler == "boltzmann"
        if raw and ratio < _UNIFORM_RATIO and "raw" not in self._told:
            self._told.add("raw")
            spread = float(utilities.std(correction=0))
            events.append(
                f"raw utilities spread {spread:.2g} against a temperature of {self.config.temperature:g}: the largest"
                f" probability is {ratio:.5f}x uniform, so sampling is practically uniform (utilities=standardised)"
            )


def _redundancy(scored: Tensor, gram: Tensor, picked: Tensor, size: int) -> Redundancy:
    """``gram`` (n, n) of the candidates at ``scored`` (n,), as the whole buffer of ``size`` sees it."""
    columns = torch.full((size,), -1).index_copy(0, scored, torch.arange(len(scored)))[picked]
    unknown = torch.full((len(picked), size), torch.nan, dtype=torch.float64)
    return Redundancy(
        torch.full((size,), torch.nan, dtype=torch.float64).index_copy(0, scored, gram.diagonal()),
        picked,
        unknown.index_copy(1, scored, gram.t()[columns]),
    )
