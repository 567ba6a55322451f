"""Runs the loop: candidates, selection, update, record, checkpoint. ``engine.step`` is its only cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

from megaopus.checkpoint.checkpointer import Checkpoint, Checkpointer, split_groups
from megaopus.data.candidates import CandidateBuffer, CandidateStream
from megaopus.data.read_ahead import Reads, TokenReader
from megaopus.engine.base import Engine
from megaopus.errors import StoreDownError
from megaopus.record.recorder import Recorder
from megaopus.record.types import TasksRecord
from megaopus.selection import Selector
from megaopus.training.records import selection_record, step_record, validation_record
from megaopus.training.signals import time_to_save
from megaopus.training.spike_guard import SpikeGuard
from megaopus.training.step_profiler import StepProfiler
from megaopus.training.straggler import OWN_WORK, StragglerDetector
from megaopus.training.timers import Timers

TIMED = ("data", "select", "train")
"""Phases that count as the time of a run."""


class TaskScoring(Protocol):
    """Scores the model that is being trained on benchmarks (``evaluation.during.DuringTraining``)."""

    every: int
    """Steps from one scoring to the next."""

    @property
    def names(self) -> list[str]:
        """Tasks, each of which is scored by itself."""

    def score(self, name: str, advance: Callable[[int], None]) -> Any:
        """Score one; ``advance`` is told how many requests are answered. Collective."""

    def keep(self, step: int, scored: list[Any]) -> list[dict[str, Any]]:
        """Write the items of all, and return the rows of a table."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Trains a run that ``megaopus.build`` has put together. Every rank has one and calls the same methods."""

    engine: Engine
    stream: CandidateStream
    reader: TokenReader
    selector: Selector
    checkpointer: Checkpointer
    validation: Mapping[str, CandidateBuffer]  # by domain
    held_out: Mapping[str, CandidateBuffer]  # by part of the held-out target, the headline where there is one
    wanted: list[str]  # domains of the headline without that; none: all
    guard: SpikeGuard
    stragglers: StragglerDetector
    timers: Timers
    stop_requested: Callable[[], str | None]  # the reason to stop, the same on every rank
    ask_to_stop: Callable[[str], None]
    remote: bool  # tokens are in an object store, which may be away
    identity: dict[str, Any]  # what a checkpoint must share with the run that loads it
    config: dict[str, Any]  # every setting; kept in checkpoints, so that a resumed run can say what was changed
    total_steps: int
    tokens_per_step: int
    eval_every: int
    tasks: TaskScoring | None  # None: the run is scored on no benchmark
    profiler: StepProfiler
    layer_grad_norm_every: int  # steps from one that records the norm of each layer's gradient to the next; 0: none
    time_s: float = 0.0
    updated: bool = False
    """Some update has been applied. Until then the run is what it was at the start, and there is nothing to save."""
    stop_asked: bool | None = None
    """Tells whether a rank had been asked to stop at the last update; None: not known, or much time went by since."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        state, groups = checkpoint.state, self.checkpointer.load(checkpoint, self.engine)
        self.engine.step, self.updated, self.time_s = checkpoint.step, True, state["time_s"]
        self.selector.load_state_dict({**state["selector"], **groups})
        self.guard.load_state_dict(state["guard"])

    def run(self, recorder: Recorder) -> str | None:
        """Train from ``engine.step`` to ``total_steps``; returns the reason if stopped before, None when done.

        A request to stop is noticed before each update and before each domain of a validation; one that comes once
        the gradients of an update are there, after the next.
        """
        reason: str | None = None
        while True:
            self.timers.step = step = self.engine.step
            last = step >= self.total_steps
            if self.tasks is not None and (last or step % self.tasks.every == 0):
                reason = self._score(recorder, self.tasks)
            if not reason and (last or (self.eval_every > 0 and step % self.eval_every == 0)):
                # after the last step the end of all: by it a run is known as finished
                reason = self._validate(recorder)
            if reason or last or (reason := self._stop_reason()):
                break
            with self.profiler.step(step):
                self.update(recorder)
            if self.guard.exhausted:
                self.checkpointer.finish()
                raise self.guard.give_up(self.engine.step, self.checkpointer.last())
            self.checkpointer.poll()
            if self.checkpointer.due(self.engine.step):
                self._save(recorder, wait=False)
        if reason:
            recorder.note(f"{reason}: stopping after {self.engine.step} updates{time_to_save()}")
        self._save(recorder, wait=True)
        if reason:
            saved = self.checkpointer.last() if self.updated else None
            recorder.note(f"saved {saved}: the same command goes on" if saved else "no update made: nothing to save")
        return reason

    def update(self, recorder: Recorder) -> None:
        """Make one step: candidates, selection, training, record. Checks of the selection do not count as its time."""
        step, timers, realised_fall = self.engine.step, self.timers, None
        timers.step, before, select_s = step, timers.seconds(*TIMED), timers.seconds("select")
        with timers("data"):
            self.reader.begin(step)
            candidates = self.stream.at(step)
        with timers("select"):
            selection = self.selector.select(candidates, step)
            picked = candidates.take(selection.indices)
        if check := self.selector.check_due(selection):
            with timers("check"):
                proxy_loss = self.selector.proxy_loss(step)
        with timers("train"):
            self.reader.ahead(step, lambda: [self._share(picked)])
            if step + 1 < self.total_steps:
                self.reader.ahead(step + 1, partial(self._foreseen, step + 1))
            every = self.layer_grad_norm_every
            asked = {"layer_grad_norms": True} if every > 0 and step % every == 0 else {}
            result = self.engine.train_step(picked, self.guard.limit(), **asked)
        step_s = timers.seconds(*TIMED) - before
        timers.book(OWN_WORK, result.own_s)
        self.time_s, self.updated = self.time_s + step_s, self.updated or result.applied
        self.stop_asked = result.stop_asked
        if check and result.applied:
            with timers("check"):
                realised_fall = proxy_loss - self.selector.proxy_loss(step)
        skipped = self.guard.record(result, step, picked.ids.tolist())
        for note in selection.notes:
            recorder.note(note)
        times = {"time_s": self.time_s, "step_s": step_s, "select_s": timers.seconds("select") - select_s}
        tokens = (step + 1) * self.tokens_per_step
        recorder.step(
            step_record(result, skipped, step=step, tokens=tokens, matrix_lr=self.engine.matrix_lr(), **times),
            selection_record(candidates, picked, selection, realised_fall),
            [*skipped, *self.stragglers.check(timers)],
        )

    def _stop_reason(self) -> str | None:
        """Find the reason to stop, the same on every rank; in a message of its own unless the last update told."""
        if self.remote:
            self._bring(self._foreseen(self.engine.step))
            self.stop_asked = None
        return None if self.stop_asked is False else self.stop_requested()

    def _bring(self, reads: Iterable[Reads]) -> None:
        """Have tokens brought from an object store; where it does not answer, ask to stop while all can still save."""
        try:
            with self.timers("data"):
                for sequences, numbers in reads:
                    sequences.read(numbers)
        except StoreDownError as error:
            self.ask_to_stop(str(error))

    def _foreseen(self, step: int) -> Iterator[Reads]:
        """Tell the reader, in its thread, which tokens this rank will probably ask for at ``step``."""
        candidates = self.stream.at(step)
        reads, picks = self.selector.foresee(candidates, step)
        yield from (cast(CandidateBuffer, each).reads for each in reads)
        if len(picks):
            yield self._share(candidates.take(picks))

    def _share(self, picked: CandidateBuffer) -> Reads:
        return picked.take(self.engine.training_rows(len(picked))).reads

    def _validate(self, recorder: Recorder) -> str | None:
        """Validate and record it; a reason to stop cuts it short, and is returned."""
        step, found, self.stop_asked = self.engine.step, [], None
        for buffers in (self.held_out, self.validation):
            losses = {}
            for name, buffer in buffers.items():
                if self.remote:
                    self._bring([buffer.reads])
                if reason := self.stop_requested():
                    return reason
                with self.timers("evaluate"):
                    losses[name] = float(self.engine.evaluate(buffer).mean())
            found.append(losses)
        held_out, domains = found
        target = held_out or {name: domains[name] for name in self.wanted}
        recorder.validation(
            validation_record(target, domains, step=step, tokens=step * self.tokens_per_step, time_s=self.time_s)
        )
        return None

    def _score(self, recorder: Recorder, tasks: TaskScoring) -> str | None:
        """Score the model on benchmarks and record it; a reason to stop cuts it short, and is returned."""
        step, scored, self.stop_asked = self.engine.step, [], None
        for name in tasks.names:
            if reason := self.stop_requested():
                return reason
            with self.timers("evaluate"):
                scored.append(tasks.score(name, self._progressed))
        rows = tasks.keep(step, scored)
        recorder.tasks(TasksRecord(step=step, tokens=step * self.tokens_per_step, time_s=self.time_s, rows=rows))
        return None

    def _progressed(self, requests: int) -> None:
        """Let it be seen, by who looks for a hang, that answers come."""
        with self.timers("evaluate"):
            pass

    def _save(self, recorder: Recorder, *, wait: bool) -> None:
        if not self.updated:
            return
        recorder.flush()
        groups, plain = split_groups(self.selector.state_dict())
        state = {"time_s": self.time_s, "selector": plain, "guard": self.guard.state_dict()}
        state |= {"identity": self.identity, "config": self.config}
        self.stop_asked = None
        with self.timers("save"):
            self.checkpointer.save(self.engine.step, self.engine, groups, state, wait=wait)
