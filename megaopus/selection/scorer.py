"""Scores a buffer of candidates by the method chosen, by all ranks together."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaopus.events import Event
from megaopus.selection.backend import Candidates, Gradient, Proxy, ScoringBackend, TextFeatures
from megaopus.selection.candidates import Together, Windowed, as_candidates, even_share, tensors_of
from megaopus.selection.config import SelectionConfig, most_per_pass
from megaopus.selection.estimators.registry import ESTIMATORS, Refining
from megaopus.selection.memory import find_micro_batch_size
from megaopus.selection.methods.registry import METHODS, UNIFORM
from megaopus.selection.proxy import ProxyGradient
from megaopus.selection.scoring import Judged, Scores, ScoringStep


class Scorer:
    """Scores buffers by ``config.method``, step after step; keeps the proxy gradient's average and sizes of passes.

    Raises ValueError if ``config.proxy_micro_batch_size`` is set for a backend that cannot be told.
    """

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
        self._seed = seed
        self._given: dict[str, Any] = {"proxy": proxy, "pool": pool, "wanted": wanted, "text_features": text_features}
        self._method = None if config.method == UNIFORM else METHODS.find(config.method)
        self._average = ProxyGradient(config.proxy_decay, kept=config.proxy_every > 1)
        self._estimator, self._sized = None, self._method is not None
        if self._method is not None and self._method.by_estimator:
            entry = ESTIMATORS.find(config.estimator)
            self._estimator, self._sized = entry.make(config), entry.micro_batches
        self._checked: set[str] = set()
        self._stateless = 0  # scorings that found no state of the optimizer
        self.micro_batch_size = config.score_micro_batch_size or 1
        self._sized_for: str | None = None
        told = config.needs_proxy and "micro_batch_size" in inspect.signature(backend.gradient).parameters
        if config.proxy_micro_batch_size is not None and config.needs_proxy and not told:
            raise ValueError(
                f"selection.proxy_micro_batch_size={config.proxy_micro_batch_size}: {type(backend).__name__}.gradient"
                " takes no micro_batch_size; add it (docs/library.md), or leave the setting at null"
            )
        self._finds_proxy = told and config.proxy_micro_batch_size is None and _saves_launches(backend.device)
        self.proxy_micro_batch_size = config.proxy_micro_batch_size
        self._proxy_sized_for = ""
        self._notes: list[str] = []

    def drain_notes(self) -> list[str]:
        """Give the notes since the last call, and forget them."""
        notes, self._notes = self._notes, []
        return notes

    def state_dict(self) -> dict[str, Any]:
        """The running proxy gradient (``ProxyGradient.state_dict``), the micro-batch sizes found and the estimator's
        state; empty before, but for the proxy's size where it is to be found."""
        state = self._average.state_dict()
        if self._sized_for is not None:
            state |= {"micro_batch_size": self.micro_batch_size, "sized_for": self._sized_for}
        if self._finds_proxy:
            state["proxy_micro_batch_size"] = self.proxy_micro_batch_size
            state["proxy_sized_for"] = self._proxy_sized_for
        if isinstance(self._estimator, Refining) and (found := self._estimator.state_dict()):
            state["estimator"] = found
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        A micro-batch size found under other settings, or on another number of data-parallel ranks, is found anew. Of a
        version that found none for the proxy the state goes on with the backend's own.
        """
        self._average.load_state_dict(state)
        if isinstance(self._estimator, Refining):
            self._estimator.load_state_dict(state.get("estimator", {}))
        if self.config.score_micro_batch_size is None:
            self.micro_batch_size, self._sized_for = state.get("micro_batch_size", 1), state.get("sized_for")
        if self._finds_proxy:
            self.proxy_micro_batch_size = state.get("proxy_micro_batch_size")
            self._proxy_sized_for = state.get("proxy_sized_for", self._proxy_passes())

    def score(self, buffer: Candidates, step: int, judges: Tensor | None = None) -> Scores:
        """Scores of the whole buffer of n candidates, on the CPU and the same on every rank.

        Each data-parallel rank scores its contiguous share of the buffer (``even_share``). ``judges``: (b,) bool which
        of the step's proxy batch are scored beside the candidates, and have no part in the gradient; not all of them.
        """
        assert self._method is not None  # nothing is scored by method uniform
        count = len(buffer)
        buffer = self._with_judges(buffer, step, judges)
        share = buffer.take(self._rows(len(buffer)))
        if self.config.score_window != "first":
            share = Windowed(share, self.config.score_window, self._seed, step)

        def measured(run: Callable[[Mapping[str, Any]], Any]) -> Any:
            self._find_size(share, lambda: run(self._passes()))
            return run(self._passes())

        found = self._method.score(
            ScoringStep(
                config=self.config,
                backend=self.backend,
                seed=self._seed,
                step=step,
                buffer=buffer,
                share=share,
                judged=len(buffer) - count,
                average=self._average,
                estimator=self._estimator,
                measured=measured,
                proxy_gradient=self._proxy_gradient,
                once=self._once,
                **self._given | {"proxy": self._given["proxy"] and partial(self._batch, judges=judges)},
            )
        )
        found = _split(found, count, len(buffer))
        return replace(found, events=tuple(map(self._if_again, found.events)))

    def _if_again(self, event: Event) -> Event:
        """``event``, or another where an optimizer has no state for the second time: others have stepped by then."""
        if event.kind != "selection.fallback.no_optimizer_state":
            return event
        self._stateless += 1
        if self._stateless == 1:
            return event
        text = f"the optimizer has no state at the {self._stateless}th scoring either: it takes no step (is it the one"
        text += f" that trains, unwrapped?): {self.config.instead}"
        return Event("selection.fallback.optimizer_never_steps", text, scorings=self._stateless)

    def foresee(
        self, candidates: Candidates, scored: Tensor, step: int, judges: Tensor | None = None
    ) -> list[Candidates]:
        """Say, to read ahead, whose tokens this rank needs to score the candidates at positions ``scored`` (n,).

        ``judges``: as ``score`` takes them.
        """
        if not len(scored) or self._method is None or not (self._method.by_estimator or self._method.micro_batches):
            return []
        everyone = self._with_judges(candidates.take(scored), step, judges)
        found = [*_plain(everyone.take(self._rows(len(everyone))))]
        if self.config.needs_proxy and step % self.config.proxy_every == 0:
            batches = [partial(self._batch, judges=judges), self._given["pool"] if self.config.contrast else None]
            for batch in (as_candidates(each(step), step) for each in batches if each is not None):
                found.append(batch.take(self._rows(len(batch))))
        return found

    def _batch(self, step: int, judges: Tensor | None) -> Candidates:
        """The proxy batch of a step, without its judges."""
        batch = as_candidates(self._given["proxy"](step), step)
        return batch if judges is None else batch.take((~judges).nonzero().flatten())

    def _with_judges(self, candidates: Candidates, step: int, judges: Tensor | None) -> Candidates:
        """``candidates``, and after them those of the step's proxy batch of b that are ``judges``, (b,) bool."""
        if judges is None or not bool(judges.any()):
            return candidates
        return Together(candidates, as_candidates(self._given["proxy"](step), step).take(judges.nonzero().flatten()))

    def _rows(self, count: int) -> Tensor:
        """Of ``count`` sequences those that this data-parallel rank works on (m,)."""
        backend = self.backend
        return even_share(count, backend.world_size, backend.rank, backend.multiple // backend.world_size)[0]

    def _once(self, name: str, check: Callable[[], None]) -> None:
        if name not in self._checked:
            check()
            self._checked.add(name)

    def _passes(self) -> dict[str, Any]:
        return {"length": self.config.score_length, "micro_batch_size": self.micro_batch_size}

    def _proxy_passes(self) -> str:
        """Say what the passes of the proxy gradient depend on."""
        batches = 2 if self.config.contrast else 1
        return f"{batches} x {self.config.proxy_batch_size} sequences over {self.backend.world_size} ranks"

    def _proxy_gradient(self, proxy: Candidates, pool: Candidates | None) -> Gradient:
        """The gradient of ``proxy``, less that of ``pool``, in passes of a size that is found at the first."""
        backend, sized_for = self.backend, self._proxy_passes()

        def run(size: int | None) -> Gradient:
            passes: dict[str, Any] = {} if size is None else {"micro_batch_size": size}
            if pool is None:
                return backend.gradient(proxy, **passes)
            if hasattr(backend, "lends_gradient"):
                return backend.gradient(proxy, against=pool, **passes)
            gradient, other = backend.gradient(proxy, **passes), backend.gradient(pool, **passes)
            return {name: value - other[name] for name, value in gradient.items()}

        if self._finds_proxy and self._proxy_sized_for != sized_for:
            share = -(-len(proxy) // backend.world_size)
            most = most_per_pass(share, _tokens(proxy), backend.device.type)
            first = getattr(backend, "micro_batch_size", 1)
            given: dict[str, Any] = {"first": first, "what": "proxy"}
            found = find_micro_batch_size(run, most, backend.device, self._least, **given)
            self.proxy_micro_batch_size, note = found
            self._proxy_sized_for = sized_for
            self._notes.append(note)
        return run(self.proxy_micro_batch_size)

    def _find_size(self, share: Candidates, estimate: Callable[[], Any]) -> None:
        """Unless it is set or known, find the micro-batch size of the passes that ``estimate`` makes over ``share``."""
        config, device = self.config, self.backend.device
        sized_for = hashlib.sha256(f"{self.backend.world_size} {_settings(config)}".encode()).hexdigest()[:16]
        if config.score_micro_batch_size is not None or not self._sized or self._sized_for == sized_for:
            return

        def run(size: int) -> None:
            self.micro_batch_size = size
            estimate()

        most = most_per_pass(len(share), _tokens(share, config.score_length), device.type)
        self.micro_batch_size, note = find_micro_batch_size(run, most, device, self._least)
        self._sized_for = sized_for
        self._notes.append(note)

    def _least(self, value: int) -> int:
        """The smallest over all ranks of a number below 64: each votes for its own in one message."""
        votes = torch.zeros(64, dtype=torch.float64, device=self.backend.device)
        votes[value] = 1
        return int(self.backend.sum_over_ranks(votes[:0], votes)[1].nonzero()[0])


def _saves_launches(device: torch.device) -> bool:
    """Say whether there are launches to save by larger passes; else the backend's own size stands, to the last bit."""
    return device.type != "cpu"


def _tokens(candidates: Candidates, length: int | None = None) -> int:
    """Count the tokens of the first of them, cut to ``length``."""
    first = next(tensors_of(candidates.take(torch.arange(1)).batch(length)))
    return first.shape[1] if first.ndim > 1 else 1


def _plain(candidates: Candidates) -> Iterator[Candidates]:
    """Give those that it is made of, of which a reader of tokens knows where they lie."""
    if isinstance(candidates, Together):
        yield from (each for each in candidates.both if len(each))
    else:
        yield candidates


def _split(scores: Scores, count: int, total: int) -> Scores:
    """Make of the scores of ``total`` those of ``count`` candidates, and of the judges after them; leave out copies."""

    def first(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:count]

    found = replace(
        scores,
        utilities=first(scores.utilities),
        losses=first(scores.losses),
        gram=None if scores.gram is None else scores.gram[:count, :count],
        columns={name: values[:count] for name, values in scores.columns.items()},
    )
    if count == total or scores.utilities is None:
        return found
    losses = None if scores.losses is None else scores.losses[count:total]
    return replace(found, judged=Judged(scores.utilities[count:total], losses))


def _settings(config: SelectionConfig) -> str:
    """The settings that passes may depend on, in the words of version 0.1, so that its checkpoints keep their size."""
    # a check measures no candidates, groups are about picks, the proxy's passes are sized apart
    given = replace(config, check_every=0, groups=1, proxy_micro_batch_size=None, cadence="every")
    words = repr(given).replace(" groups=1,", "")
    words = words.replace(" proxy_micro_batch_size=None,", "").replace(" cadence='every',", "")
    if config.redundancy == 0 or config.gram_sketch == "per_layer":  # the one way that there was
        words = words.replace(f" gram_sketch={config.gram_sketch!r},", "")
    words = words.replace("text_features=[", "traits=[")
    return words.replace(f"proxy_half_life={config.proxy_half_life!r}", f"proxy_ema={config.proxy_decay!r}")
