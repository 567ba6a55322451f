"""The slowest rank and the wait for data are named when they are out of the ordinary; every second has one name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megaopus.engine.work_timer import WorkTimer
from megaopus.training.straggler import OWN_WORK, StragglerDetector
from megaopus.training.timers import Timers


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(timers: Timers, clock: Clock, number: int, data_s: float, own_s: float, all_s: float) -> None:
    """A step in which a rank waits for data, works, and waits for the others for the rest."""
    timers.step = number
    with timers("data"):
        clock.now += data_s
    with timers("train"):
        clock.now += all_s - data_s
    timers.book(OWN_WORK, own_s)


def test_the_slowest_rank_and_the_wait_for_data() -> None:
    others = [(0.1, 2.0), (0.1, 2.1), (1.5, 2.0)]
    stragglers = StragglerDetector(2, lambda mine: [others[0], others[1], mine, others[2]])
    timers = Timers(clock := Clock())
    step(timers, clock, 0, 0.05, 1.5, 2.5)
    assert stragglers.check(timers) == []
    step(timers, clock, 1, 0.05, 1.5, 2.5)
    waits, slow = stragglers.check(timers)
    assert str(waits) == "rank 3 waits for data 30% of the time"
    assert str(slow) == "rank 2 is slow: 1.500 s of its own work an update, median 1.025"
    assert (waits.kind, waits.facts) == ("data.wait", {"rank": 3, "share": pytest.approx(0.3)})
    facts = {"rank": 2, "own_s": pytest.approx(1.5), "median_s": pytest.approx(1.025)}
    assert (slow.kind, slow.facts) == ("rank.slow", facts)
    others = [(0.0, 2.0), (0.0, 2.1), (0.0, 2.0)]
    for number in (2, 3):
        step(timers, clock, number, 0.05, 1.0, 2.5)
        assert stragglers.check(timers) == []  # sums begin anew


def test_a_rank_alone_is_not_slow() -> None:
    timers = Timers(clock := Clock())
    step(timers, clock, 0, 0.0, 1.0, 1.0)
    assert StragglerDetector(1, lambda mine: [mine]).check(timers) == []


def test_a_wait_inside_a_phase_is_not_the_phases() -> None:
    timers = Timers(clock := Clock())
    with timers("train"):
        clock.now += 1.0
        with timers("data"):
            assert timers.phase == "data"
            clock.now += 0.25
        changes = timers.changes
        clock.now += 2.0
        assert (timers.phase, timers.clock() - timers.since, timers.changes) == ("train", 2.0, changes)
    assert (timers.seconds("train"), timers.seconds("data"), timers.seconds("data", "train")) == (3.0, 0.25, 3.25)


def test_a_phase_that_fails_ends() -> None:
    def failing() -> Iterator[None]:
        with timers("select"):
            clock.now += 1.0
            yield
            raise ValueError

    timers = Timers(clock := Clock())
    with pytest.raises(ValueError):  # noqa: PT011
        list(failing())
    assert (timers.phase, timers.seconds("select")) == ("start", 1.0)


def test_own_work_is_without_waits_for_data() -> None:
    timers = Timers(clock := Clock())
    work = WorkTimer(True, clock, lambda: timers.seconds("data"))
    work.start()
    clock.now += 50.0
    work.reset()
    work.stop()  # none was begun since
    for _ in range(2):
        work.start()
        clock.now += 1.0
        with timers("data"):
            clock.now += 10.0
        work.stop()
        clock.now += 100.0  # waits for others
    assert work.seconds() == 2.0
