"""Finds the fastest layouts of a run by prediction, and by timing the best few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megaopus.planning.calibration import Measured, fitted
from megaopus.planning.layouts import Candidate, Choice, Job, Layout, fastest
from megaopus.planning.machine import Machine

KINDS, MORE, ROUNDS = 4, 2, 3
"""Kinds of layouts that are timed first, the best of each; layouts of a round after that; such rounds at most."""
Timer = Callable[[Sequence[Candidate]], Mapping[Layout, Measured]]
"""Times some layouts; what failed is not in what it returns."""


@dataclass(slots=True)
class Search:
    """Holds what is known of the layouts of a job."""

    job: Job
    candidates: list[Candidate]
    machine: Machine
    measured: dict[Layout, Measured] = field(default_factory=dict)
    failed: set[Layout] = field(default_factory=set)

    def seconds(self, candidate: Candidate) -> float:
        """Seconds of a step, over the whole run: measured, or else predicted."""
        if (found := self.measured.get(candidate.layout)) is not None:
            return found.training_s + candidate.work.selecting * found.selection_s
        return candidate.work.seconds(self.machine)

    def best(self, count: int) -> tuple[list[Choice], int]:
        """Return what ``layouts.fastest`` does, without what failed."""
        left = [each for each in self.candidates if each.layout not in self.failed]
        return fastest(self.job, left, self.seconds, count)

    def rows(self) -> list[tuple[Candidate, Measured]]:
        """List what was measured."""
        return [(each, self.measured[each.layout]) for each in self.candidates if each.layout in self.measured]

    def measure(self, timer: Timer) -> None:
        """Time the best of each of a few kinds of layouts, fit the machine, and go on until the best is a timed one."""
        assumed = self.machine
        chosen = list(self._kinds())
        for _ in range(1 + ROUNDS):
            found = timer(chosen)
            self.measured |= found
            self.failed |= {each.layout for each in chosen} - found.keys()
            if not self.measured:
                return
            self.machine = fitted(assumed, [(each.work, measured) for each, measured in self.rows()])
            chosen = [each.candidate for each in self.best(MORE)[0] if each.candidate.layout not in self.measured]
            if not chosen:
                return

    def _kinds(self) -> Iterator[Candidate]:
        """Yield the best of each of the best few arrangements, and three that show what single things take.

        What a pass of a layer and a message take, whatever their sizes, shows in the smallest micro-batches: of the
        best arrangement, and of the one that sends most messages. What a parameter's update takes shows where one
        that shards its optimizer does without.
        """
        best: dict[tuple[int, ...], Candidate] = {}
        theirs: list[Candidate] = []
        for choice in self.best(len(self.candidates))[0]:
            kind = _kind(choice.candidate)
            if len(best) < KINDS:
                best.setdefault(kind, choice.candidate)
            if kind in best and not choice.candidate.layout.recompute:
                theirs.append(choice.candidate)
        chosen = list(best.values())
        if theirs:
            of_first = [each for each in theirs if _kind(each) == _kind(chosen[0])]
            chosen += [min(of_first, key=lambda each: each.layout.micro_batch_size), max(theirs, key=_messages)]
            twins = {replace(each.layout, distributed_optimizer=False) for each in best.values() if _is_sharded(each)}
            chosen += [each for each in theirs if each.layout in twins][:1]
        yield from {each.layout: each for each in chosen}.values()


def _kind(candidate: Candidate) -> tuple[int, ...]:
    """Name the arrangement of the ranks, whatever else a layout says."""
    layout = candidate.layout
    return layout.tp, layout.cp, layout.pp, layout.ep


def _is_sharded(candidate: Candidate) -> bool:
    return candidate.layout.distributed_optimizer


def _messages(candidate: Candidate) -> float:
    """Count the messages of a step's micro-batches."""
    return candidate.work.micro_batches * max(stage.messages for stage in candidate.work.stages)
