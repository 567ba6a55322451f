"""Selects K of N candidates each step: scores what is to be scored, decides, counts and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection import guards
from megaopus.selection.backend import Batch, Candidates, Proxy, ScoringBackend, TextFeatures
from megaopus.selection.candidates import as_candidates, even_share
from megaopus.selection.choice import Choice, Redundancy, Selection
from megaopus.selection.config import PREDICTING, SelectionConfig
from megaopus.selection.decide import Evidence, Key, counts_exposures, decide, draws_uniformly
from megaopus.selection.foresight import foresee
from megaopus.selection.methods.registry import needs
from megaopus.selection.odds import Odds, Signals, parts_of
from megaopus.selection.old_names import renamed_argument, with_new_names
from megaopus.selection.pieces import parameter_shapes, pieces_of
from megaopus.selection.prescreen import Prescreen
from megaopus.selection.scorer import Scorer
from megaopus.selection.scoring import Scores

__all__ = ["Redundancy", "Selection", "Selector"]

_STATE = frozenset(
    [
        *("average", "count", "micro_batch_size", "sized_for", "proxy_micro_batch_size", "proxy_sized_for"),
        *("estimator", "exposure", "prescreen", "odds", "choice"),
    ]
)
"""Keys of ``Selector.state_dict()``; which are there depends on the settings."""


class _Judging(NamedTuple):
    """Says, as rank 0 knows it, by what weights candidates are picked and by whom these are judged."""

    weights: Tensor
    """(F,) float64 of ``odds.SIGNALS``."""
    judges: Tensor
    """(b,) bool which of the step's proxy batch are scored beside the candidates."""
    proxy_importance: Tensor
    """(b,) float64 importance of that batch."""


class Selector:
    """Chooses ``num_selected`` of each step's candidates; a function of (seed, step, candidates, weights).

    ``proxy``: step -> the proxy mini-batch of that step (``Candidates``, or plain tensors), the whole batch on every
    rank; methods 'opus' and 'greats' need it. ``pool``: the same of any text; ``contrast`` needs it. ``wanted``:
    candidates -> (N,) which are of a wanted domain; method 'domain_oracle' needs it. ``text_features``: what is
    known of candidates without a model; a prescreen, methods 'dsir' and 'importance', and some guards need it
    (``traits``: its old name). Raises ValueError for unusable settings.
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
        traits: TextFeatures | None = None,
    ):
        text_features = renamed_argument("traits", traits, "text_features", text_features)
        config.refuse()
        if num_selected < 1:
            raise ValueError(f"num_selected={num_selected} must be at least 1")
        _check_given(config, proxy=proxy, pool=pool, wanted=wanted, text_features=text_features)
        self.config = config
        self.backend: ScoringBackend = with_new_names(backend)
        self.num_selected = num_selected
        self.seed = seed
        self._proxy = proxy
        self._text_features = text_features
        self._scorer = Scorer(
            config, self.backend, proxy=proxy, pool=pool, wanted=wanted, text_features=text_features, seed=seed
        )
        self._exposure = guards.Exposure(config.guards.exposure_window)
        self._prescreen = None
        if config.prescreen.mode in PREDICTING:
            assert text_features is not None
            self._prescreen = Prescreen(config.prescreen, text_features)
        self._odds = Odds() if config.utilities == "odds" else None
        self._weights: dict[str, float] = {}  # by which the latest picks were made
        self._choice: Choice | None = None
        self._signatures: Tensor | None = None  # (N,) of the buffer of the choice; None: nothing asked for them
        self._said: set[str] = set()

    def select(self, candidates: Candidates | Batch, step: int) -> Selection:
        """Pick from ``candidates``: the global buffer of N sequences, the same on every rank, each scoring its share.

        Plain tensors get the ids step * N + 0..N-1. With ``score_every`` = k the buffer is that of step - step % k.
        Raises ValueError if N is too small, RuntimeError if ranks picked differently.
        """
        started = time.perf_counter()
        period, turn = divmod(step, self.config.score_every)
        candidates = as_candidates(candidates, period)
        ids = candidates.ids.cpu()
        served = turn > 0 and self._choice is not None and self._choice.period == period
        if not served:
            self._check_size(len(ids), step)
            self._choice = self._decide(candidates, ids, step)
        choice = self._choice
        assert choice is not None
        selection = choice.at(step, turn, ids, self.num_selected, served=served)
        if check_alike := getattr(self.backend, "check_alike", None):  # backends of version 0.1 have none
            check_alike(selection.picked_ids)
        if counts_exposures(self.config):
            of_buffer = self._signatures
            picked = (
                self._signed(candidates.take(selection.indices)) if of_buffer is None else of_buffer[selection.indices]
            )
            self._exposure.record(step, picked)
        return replace(
            selection,
            weights={} if served else self._weights,
            correlation=None if self._prescreen is None else self._prescreen.correlation,
            events=self._unsaid(selection.events),
            notes=self._scorer.drain_notes(),
            seconds=time.perf_counter() - started,
        )

    def foresee(self, candidates: Candidates, step: int) -> tuple[list[Candidates], Tensor]:
        """Say whose tokens ``select`` will read on this rank at ``step``, the next one, and which (K,) it will pick.

        For reading ahead: as far as known before any scoring; changes nothing, asks no other rank, decides nothing.
        """
        config, (period, turn) = self.config, divmod(step, self.config.score_every)
        turn_of = slice(turn * self.num_selected, (turn + 1) * self.num_selected)
        if turn and self._choice is not None and self._choice.period == period:
            return [], self._choice.positions[turn_of].sort().values
        ids = candidates.ids.cpu()
        signatures = self._prepared(candidates) if counts_exposures(config) else None
        evidence, judging = self._known(ids, step, lambda own: own, signatures)
        scored, picked, by_value = foresee(evidence, config, Key(self.seed, step), self.num_selected)
        reads = self._scorer.foresee(candidates, scored, step, judging and judging.judges)
        if counts_exposures(config) and signatures is None:  # they are of tokens then
            signed = candidates.take(picked[turn_of].sort().values) if len(picked) else candidates
            reads.append(guards.own_share(signed, self.backend))
        if config.guards.min_distinct > 0 and by_value:
            picks = [candidates.take(picked)] if len(picked) else []
            count = self.num_selected * config.score_every
            others = guards.compared_with(candidates, self._proxy, count, self.seed, step, period)
            reads += guards.as_many([*picks, *others])
        return reads, picked[turn_of].sort().values

    def check_due(self, selection: Selection) -> bool:
        """Return whether the step is one of every ``check_every``, and all its picks were scored by the proxy."""
        every, utilities = self.config.check_every, selection.utilities
        if every == 0 or selection.step % every or "proxy" not in needs(selection.method) or utilities is None:
            return False
        return bool(utilities[selection.indices].isfinite().all())

    def proxy_loss(self, step: int) -> float:
        """Mean token loss of the step's proxy batch, whole, dropout off, as the weights are; the same on every rank.

        Each data-parallel rank takes its share, as for the gradient (``ScoringBackend.gradient``). Collective.
        """
        if self._proxy is None:
            raise ValueError(f"method {self.config.method!r} has no proxy: pass proxy=, a function of the step")
        proxy, backend = as_candidates(self._proxy(step), step), self.backend
        ranks, unit = backend.world_size, backend.multiple // backend.world_size
        rows, weights = even_share(len(proxy), ranks, backend.rank, unit)
        parts = backend.losses(proxy.take(rows), micro_batch_size=self._scorer.micro_batch_size)
        total = (parts * weights.to(parts.device)).sum().view(1)
        return float(backend.sum_over_ranks(parts[:0], total)[1]) / (ranks * len(rows))

    def state_dict(self) -> dict[str, Any]:
        """Everything the coming picks depend on: the scorer's state, exposures, predictor and picks still to serve.

        'average' is a dictionary of tensors by parameter, everything else plain values.
        """
        state = self._scorer.state_dict()
        if counts_exposures(self.config):
            state["exposure"] = self._exposure.state_dict()
        if self._prescreen is not None:
            state["prescreen"] = self._prescreen.state_dict()
        if self._odds is not None:
            state["odds"] = self._odds.state_dict()
        if self._choice is not None and self.config.score_every > 1:
            choice = self._choice
            kept = {name: getattr(choice, name) for name in ("period", "method", "ess", "max_p_ratio")}
            tensors = {"positions": choice.positions, "probabilities": choice.probabilities}
            state["choice"] = {**kept, **{name: values.tolist() for name, values in tensors.items()}}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; picks are then the same to the last bit.

        Raises ValueError if ``state`` is of something else, or of a selector of another model.
        """
        _check_state(state, self.backend)
        self._scorer.load_state_dict(state)
        if counts_exposures(self.config) and "exposure" in state:
            self._exposure.load_state_dict(state["exposure"])
        if self._prescreen is not None and "prescreen" in state:
            self._prescreen.load_state_dict(state["prescreen"])
        if self._odds is not None and "odds" in state:
            self._odds.load_state_dict(state["odds"])
        self._choice = self._signatures = None
        if "choice" in state:
            saved = dict(state["choice"])
            probabilities = torch.tensor(saved.pop("probabilities"), dtype=torch.float64)
            positions = torch.tensor(saved.pop("positions"))
            self._choice = Choice(**saved, positions=positions, probabilities=probabilities)

    # -- one buffer ---------------------------------------------------------------------------------------------------

    def _check_size(self, size: int, step: int) -> None:
        needed = self.num_selected * self.config.score_every
        if size < needed:
            raise ValueError(f"step {step}: the buffer has {size} candidates, {needed} are to be picked")

    def _decide(self, candidates: Candidates, ids: Tensor, step: int) -> Choice:
        """The picks of the buffer that ``step`` is the first to use; the prescreen learns from its scores."""
        choice = decide(self._evidence(candidates, ids, step), self.config, Key(self.seed, step), self.num_selected)
        if self._prescreen is not None and choice.uniform is not None:
            assert choice.utilities is not None
            assert choice.scored is not None
            scored = choice.scored
            self._prescreen.learn(ids[scored], choice.utilities[scored], choice.uniform[scored], step)
        return choice

    def _evidence(self, candidates: Candidates, ids: Tensor, step: int) -> Evidence:
        """Gather what is known of the buffer, as rank 0 knows it; collective."""
        asked = counts_exposures(self.config) and not draws_uniformly(self.config, step)
        self._signatures = self._signed(candidates) if asked else None
        known, judging = self._known(ids, step, self.backend.from_rank_0, self._signatures)
        odds, prior = self._odds, known.prior
        self._weights = {} if odds is None or judging is None else odds.named(judging.weights)

        def signals(positions: Tensor, scores: Scores) -> Signals:
            assert prior is not None
            assert scores.utilities is not None
            return Signals(prior[positions] / self.config.prescreen.prior, scores.utilities, scores.losses)

        def parts(positions: Tensor, scores: Scores) -> Mapping[str, Tensor]:
            assert judging is not None
            return parts_of(signals(positions, scores), judging.weights)

        def score(positions: Tensor) -> Scores:
            found = self._scorer.score(candidates.take(positions), step, judging and judging.judges)
            if odds is not None and judging is not None and found.judged is not None:
                importance = judging.proxy_importance[judging.judges]
                odds.learn(signals(positions, found), Signals(importance, *found.judged))
            return found

        return replace(
            known,
            score=score,
            parts=parts,
            token_pair_alarm=guards.token_pair_check(
                candidates,
                self._proxy,
                self.config.guards.min_distinct,
                self.seed,
                step,
                step // self.config.score_every,
            ),
        )

    def _known(
        self, ids: Tensor, step: int, from_rank_0: Callable[[Tensor], Tensor], signatures: Tensor | None
    ) -> tuple[Evidence, _Judging | None]:
        """Gather what is known of the buffer without a model or its tokens; ``signatures`` None: without exposures.

        Also what it is judged by; None: it is not picked by odds.

        ``from_rank_0`` takes one message with all of it: another processor may have rounded otherwise, another node may
        have other files.
        """
        config, text_features, prescreen = self.config, self._text_features, self._prescreen
        if draws_uniformly(config, step):
            return Evidence(ids=ids), None
        found: dict[str, Tensor] = {}
        if signatures is not None:
            found["exposures"] = self._exposure.times(signatures, ids)
        if config.guards.domain_floor > 0 and text_features is not None:
            found["domains"] = text_features.domains(ids)
        if self._odds is not None:
            assert self._proxy is not None
            assert text_features is not None
            batch = as_candidates(self._proxy(step), step).ids
            judges = text_features.judges(batch)
            found["weights"], found["judges"] = self._odds.weights, judges & ~judges.all()  # some make the gradient
            found["proxy_importance"] = text_features.proxy_importance(batch)
            if config.cadence == "auto":
                found["every"] = torch.tensor([self._odds.every])
        if config.prescreen.mode == "importance" and text_features is not None:
            found["prior"] = config.prescreen.prior * text_features.importance(ids)
        if prescreen is not None:
            found["doubt"] = prescreen.doubt()
            prior = prescreen.prior(ids)
            if (score := prescreen.prescreen_score(ids, prior)) is not None:
                found["prescreen_score"] = score
            if prior is not None:
                found["prior"] = prior
        if not found:
            return Evidence(ids=ids), None
        message = from_rank_0(torch.cat([values.double() for values in found.values()]))  # whole numbers stay exact
        parts = message.split([len(values) for values in found.values()])
        known = {name: part.to(found[name].dtype) for name, part in zip(found, parts, strict=True)}
        doubt, every = known.pop("doubt", None), known.pop("every", None)
        distrust = None if prescreen is None else prescreen.distrust_reason(doubt)
        if config.prescreen.mode == "importance":
            known["prescreen_score"] = known["prior"]
        now = every is None or step // config.score_every % int(every) == 0
        judging = None if self._odds is None else _Judging(*(known.pop(name) for name in _Judging._fields))
        return Evidence(ids=ids, distrust=distrust, scores_now=now, **known), judging

    def _signed(self, candidates: Candidates) -> Tensor:
        """(n,) the signatures that exposures are counted by; collective where they are of tokens yet to be hashed."""
        found = self._prepared(candidates)
        return guards.shared_signatures(candidates, self.backend) if found is None else found

    def _prepared(self, candidates: Candidates) -> Tensor | None:
        """(n,) the same as far as they are known without a look at tokens, on all ranks or none."""
        if self._text_features is not None:
            return self._text_features.signatures(candidates.ids, self.config.guards.near_duplicates)
        return getattr(candidates, "signatures", None)

    def _unsaid(self, events: Iterable[Event]) -> list[Event]:
        """``events`` without those that go on as they were said before."""
        found = []
        for event in events:
            going_on = {
                "selection.cap_lifted": event.facts.get("cap"),
                "selection.practically_uniform": "",
                "selection.imprecise": "",
            }
            if event.kind in going_on:
                name = f"{event.kind} {going_on[event.kind]}"
                if name in self._said:
                    continue
                self._said.add(name)
            found.append(event)
        return found


def _check_state(state: Any, backend: ScoringBackend) -> None:
    """Raise ValueError unless this is a selector's state, and its proxy gradient, if it has one, of this model."""
    if not isinstance(state, Mapping) or (unknown := state.keys() - _STATE):
        what = ", ".join(sorted(map(str, unknown))) if isinstance(state, Mapping) else str(type(state))
        raise ValueError(f"not what Selector.state_dict() gave: {what} (it gives a dictionary of {sorted(_STATE)})")
    if not state.get("average"):
        return
    shapes = {name: tuple(value.shape) for name, value in state["average"].items()}
    ours: dict[str, tuple[int, ...]] = {name: (piece.numel,) for name, piece in pieces_of(backend).items()}
    ours = ours or {name: tuple(shape) for name, shape in parameter_shapes(backend).items()}
    if wrong := sorted(name for name, shape in shapes.items() if ours.get(name) != shape):
        name = wrong[0]
        raise ValueError(
            f"the state's proxy gradient is of another model: {len(wrong)} of its {len(shapes)} tensors fit no weight,"
            f" such as {name} of shape {shapes[name]} (here: {ours.get(name, 'none of that name')})"
        )


def _check_given(config: SelectionConfig, **given: Any) -> None:
    """Raise ValueError if something is missing that the settings need, TypeError if it is no function."""
    for name, value in given.items():
        if name in ("proxy", "pool") and value is not None and not callable(value):
            raise TypeError(f"{name}= must be a function of the step, such as lambda step: batch, not {type(value)}")
    if config.needs_proxy and given["proxy"] is None:
        raise ValueError(
            f"method {config.method!r} scores candidates against a proxy: pass proxy=, a function of the step"
        )
    if config.needs_pool and given["pool"] is None:
        raise ValueError("contrast is with a batch of the pool: pass pool=, a function of the step like proxy=")
    if "wanted" in needs(config.method) and given["wanted"] is None:
        raise ValueError(f"method {config.method!r} must know what is wanted: pass wanted=, candidates -> (N,) bool")
    if config.needs_text_features and given["text_features"] is None:
        raise ValueError(
            f"{config.needs_text_features} needs text features of the candidates: pass text_features="
            " (backend.TextFeatures)"
        )
