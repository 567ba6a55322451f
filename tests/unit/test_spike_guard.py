"""Updates are skipped by the stated rule."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megaopus.engine.base import StepResult
from megaopus.training.spike_guard import SpikeGuard


def outcome(norm: float, guard: SpikeGuard, loss: float = 1.0) -> StepResult:
    """Return what an engine makes of a gradient of this norm."""
    applied = math.isfinite(loss) and math.isfinite(norm) and norm <= guard.limit()
    return StepResult(loss=loss, grad_norm=norm, lr=1.0, applied=applied)


def said(guard: SpikeGuard, result: StepResult) -> str | None:
    """The reason for which an update was skipped."""
    events = guard.record(result, 3, [7, 9])
    assert [event.kind.startswith("update.skipped.") for event in events] == ([] if result.applied else [True])
    return events[0].facts["reason"] if events else None


def test_a_spike_is_measured_against_the_median_of_what_was_applied() -> None:
    guard = SpikeGuard(10.0, window=8, clipped=True)
    assert said(guard, outcome(1e9, guard)) is None  # the first quarter of a window is taken as it comes
    assert guard.limit() == math.inf
    for norm in (1.0, 3.0, 2.0):
        said(guard, outcome(norm, guard))
    assert guard.limit() == 25.0  # the median of 1e9, 1, 3, 2 is 2.5
    assert said(guard, outcome(25.1, guard)) == "gradient norm 25.1 above 25 (10 times the median)"
    assert guard.limit() == 25.0
    assert said(guard, outcome(25.0, guard)) is None
    for _ in range(8):
        said(guard, outcome(0.1, guard))
    assert guard.limit() == 1.0


def test_spikes_in_a_row_are_the_weights_doing() -> None:
    guard, bare = SpikeGuard(10.0, window=8, clipped=True), SpikeGuard(10.0, window=8, clipped=False)
    for each in (guard, bare):
        for norm in (1.0, 1.0, 50.0, 1.0, 50.0, math.nan, 50.0):  # those that are skipped twice at most
            said(each, outcome(norm, each))
        assert (each.skipped, each.limit()) == (3, 10.0)
    reason = said(guard, outcome(60.0, guard))
    assert reason is not None
    assert reason.startswith("gradient norm 60 above 10 (10 times the median), 3 in a row: ")
    assert "in a row" not in str(said(bare, outcome(60.0, bare)))
    assert said(bare, outcome(60.0, bare)) is not None
    assert (bare.skipped, guard.limit()) == (5, math.inf)
    assert said(guard, outcome(60.0, guard)) is None
    assert guard.skipped == 0
    said(guard, outcome(40.0, guard))
    assert guard.limit() == 500.0
    for _ in range(2):  # it takes three again
        assert said(guard, outcome(501.0, guard)) is not None
    assert guard.limit() == 500.0


def test_what_is_not_finite() -> None:
    guard = SpikeGuard(10.0, window=8, clipped=True)
    assert said(guard, outcome(1.0, guard, loss=math.nan)) == "loss not finite"
    assert said(guard, outcome(math.nan, guard)) == "gradient not finite"
    assert said(guard, outcome(math.inf, guard)) == "gradient not finite"
    assert guard.skipped == 3
    assert said(guard, outcome(1.0, guard)) is None
    assert guard.skipped == 0


def test_the_event_tells_the_batch_and_the_kind_of_reason() -> None:
    guard = SpikeGuard(10.0, window=4, clipped=True)
    said(guard, outcome(1.0, guard))
    kinds = []
    for result in (outcome(11.0, guard), outcome(math.nan, guard), outcome(1.0, guard, loss=math.inf)):
        (event,) = guard.record(result, 3, [7, 9])
        kinds.append(event.kind)
        assert str(event) == f"step 3: {event.facts['reason']}, update skipped; ids [7, 9]"
        assert (event.facts["step"], event.facts["ids"]) == (3, [7, 9])
    assert kinds == [
        "update.skipped.spike",
        "update.skipped.gradient_not_finite",
        "update.skipped.loss_not_finite",
    ]


def test_it_says_when_the_run_should_stop(tmp_path: Path) -> None:
    guard = SpikeGuard(10.0, window=4, clipped=True, max_skipped=2)
    said(guard, outcome(math.nan, guard))
    assert not guard.exhausted
    said(guard, outcome(math.nan, guard))
    assert guard.exhausted
    assert f"2 updates in a row were skipped, the last of them 9; last good checkpoint: {tmp_path}." in str(
        guard.give_up(9, tmp_path)
    )


def test_it_can_be_switched_off() -> None:
    guard = SpikeGuard(0.0, window=2, clipped=True)
    for _ in range(4):
        said(guard, outcome(1.0, guard))
    assert guard.limit() == math.inf


def test_it_goes_on_to_the_last_bit() -> None:
    guard, again = SpikeGuard(3.0, window=4, clipped=True), SpikeGuard(3.0, window=4, clipped=True)
    for norm in (0.1, 1 / 3, 2 / 7, 1e-30, 5.0, math.nan):
        said(guard, outcome(norm, guard))
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (again.limit(), again.skipped, again.state_dict()) == (guard.limit(), 2, guard.state_dict())
