"""The slowest rank and the wait for data are named when they are out of the ordinary."""

from __future__ import annotations

from megaopus.training.straggler import StragglerDetector


def test_the_slowest_rank_and_the_wait_for_data() -> None:
    others = [(0.1, 2.0), (0.1, 2.1), (1.5, 2.0)]
    pace = StragglerDetector(2, lambda mine: [others[0], others[1], mine, others[2]])
    assert pace.step(1, 0.05, 1.5, 2.5) == []
    assert pace.step(2, 0.05, 1.5, 2.5) == [
        "rank 3 waits for data 30% of the time",
        "rank 2 is slow: 1.500 s of its own work an update, median 1.025",
    ]
    others = [(0.0, 2.0), (0.0, 2.1), (0.0, 2.0)]
    pace.step(3, 0.05, 1.0, 2.5)
    assert pace.step(4, 0.05, 1.0, 2.5) == []  # sums begin anew


def test_a_rank_alone_is_not_slow() -> None:
    assert StragglerDetector(1, lambda mine: [mine]).step(1, 0.0, 1.0, 1.0) == []
