"""Works out what failures leave of a long run: by closed forms, and by a simulation that knows more than they do."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

REPEATS = 12
"""Runs that a simulation takes the mean of."""
_NEVER = math.inf
_FEW = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Says what happens to a job, all in seconds."""

    mtbf: float
    """Mean time between failures of the whole job."""
    save: float
    """That training waits for a checkpoint."""
    restart: float
    """From a failure to the next update: found out, started again, read back."""
    lag: float = 0.0
    """After the wait, until a checkpoint that is written in the background is whole and counts."""
    straggler_mtbf: float = _NEVER
    """Mean time between spells in which one rank is slow, and all wait for it."""
    slowdown: float = 0.0
    """Share of the speed that is lost in a spell."""
    spell: float = 0.0
    """How long one lasts, if no failure ends it."""

    @property
    def straggling(self) -> float:
        """Mean share of the speed that spells take, where there are few of them."""
        if math.isinf(self.straggler_mtbf):
            return 0.0
        return self.slowdown * self.spell / (self.straggler_mtbf + self.spell)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Says what a simulated job came to: means over the repeats."""

    goodput: float
    """Seconds of work over seconds of the clock."""
    spread: float
    """Standard deviation of that between repeats."""
    failures: float
    lost: float
    """Share of the clock's seconds in work that was done again."""
    saving: float
    restarting: float


def best_interval(save: float, mtbf: float) -> tuple[float, float]:
    """Work between checkpoints that loses least, by Young's formula and by Daly's, in seconds.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", 1974: sqrt(2 save mtbf). J. T. Daly,
    "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, equation 37.
    """
    young = math.sqrt(2 * save * mtbf)
    if save >= 2 * mtbf:
        return young, mtbf
    ratio = math.sqrt(save / (2 * mtbf))
    return young, young * (1 + ratio / 3 + ratio**2 / 9) - save


def expected_goodput(interval: float, faults: Faults) -> float:
    """Goodput by Daly's complete model (2006, equation 20): exponential failures, in saving and restarting too.

    Neither stragglers nor checkpoints that become whole later are in it.
    """
    mtbf = faults.mtbf
    try:
        wall = mtbf * math.exp(faults.restart / mtbf) * math.expm1((interval + faults.save) / mtbf)
    except OverflowError:
        return 0.0
    return interval / wall


def simulate(work: float, interval: float, faults: Faults, seed: int = 0, repeats: int = REPEATS) -> Outcome:
    """Play a job of ``work`` seconds through ``repeats`` times, a checkpoint after each ``interval`` seconds of work.

    Failures and slow spells come at exponential times; both also while saving and restarting. A job that would take
    more than a hundred times its work is given up, and counts with what it had then.
    """
    jobs = [_Job(work, interval, faults, random.Random(f"{seed}:{number}")).play() for number in range(repeats)]
    goodputs = [job.saved / job.clock for job in jobs]

    def share(name: str) -> float:
        return statistics.fmean(getattr(job, name) / job.clock for job in jobs)

    return Outcome(
        goodput=statistics.fmean(goodputs),
        spread=statistics.stdev(goodputs) if repeats > 1 else 0.0,
        failures=statistics.fmean(job.failures for job in jobs),
        lost=share("lost"),
        saving=share("saving"),
        restarting=share("restarting"),
    )


def best_simulated(work: float, faults: Faults, seed: int = 0, repeats: int = REPEATS) -> tuple[float, Outcome]:
    """Find the interval of the highest goodput about Daly's, by simulation with the same failures for each.

    Daly's, where failures are so few that a simulation cannot tell.
    """
    about = best_interval(max(faults.save, 1e-3), faults.mtbf)[1] + faults.lag
    if (few := simulate(work, about, faults, seed, repeats)).failures < _FEW:
        return about, few
    tried = [about * 2 ** (power / 2) for power in range(-3, 4)]
    found = [(simulate(work, interval, faults, seed, repeats), interval) for interval in tried]
    outcome, interval = max(found, key=lambda each: each[0].goodput)
    return interval, outcome


def replay(work: float, interval: float, faults: Faults, gaps: Sequence[float]) -> float:
    """Seconds of a job that is killed so many seconds after each of its starts; none after those that are given."""
    left = iter([*gaps, *[_NEVER] * 2])
    job = _Job(work, interval, faults, random.Random(0), lambda mean: next(left))
    job.clock = faults.restart
    while job.failure < job.clock:  # before its first update
        job.start_again()
    return job.play().clock


class _Job:
    """Plays one job through."""

    def __init__(
        self,
        work: float,
        interval: float,
        faults: Faults,
        draw: random.Random,
        until_failure: Callable[[float], float] | None = None,
    ):
        self.work, self.interval, self.faults, self.draw = work, interval, faults, draw
        self.until_failure = until_failure or self._after
        self.clock = self.saved = self.lost = self.saving = self.restarting = 0.0
        self.failures = 0
        self.failure = self.until_failure(faults.mtbf)
        self.slow = self._after(faults.straggler_mtbf)
        self.slow_until = -1.0

    def play(self) -> _Job:
        """Go on from the last whole checkpoint until all is done."""
        end = 100 * self.work
        while self.saved < self.work and self.clock < end:
            if not self._runs_until_failure():
                return self
            self.start_again()
        return self

    def start_again(self) -> None:
        """Restart after a failure, as often as another one comes meanwhile."""
        self.slow_until = -1.0  # the slow rank is left out
        while True:
            self.failures += 1
            self.clock, self.failure = self.failure, self.failure + self.until_failure(self.faults.mtbf)
            up = self.clock + self.faults.restart
            self.restarting += min(up, self.failure) - self.clock
            if self.failure >= up:
                self.clock = up
                return

    def _runs_until_failure(self) -> bool:
        """Work and save until the next failure; True if that came before the end."""
        whole: list[tuple[float, float]] = []  # (when a checkpoint counts, the work in it)
        done = self._skipped(whole)
        while done < self.work:
            part = min(self.interval, self.work - done)
            finish = self._finish(part)
            if finish > self.failure:
                self._settle(whole, done + part * self._share(part, finish))
                return True
            done, self.clock = done + part, finish
            if done >= self.work:
                break
            saved_at = self.clock + self.faults.save
            if saved_at > self.failure:
                self.saving += self.failure - self.clock
                self._settle(whole, done)
                return True
            self.saving += self.faults.save
            self.clock = saved_at
            whole.append((saved_at + self.faults.lag, done))
        self.saved = self.work
        return False

    def _skipped(self, whole: list[tuple[float, float]]) -> float:
        """Pass at once over parts between which nothing happens; returns the work done then."""
        cycle = self.interval + self.faults.save
        room = min((self.failure - self.faults.lag - self.clock) / cycle, (self.work - self.saved) / self.interval) - 2
        if room < 1 or not math.isinf(self.faults.straggler_mtbf):
            return self.saved
        parts = int(room)
        self.clock += parts * cycle
        self.saving += parts * self.faults.save
        done = self.saved + parts * self.interval
        whole.append((self.clock + self.faults.lag, done))
        return done

    def _settle(self, whole: Sequence[tuple[float, float]], done: float) -> None:
        """Count what was lost at a failure: work after the newest checkpoint that was whole by then."""
        self.saved = max([self.saved, *(work for at, work in whole if at <= self.failure)])
        self.lost += done - self.saved

    def _share(self, part: float, finish: float) -> float:
        """Share of a part that was done when the failure came, as if its speed had been even."""
        return (self.failure - self.clock) / (finish - self.clock) if part else 0.0

    def _finish(self, part: float) -> float:
        """Find when ``part`` seconds of work that begin now will be done, spells of slowness between."""
        clock = self.clock
        while part > 1e-9:
            if clock < self.slow_until:
                speed, until = 1 - self.faults.slowdown, self.slow_until
            else:
                if self.slow <= clock:
                    self.slow_until = clock + self.faults.spell
                    self.slow = self.slow_until + self._after(self.faults.straggler_mtbf)
                    continue
                speed, until = 1.0, self.slow
            step = min(part / speed, until - clock)
            part, clock = part - step * speed, clock + step
        return clock

    def _after(self, mean: float) -> float:
        return _NEVER if math.isinf(mean) else self.draw.expovariate(1 / mean)


def of_job(one: Faults, gpus: int) -> Faults:
    """Make of the failures and spells of one GPU (with its share of node and network) those of a job of many."""
    return replace(one, mtbf=one.mtbf / gpus, straggler_mtbf=one.straggler_mtbf / gpus)
