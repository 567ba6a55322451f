"""Decides which of a buffer's N candidates are trained on: a pure function of what is known of them.

A selector knows it from model and data, a replay from the record of a run; both call ``decide``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection import counter_rng, guards, sampler
from megaopus.selection.candidate_table import Masked
from megaopus.selection.choice import Choice, Influence, Redundancy
from megaopus.selection.config import PREDICTING, SelectionConfig
from megaopus.selection.methods.registry import UNIFORM, needs
from megaopus.selection.prescreen import screen
from megaopus.selection.samplers.registry import SAMPLERS
from megaopus.selection.scoring import Scores
from megaopus.selection.uniformity import share_by_utility

_LINE = 8
"""Numbers in a line of the processor's cache, the least that it fetches from memory."""
_UNIFORM_SHARE = 0.1  # of picks that utilities decide, below which a draw is uniform for all purposes
PICKING = 2
"""Number of the rules by which picks follow from evidence; 1 is that of records that name none (version 0.1). Whoever
changes picks raises it and says in ``replay.concerned`` which."""


class Key(NamedTuple):
    """Names one buffer's random numbers: all are functions of it and of the candidates' ids."""

    seed: int
    step: int
    """The first step that the buffer serves here."""


def _no_scores(positions: Tensor) -> Scores:
    raise AssertionError("nothing is scored in a step that draws uniformly")


def _no_alarm(positions: Tensor) -> Event | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Tells what is known of a buffer's N candidates, on the CPU and equal on every rank.

    A step that draws uniformly (``draws_uniformly``) needs ``ids`` alone.
    """

    ids: Tensor
    """(N,) int64."""
    score: Callable[[Tensor], Scores] = _no_scores
    """Positions (n,) -> the scores of those; called once at most."""
    prescreen_score: Tensor | None = None
    """(N,) float64, None where there is none yet."""
    prior: Tensor | None = None
    """(N,) float64 the part of ``prescreen_score`` that owes nothing to utilities; None: none does, or not known."""
    parts: Callable[[Tensor, Scores], Mapping[str, Tensor]] | None = None
    """(positions (n,), their scores) -> signal -> (n,) float64 what it adds to the log-odds of each, by whose sum they
    are picked; needed with ``utilities`` odds."""
    scores_now: bool = True
    """Whether utilities are worth computing in this step (``cadence`` auto)."""
    distrust: Event | None = None
    """Says why what the prescreen learnt is not to be used. Its fact ``instead`` says what is: 'importance', which the
    prescreen scores are then; anything else, or nothing (version 0.1): chance."""
    exposures: Tensor | None = None
    """(N,) int64 how often each would have been trained on if it were picked now; needed if ``counts_exposures``."""
    domains: Tensor | None = None
    """(N,) int64 number of the domain; needed if there is a ``domain_floor``."""
    token_pair_alarm: Callable[[Tensor], Event | None] = _no_alarm
    """Positions of picks -> the alarm if they repeat themselves."""


def draws_uniformly(config: SelectionConfig, step: int) -> bool:
    """Return whether picks of ``step`` are uniform whatever is known: by method, or in a warm-up without a prior."""
    return config.method == UNIFORM or not (_past_warmup(config, step) or config.has_prior)


def picks_by_predictor(config: SelectionConfig, step: int) -> bool:
    """Return whether the picks of ``step`` depend on no utility: a prescreen's scores stand in their place."""
    return config.prescreen.mode == "predict" or not _past_warmup(config, step)


def counts_exposures(config: SelectionConfig) -> bool:
    """Return whether picks depend on how often a candidate was trained on."""
    return config.method != UNIFORM and (config.guards.exposure_cap > 0 or config.guards.min_unique > 0)


def num_scored(config: SelectionConfig, size: int) -> int:
    """Return how many of a buffer of ``size`` are scored exactly."""
    if config.prescreen.mode == "predict":
        return min(config.prescreen.slice, size)
    return size // config.screened


def decide(evidence: Evidence, config: SelectionConfig, key: Key, num_selected: int) -> Choice:
    """Choose ``num_selected`` candidates for each of the ``score_every`` steps that the buffer serves.

    A function of its arguments alone, given that those of ``evidence`` are.
    """
    period, count = key.step // config.score_every, num_selected * config.score_every
    buffer = _Buffer(evidence, config, key.seed, period, count, num_selected, [])
    everyone = torch.arange(len(evidence.ids))
    if draws_uniformly(config, key.step):
        return buffer.told(_uniform(buffer, everyone))
    allowed, over_cap = _within_cap(buffer)
    past_warmup, prescreened = _past_warmup(config, key.step), config.prescreen.mode != "off"
    use_predictor, promise = picks_by_predictor(config, key.step), _promise(evidence)
    scores_this_step = past_warmup and evidence.scores_now and not (use_predictor and period % config.prescreen.every)
    scored, uniform, scores = everyone, None, Scores(utilities=None)
    if scores_this_step and prescreened:
        noise = counter_rng.key(key.seed, "slice", period)
        total = num_scored(config, len(everyone))
        learns = config.prescreen.mode in PREDICTING
        apart = config.prescreen.slice if learns else 0
        scored, uniform = screen(evidence.ids, allowed, promise, total, apart, noise, over_cap)
        uniform = uniform if learns else None
    if scores_this_step:
        scores = evidence.score(scored)
    values, gram = _everyone(buffer, scored, scores), scores.gram
    told: dict[str, Any] = {
        "utilities": values,
        "scored": None if values is None else _where(len(everyone), scored),
        "prescreen_score": evidence.prescreen_score,
        "exposures": evidence.exposures,
        "uniform": None if values is None or uniform is None else _where(len(everyone), scored[uniform]),
        "signal_to_error": scores.signal_to_error,
        "more": {name: _spread(len(everyone), scored, numbers) for name, numbers in scores.columns.items()},
    }
    if evidence.distrust:
        buffer.events.append(evidence.distrust)
    if use_predictor or (values is None and config.utilities == "odds"):
        values, gram = promise, None
        signals = None if promise is None else _promised(promise, evidence.prior)
    elif values is not None and config.utilities == "odds":
        signals = _odds(buffer, scored, scores, values)
        more = {"odds": signals.values, "loss": signals.losses}
        told["more"] |= {name: Masked(each, told["scored"]) for name, each in more.items() if each is not None}
    else:
        signals = None if values is None else _Signals(values, {"utility": values}, values)
    if signals is None:
        choice = _uniform(buffer, allowed)
    else:
        choice = _pick(buffer, allowed, over_cap, signals, None if gram is None else (scored, gram))
    return replace(buffer.told(choice), **told)


class _Signals(NamedTuple):
    """Says what candidates are picked by, each (N,) float64, nan where not known."""

    values: Tensor
    """The sum of the parts."""
    parts: Mapping[str, Tensor]
    """Signal -> what it adds."""
    utilities: Tensor
    losses: Tensor | None = None


def _promised(promise: Tensor, prior: Tensor | None) -> _Signals:
    """Take what a predictor has learnt beside what owes nothing to utilities."""
    known = torch.zeros_like(promise) if prior is None else prior
    return _Signals(promise, {"utility": promise - known, "importance": known}, promise - known)


def _odds(buffer: _Buffer, scored: Tensor, scores: Scores, utilities: Tensor) -> _Signals:
    """Take the log-odds of candidates at ``scored`` (n,); where ``utilities`` (N,) are not finite there are none."""
    assert buffer.evidence.parts is not None  # who scores knows them

    def everyone(values: Tensor) -> Tensor:
        return torch.full_like(utilities, torch.nan).index_copy(0, scored, values)

    parts = {name: everyone(values) for name, values in buffer.evidence.parts(scored, scores).items()}
    total = torch.stack([*parts.values()]).sum(0).masked_fill(~utilities.isfinite(), torch.nan)
    return _Signals(total, parts, utilities, None if scores.losses is None else everyone(scores.losses))


def _promise(evidence: Evidence) -> Tensor | None:
    """(N,) what stands in the place of utilities; None: there is nothing, or it is not to be trusted."""
    distrust = evidence.distrust
    trusted = distrust is None or distrust.facts.get("instead") == "importance"
    return evidence.prescreen_score if trusted else None


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Says what the parts of a decision have in common."""

    evidence: Evidence
    config: SelectionConfig
    seed: int
    period: int
    count: int
    """Picks from the buffer."""
    num_selected: int
    """Picks of a step."""
    events: list[Event]

    def told(self, choice: Choice) -> Choice:
        """The choice with what happened on the way."""
        return replace(choice, events=tuple(self.events))

    def groups(self, positions: Tensor) -> Tensor | None:
        """(n,) the group of each candidate at ``positions``; None: there is one alone."""
        if self.config.groups == 1:
            return None
        return positions * self.config.groups // len(self.evidence.ids)

    @property
    def explained(self) -> bool:
        """Return whether the method has said why its utilities are of no use."""
        return any(event.kind.startswith("selection.fallback.") for event in self.events)

    def tell(self, kind: str, text: str, **facts: Any) -> None:
        self.events.append(Event(f"selection.{kind}", text, **facts))


def _past_warmup(config: SelectionConfig, step: int) -> bool:
    return step >= config.warmup_steps


def _everyone(buffer: _Buffer, scored: Tensor, scores: Scores) -> Tensor | None:
    """(N,) utilities, nan but for those at ``scored`` (n,); None if there are none. Says what went wrong with them."""
    buffer.events.extend(scores.events)
    if scores.utilities is None:
        return None
    finite = scores.utilities.isfinite()
    if scores.gram is not None:
        finite &= scores.gram.diagonal().isfinite()
    if not bool(finite.all()):
        bad = buffer.evidence.ids[scored][~finite].tolist()
        buffer.tell("utility_not_finite", f"utility not finite: candidates {bad}", ids=bad)
    blank = torch.full((len(buffer.evidence.ids),), torch.nan, dtype=torch.float64)
    return blank.index_copy(0, scored, scores.utilities)


def _where(size: int, positions: Tensor) -> Tensor:
    """(size,) bool, True at ``positions``."""
    return torch.zeros(size, dtype=torch.bool).index_fill(0, positions, True)


def _spread(size: int, positions: Tensor, numbers: Tensor) -> Masked:
    """``numbers`` (n,) of the candidates at ``positions``, as numbers of which those of others are not known."""
    return Masked(numbers.new_zeros(size).index_copy(0, positions, numbers), _where(size, positions))


# -- picks -----------------------------------------------------------------------------------------------------------


def _uniform(buffer: _Buffer, among: Tensor) -> Choice:
    """Any of the candidates at ``among``, each as likely as the others."""
    ids = buffer.evidence.ids
    return Choice(
        period=buffer.period,
        positions=among[sampler.pick_uniform(ids[among], buffer.count, buffer.seed, buffer.period)],
        method=UNIFORM,
        ess=len(among),
        max_p_ratio=len(ids) / len(among),
        probabilities=torch.zeros(len(ids), dtype=torch.float64).index_fill(0, among, 1 / len(among)),
    )


def _pick(
    buffer: _Buffer, allowed: Tensor, over_cap: Tensor, signals: _Signals, gram: tuple[Tensor, Tensor] | None
) -> Choice:
    """By the values of ``signals``, uniformly where they tell nothing. ``gram``: (positions (n,), their (n, n))."""
    config, ids, period, count = buffer.config, buffer.evidence.ids, buffer.period, buffer.count
    values = signals.values
    usable = values.isfinite()
    if gram is not None:
        usable[gram[0]] &= gram[1].diagonal().isfinite()
    among = allowed[usable[allowed]]
    if len(among) < count:
        text = f"only {len(among)} candidates have a finite utility, {count} are to be picked:"
        text += " picked uniformly from the whole buffer"
        if not buffer.explained:
            buffer.tell("fallback.too_few_finite", text, finite=len(among), needed=count)
        return _uniform(buffer, torch.arange(len(ids)))
    if bool(values[among].max() == values[among].min()):
        if not buffer.explained:
            buffer.tell("fallback.equal_utilities", "all utilities are equal: picked uniformly")
        return _uniform(buffer, among)
    wild = _outliers(buffer, among, values)
    used = sampler.standardise(values[among]) if config.utilities == "standardised" else values[among]
    penalty = None if gram is None else _Penalty(buffer, among, wild, *gram)
    draws = sampler.Draws(config.sampler, config.temperature, buffer.seed, period)
    quotas = _quotas(buffer, among)
    picks = sampler.pick(used, ids[among], count, draws, penalty, quotas, over_cap[among])
    picked = among[picks]
    influence = _influence(buffer, among, over_cap, signals, picked, draws, penalised=penalty is not None)
    redundancy = None if penalty is None else penalty.redundancy(picks, picked)
    p = sampler.probabilities(used, config.temperature)
    ess, ratio = _ess(p), float(p.max()) * len(ids)
    # an outlier is sure of its place and takes no other's: the draw that could collapse is the one of the others
    drawn_from = ess if not bool(wild.any()) else _ess(sampler.probabilities(used[~wild], config.temperature))
    if alarm := _alarm(buffer, picked, drawn_from):
        buffer.events.append(alarm)
        return replace(_uniform(buffer, allowed), redundancy=redundancy)
    _tell_uniform(buffer, used, ids[among], draws, penalty, ratio)
    if config.score_every > 1:  # a fair mix in each step
        turns = counter_rng.uniform(counter_rng.key(buffer.seed, "turns", period), ids[picked])
        picked = picked[turns.argsort()]
    return Choice(
        period=period,
        positions=picked,
        method=config.method,
        ess=ess,
        max_p_ratio=ratio,
        probabilities=torch.zeros(len(ids), dtype=torch.float64).index_copy(0, among, p),
        redundancy=redundancy,
        influence=influence,
    )


def _influence(
    buffer: _Buffer,
    among: Tensor,
    over_cap: Tensor,
    signals: _Signals,
    picked: Tensor,
    draws: sampler.Draws,
    *,
    penalised: bool,
) -> Influence | None:
    """Compare the picks with those of what is known without utilities, of those at ``among``, by the same noise.

    ``penalised``: there is a redundancy term, which has noise of its own for every pick.
    """
    config, prior, ids = buffer.config, buffer.evidence.prior, buffer.evidence.ids[among]
    screened = config.prescreen.mode != "off" and config.prescreen.prior > 0
    if "proxy" not in needs(config.method) or (screened and prior is None):
        return None
    known = torch.zeros_like(signals.values) if prior is None else prior
    blind = known[among]
    if config.utilities == "standardised" and bool(blind.max() > blind.min()):
        blind = sampler.standardise(blind)
    # greedy picks have no noise that the term would change
    noisy = penalised and not SAMPLERS.find(config.sampler).greedy
    nothing = (lambda pick: torch.zeros_like(blind)) if noisy else None
    others = among[sampler.pick(blind, ids, buffer.count, draws, nothing, _quotas(buffer, among), over_cap[among])]
    came, went = picked[~torch.isin(picked, others)], others[~torch.isin(others, picked)]

    def swapped(numbers: Tensor) -> float | None:
        found = [numbers[rows][numbers[rows].isfinite()] for rows in (came, went)]
        return float(found[0].mean() - found[1].mean()) if all(map(len, found)) else None

    parts = {"importance": torch.zeros_like(known), **signals.parts}
    return Influence(
        changed=len(came) / len(picked),
        utility=swapped(signals.utilities),
        importance=None if prior is None else swapped(known),
        loss=None if signals.losses is None else swapped(signals.losses),
        spread={name: float(part[among].std(correction=0)) for name, part in parts.items()},
        came=tuple(came.tolist()),
        went=tuple(went.tolist()),
    )


def _ess(p: Tensor) -> float:
    return float(1 / p.square().sum())


def _outliers(buffer: _Buffer, among: Tensor, values: Tensor) -> Tensor:
    """(m,) bool which of the candidates at ``among`` have a utility that moves no other pick; says so."""
    wild = sampler.outliers(values[among])
    if bool(wild.any()):
        ids = buffer.evidence.ids[among[wild]].tolist()
        buffer.tell("utility_outlying", f"utility far from all others: candidates {ids}; moves no other pick", ids=ids)
    return wild


class _Penalty:
    """Gives what each pick takes off the others among those who may be picked; those that are ``wild`` nothing.

    One in ``score_every`` of the picks goes into the same update; which ones is not known yet. Of the matrix the
    columns of picks alone are looked at.
    """

    def __init__(self, buffer: _Buffer, among: Tensor, wild: Tensor, scored: Tensor, gram: Tensor):
        """``among``, ``wild``: (m,) positions and whether each is an outlier; ``gram``: (n, n) of ``scored`` (n,)."""
        config, size = buffer.config, len(buffer.evidence.ids)
        self._wild, self._scored, self._size = wild, scored, size
        self._norms, self._columns = gram.diagonal().clone(), gram.t()
        if _LINE * buffer.count > len(scored):  # reading that many columns fetches more memory than all rows
            self._columns = self._columns.contiguous()
        self._rows = torch.full((size,), -1).index_copy(0, scored, torch.arange(len(scored)))[among]
        norms = self._norms[self._rows]
        usual = norms[~sampler.outliers(norms)].mean()
        scale = 1 / (buffer.num_selected * usual) if config.utilities == "standardised" else 1.0
        self._factor = config.redundancy * scale / config.score_every
        self._groups = buffer.groups(among)

    def __call__(self, pick: int) -> Tensor:
        """(m,) what the pick of the ``pick``-th takes off each."""
        if self._wild[pick]:
            return torch.zeros(len(self._rows), dtype=self._columns.dtype)
        overlap = self._columns[self._rows[pick]]
        if len(self._rows) < len(overlap):
            overlap = overlap[self._rows]
        if self._groups is not None:  # a group knows nothing of the others' picks
            overlap = overlap.masked_fill(self._groups != self._groups[pick], 0)
        return self._factor * overlap

    def redundancy(self, picks: Tensor, positions: Tensor) -> Redundancy:
        """Give what was taken off, as the whole buffer sees it. ``picks`` (P,): in (m,), ``positions``: in it."""
        overlaps, norms = self._columns[self._rows[picks]], self._norms
        if len(self._scored) < self._size:
            unknown = torch.full((len(picks), self._size), torch.nan, dtype=torch.float64)
            overlaps = unknown.index_copy(1, self._scored, overlaps)
            norms = unknown.new_full((self._size,), torch.nan).index_copy(0, self._scored, norms)
        return Redundancy(norms, positions, overlaps)


def _quotas(buffer: _Buffer, among: Tensor) -> tuple[Tensor, dict[int, int]] | None:
    """((m,) domains or groups at ``among``, picks that each gets at least), None where nothing is due to any."""
    if (groups := buffer.groups(among)) is not None:
        share, members = buffer.count // buffer.config.groups, groups.bincount().tolist()
        return groups, {group: min(share, count) for group, count in enumerate(members)}
    floor, domains = buffer.config.guards.domain_floor, buffer.evidence.domains
    if floor == 0:
        return None
    assert domains is not None  # a floor needs them
    return domains[among], guards.quotas(floor, domains, domains[among], buffer.count, buffer.seed, buffer.period)


# -- guards ----------------------------------------------------------------------------------------------------------


def _within_cap(buffer: _Buffer) -> tuple[Tensor, Tensor]:
    """(positions within the exposure cap, (N,) int64 by how much each is above it, those further above coming later).

    The cap is lifted by as little as leaves enough candidates.
    """
    config, times, size = buffer.config, buffer.evidence.exposures, len(buffer.evidence.ids)
    cap, window = config.guards.exposure_cap, config.guards.exposure_window
    if times is None or not cap:
        return torch.arange(size), torch.zeros(size, dtype=torch.int64)
    needed = buffer.count if config.prescreen.mode == "off" else max(buffer.count, num_scored(config, size))
    lifted = max(cap, int(times.sort().values[needed - 1]))
    if lifted > cap:
        text = f"fewer than {needed} candidates would be trained on at most {cap} time(s) in"
        text += f" {window} steps: cap lifted to {lifted} where it must be"
        buffer.tell("cap_lifted", text, cap=lifted, needed=needed)
    return (times <= lifted).nonzero().flatten(), (times - cap).clamp_min(0)


def _alarm(buffer: _Buffer, picked: Tensor, ess: float) -> Event | None:
    """Return what is wrong with the picks. ``ess``: of the draw, where there is one: greedy picks are what they are."""
    levels, times = buffer.config.guards, buffer.evidence.exposures
    if ess < levels.min_ess and not SAMPLERS.find(buffer.config.sampler).greedy:
        text = f"effective sample size {ess:.2f}, below {levels.min_ess:g}"
        return guards.alarm("sample_size", text, ess=ess, level=levels.min_ess)
    if levels.min_unique > 0 and times is not None:
        new = (times == 1).double()
        share, usual = float(new[picked].mean()), float(new.mean())
        if share < levels.min_unique * usual:
            text = f"{share:.0%} of the picks are new in the window, {usual:.0%} of the candidates"
            return guards.alarm("repeats", text, share=share, usual=usual)
    return buffer.evidence.token_pair_alarm(picked) if levels.min_distinct > 0 else None


def _tell_uniform(
    buffer: _Buffer, utilities: Tensor, ids: Tensor, draws: sampler.Draws, penalty: _Penalty | None, ratio: float
) -> None:
    """Say that raw utilities are too small for the temperature."""
    config = buffer.config
    if config.utilities != "raw" or config.sampler != "boltzmann":
        return
    share = share_by_utility(utilities, ids, buffer.count, draws, penalty)
    if share < _UNIFORM_SHARE:
        spread = float(utilities.std(correction=0))
        text = f"raw utilities spread {spread:.2g} against a temperature of {config.temperature:g}: they decide"
        text += f" {share:.0%} of the picks, so sampling is practically uniform (utilities=standardised)"
        facts = {"spread": spread, "temperature": config.temperature, "ratio": ratio, "share": share}
        buffer.tell("practically_uniform", text, **facts)
