"""The loop: candidates -> selection -> update -> record -> checkpoint. ``step`` is the only cursor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from megaopus.engine.base import Engine, StepResult
from megaopus.errors import EngineError
from megaopus.record.types import Choices, SelectionRecord, StepRecord, ValidationRecord
from megaopus.selection.backend import Candidates, Gradient
from megaopus.training.spike_guard import SpikeGuard
from megaopus.training.straggler import StragglerDetector


class Buffer(Candidates, Protocol):
    """Candidates that know their sequences and domains."""

    sequence_ids: np.ndarray

    @property
    def domains(self) -> np.ndarray: ...

    @property
    def domain_names(self) -> list[str]: ...

    def take(self, indices: Tensor) -> Buffer: ...

    def share(self) -> dict[str, float]: ...


class Stream(Protocol):
    def at(self, step: int) -> Buffer: ...


class RedundancyLike(Protocol):
    """``megaopus.selection.selector.Redundancy``."""

    squared_norms: Tensor
    positions: Tensor
    overlaps: Tensor


class Selected(Protocol):
    """What a selector returns (``megaopus.selection.Selection``)."""

    indices: Tensor
    utilities: Tensor | None
    scored: Tensor | None
    standing: Tensor | None
    exposures: Tensor | None
    redundancy: RedundancyLike | None
    probabilities: Tensor
    correlation: float | None
    method: str
    ess: float
    max_p_ratio: float
    events: list[str]
    notes: list[str]

    @property
    def predicted_fall(self) -> float: ...

    @property
    def uniform_fall(self) -> float: ...


class SelectorLike(Protocol):
    def select(self, candidates: Any, step: int) -> Any: ...

    def check_due(self, selection: Any) -> bool: ...

    def proxy_loss(self, step: int) -> float: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MonitorLike(Protocol):
    def step(self, record: StepRecord, selection: SelectionRecord | None) -> None: ...

    def validation(self, record: ValidationRecord) -> None: ...

    def event(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def flush(self) -> None: ...


class Saved(Protocol):
    """A checkpoint to go on from (``megaopus.checkpoint.checkpointer.Checkpoint``)."""

    @property
    def state(self) -> dict[str, Any]: ...

    @property
    def step(self) -> int: ...


class CheckpointerLike(Protocol):
    def due(self, step: int) -> bool: ...

    def save(
        self, step: int, engine: Any, groups: dict[str, Gradient], state: dict[str, Any], *, wait: bool = True
    ) -> None: ...

    def poll(self) -> None: ...

    def finish(self) -> None: ...

    def last(self) -> Path | None: ...

    def load(self, checkpoint: Any, engine: Any) -> dict[str, Gradient]: ...


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A run, put together (``megaopus.build`` does it). Every rank has one and calls the same methods."""

    engine: Engine
    stream: Stream
    selector: SelectorLike
    checkpointer: CheckpointerLike
    validation: Mapping[str, Buffer]
    """Sequences of each domain to validate on."""
    wanted: list[str]
    """Domains whose mean is the headline validation loss."""
    guard: SpikeGuard
    """Which updates are skipped."""
    max_skipped: int
    """Skipped updates in a row after which the run stops."""
    pace: StragglerDetector
    """Which rank is slow."""
    stop_requested: Callable[[], str | None]
    """The reason to stop, the same on every rank, or None."""
    identity: dict[str, Any]
    """What a checkpoint must share with the run that loads it."""
    config: dict[str, Any]
    """Every setting as plain values; kept in checkpoints, so that a resumed run can say what was changed."""
    total_steps: int
    tokens_per_step: int
    eval_every: int
    phase: Callable[[str, int], AbstractContextManager[None]] = lambda name, step: nullcontext()
    """(name, update): around what a rank does, so that a hang can be told."""
    time_s: float = 0.0
    updated: bool = False
    """Some update has been applied. Until then the run is what it was at the start, and there is nothing to save."""

    def restore(self, checkpoint: Saved) -> None:
        """Go on from a checkpoint."""
        state = checkpoint.state
        groups = self.checkpointer.load(checkpoint, self.engine)
        self.engine.step = checkpoint.step
        self.updated = True
        self.time_s = state["time_s"]
        self.selector.load_state_dict({**state["selector"], **groups})
        self.guard.load_state_dict(state["guard"])

    def run(self, monitor: MonitorLike) -> str | None:
        """Train from ``engine.step`` to ``total_steps``; returns the reason if stopped before, None when done.

        A request to stop is noticed before each update and before each domain of a validation.
        """
        while True:
            if self._validation_due() and (reason := self._validate(monitor)):
                break
            if self.engine.step >= self.total_steps:
                reason = None
                break
            if reason := self.stop_requested():
                break
            self.update(monitor)
            if self.guard.skipped >= self.max_skipped:
                self._give_up()
            self.checkpointer.poll()
            if self.checkpointer.due(self.engine.step):
                self._save(monitor, wait=False)
        if reason:
            monitor.note(f"{reason}: stopping after {self.engine.step} updates")
        self._save(monitor, wait=True)
        return reason

    def update(self, monitor: MonitorLike) -> None:
        """One step: candidates, selection, training, record. As validation, a check of the selection is not timed."""
        step = self.engine.step
        start = time.perf_counter()
        candidates = self.stream.at(step)
        scoring = time.perf_counter()
        with self.phase("score", step):
            selection = self.selector.select(candidates, step)
            selected = time.perf_counter()
            check = self.selector.check_due(selection)
            before = self.selector.proxy_loss(step) if check else 0.0
        training = time.perf_counter()
        with self.phase("train", step):
            picked = candidates.take(selection.indices)
            result = self.engine.train_step(picked, self.guard.limit())
        now = time.perf_counter()
        seconds = selected - start + now - training
        self.time_s += seconds
        self.updated |= result.applied
        falls = {}
        if check and result.applied:
            falls = {
                "predicted_fall": selection.predicted_fall,
                "uniform_fall": selection.uniform_fall,
                "realised_fall": before - self.selector.proxy_loss(step),
            }
        for event in selection.events:
            monitor.event(event)
        for line in self.pace.step(step + 1, scoring - start, result.own_s, now - start):
            monitor.event(line)
        for note in selection.notes:
            monitor.note(note)
        if reason := self.guard.record(result):
            monitor.event(f"step {step}: {reason}, update skipped; ids {picked.ids.tolist()}")
        monitor.step(
            self._step_record(step, result, seconds, selected - scoring),
            replace(_selection_record(step, candidates, picked, selection), **falls),
        )

    def _step_record(self, step: int, result: StepResult, seconds: float, select_seconds: float) -> StepRecord:
        return StepRecord(
            step=step,
            tokens=(step + 1) * self.tokens_per_step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            time_s=self.time_s,
            step_s=seconds,
            select_s=select_seconds,
            skipped=not result.applied,
        )

    def _validation_due(self) -> bool:
        step = self.engine.step
        return step >= self.total_steps or (self.eval_every > 0 and step % self.eval_every == 0)

    def _validate(self, monitor: MonitorLike) -> str | None:
        """Validate and record it; a reason to stop cuts it short, and is returned."""
        losses = {}
        for domain, buffer in self.validation.items():
            if reason := self.stop_requested():
                return reason
            with self.phase("evaluate", self.engine.step):
                losses[domain] = float(self.engine.evaluate(buffer).mean())
        step = self.engine.step
        monitor.validation(
            ValidationRecord(
                step=step,
                tokens=step * self.tokens_per_step,
                time_s=self.time_s,
                loss=sum(losses[domain] for domain in self.wanted) / len(self.wanted),
                domains=losses,
            )
        )
        return None

    def _give_up(self) -> None:
        self.checkpointer.finish()
        last = self.checkpointer.last()
        raise EngineError(
            f"{self.guard.skipped} updates in a row were skipped, the last of them {self.engine.step}; "
            f"last good checkpoint: {last or 'none'}. metrics.jsonl has losses and gradient norms, choices/ the ids of "
            "their batches. A lower learning rate, more warm-up or other data may help (resume_allow), or a larger "
            "train.spike_factor if the gradients are as they should be"
        )

    def _save(self, monitor: MonitorLike, *, wait: bool) -> None:
        if not self.updated:
            return
        monitor.flush()
        groups, plain = split_state(self.selector.state_dict())
        state = {
            "time_s": self.time_s,
            "selector": plain,
            "guard": self.guard.state_dict(),
            "identity": self.identity,
            "config": self.config,
        }
        with self.phase("save", self.engine.step):
            self.checkpointer.save(self.engine.step, self.engine, groups, state, wait=wait)


def split_state(state: dict[str, Any]) -> tuple[dict[str, Gradient], dict[str, Any]]:
    """A selector's state as (groups of parameter-shaped tensors, plain values)."""
    groups = {
        key: value
        for key, value in state.items()
        if isinstance(value, dict) and all(isinstance(item, Tensor) for item in value.values())
    }
    return groups, {key: value for key, value in state.items() if key not in groups}


def _selection_record(step: int, candidates: Buffer, picked: Buffer, selection: Selected) -> SelectionRecord:
    return SelectionRecord(
        step=step,
        method=selection.method,
        candidates=len(candidates),
        picked=len(picked),
        correlation=selection.correlation,
        share=picked.share(),
        pool_share=candidates.share(),
        ess=selection.ess,
        max_p_ratio=selection.max_p_ratio,
        events=selection.events,
        choices=_choices(candidates, selection),
    )


def _choices(candidates: Buffer, selection: Selected) -> Choices:
    def array(values: Tensor | None) -> np.ndarray | None:
        return None if values is None else values.numpy()

    redundancy = selection.redundancy
    picked = np.zeros(len(candidates), dtype=bool)
    picked[selection.indices.numpy()] = True
    return Choices(
        ids=candidates.ids.numpy(),
        sequences=candidates.sequence_ids,
        domains=candidates.domains,
        domain_names=candidates.domain_names,
        picked=picked,
        probabilities=selection.probabilities.numpy(),
        utilities=array(selection.utilities),
        scored=array(selection.scored),
        standing=array(selection.standing),
        exposures=array(selection.exposures),
        squared_norms=None if redundancy is None else redundancy.squared_norms.numpy(),
        chosen=None if redundancy is None else redundancy.positions.numpy(),
        overlaps=None if redundancy is None else redundancy.overlaps.numpy(),
    )
