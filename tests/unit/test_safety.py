"""Which updates are skipped, by the stated rule."""

from __future__ import annotations

import json
import math

from megaopus.engine.base import StepResult
from megaopus.training.spike_guard import SpikeGuard


def outcome(norm: float, guard: SpikeGuard, loss: float = 1.0) -> StepResult:
    """What an engine makes of a gradient of this norm."""
    applied = math.isfinite(loss) and math.isfinite(norm) and norm <= guard.limit()
    return StepResult(loss=loss, grad_norm=norm, lr=1.0, applied=applied)


def test_a_spike_is_measured_against_the_median_of_what_was_applied() -> None:
    guard = SpikeGuard(10.0, window=8, clipped=True)
    assert guard.record(outcome(1e9, guard)) is None  # the first quarter of a window is taken as it comes
    assert guard.limit() == math.inf
    for norm in (1.0, 3.0, 2.0):
        guard.record(outcome(norm, guard))
    assert guard.limit() == 25.0  # the median of 1e9, 1, 3, 2 is 2.5
    assert guard.record(outcome(25.1, guard)) == "gradient norm 25.1 above 25 (10 times the median)"
    assert guard.limit() == 25.0
    assert guard.record(outcome(25.0, guard)) is None
    for _ in range(8):
        guard.record(outcome(0.1, guard))
    assert guard.limit() == 1.0


def test_spikes_in_a_row_are_the_weights_doing() -> None:
    guard, bare = SpikeGuard(10.0, window=8, clipped=True), SpikeGuard(10.0, window=8, clipped=False)
    for each in (guard, bare):
        for norm in (1.0, 1.0, 50.0, 1.0, 50.0, math.nan, 50.0):  # those that are skipped twice at most
            each.record(outcome(norm, each))
        assert (each.skipped, each.limit()) == (3, 10.0)
    said = guard.record(outcome(60.0, guard))
    assert said is not None
    assert said.startswith("gradient norm 60 above 10 (10 times the median), 3 in a row: ")
    assert "in a row" not in str(bare.record(outcome(60.0, bare)))
    assert bare.record(outcome(60.0, bare)) is not None
    assert (bare.skipped, guard.limit()) == (5, math.inf)
    assert guard.record(outcome(60.0, guard)) is None
    assert guard.skipped == 0
    guard.record(outcome(40.0, guard))
    assert guard.limit() == 500.0
    for _ in range(2):  # it takes three again
        assert guard.record(outcome(501.0, guard)) is not None
    assert guard.limit() == 500.0


def test_what_is_not_finite() -> None:
    guard = SpikeGuard(10.0, window=8, clipped=True)
    assert guard.record(outcome(1.0, guard, loss=math.nan)) == "loss not finite"
    assert guard.record(outcome(math.nan, guard)) == "gradient not finite"
    assert guard.record(outcome(math.inf, guard)) == "gradient not finite"
    assert guard.skipped == 3
    assert guard.record(outcome(1.0, guard)) is None
    assert guard.skipped == 0


def test_it_can_be_switched_off() -> None:
    guard = SpikeGuard(0.0, window=2, clipped=True)
    for _ in range(4):
        guard.record(outcome(1.0, guard))
    assert guard.limit() == math.inf


def test_it_goes_on_to_the_last_bit() -> None:
    guard, again = SpikeGuard(3.0, window=4, clipped=True), SpikeGuard(3.0, window=4, clipped=True)
    for norm in (0.1, 1 / 3, 2 / 7, 1e-30, 5.0, math.nan):
        guard.record(outcome(norm, guard))
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (again.limit(), again.skipped, again.state_dict()) == (guard.limit(), 2, guard.state_dict())
