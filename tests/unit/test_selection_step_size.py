"""The step of directional scoring: so many nats whatever the learning rate, as far as curvature allows, and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megaopus.selection import ModuleBackend, SelectionConfig, Selector, TensorCandidates
from megaopus.selection.estimators.exact import exact_utilities
from megaopus.selection.estimators.step_size import NATS, PERIOD, StepJudge, judge, nearest_power, step_size
from tests.exact.estimators_toy import spearman
from tests.unit.selection_net import UNGUARDED, batch, make, make_backend, proxy

COUNT = 64
SLOPES = torch.randn(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def differences(cubic: float = 0.0, noise: float = 0.0) -> Callable[[int], Tensor]:
    """(COUNT,) differences over 2^level: slopes, a cubic term of ``cubic`` times them, noise drawn for each level."""
    other = torch.randn(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def measured(level: int) -> Tensor:
        drawn = torch.randn(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + level))
        step = 2.0**level
        return SLOPES * step + other * cubic * step**3 + noise * drawn

    return measured


@pytest.mark.parametrize("sides", ["central", "one"])
def test_a_step_that_halves_well_stays_and_its_rounding_is_measured(sides: str) -> None:
    """Halves of a central difference have errors of their own; those of a one-sided one share the loss before."""
    before = torch.randn(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def one_sided(level: int) -> Tensor:
        after = torch.randn(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(200 + level))
        return SLOPES * 2.0**level + 0.01 * (before - after) / 2**0.5

    found = judge(differences(noise=0.01) if sides == "central" else one_sided, sides, search=True)
    assert found is not None
    assert found.level == 0
    assert found.error == pytest.approx(0.01, rel=0.25)


def test_a_step_goes_down_where_curvature_spoils_it_and_up_where_rounding_does() -> None:
    bent = judge(differences(cubic=4.0), "central", search=True)
    drowned = judge(differences(noise=0.5), "central", search=True)
    assert bent is not None
    assert drowned is not None
    assert bent.level == -3  # where the cubic term is a sixteenth of the slope
    assert drowned.level == 4
    both = judge(differences(cubic=0.3, noise=0.3), "central", search=True)  # nothing is good: what is best
    assert both is not None
    assert abs(both.level) <= 1


def test_a_step_that_the_settings_name_is_judged_where_it_is() -> None:
    for measured in (differences(cubic=4.0), differences(noise=0.5)):
        found = judge(measured, "central", search=False)
        assert found is not None
        assert found.level == 0
        assert found.error > 0.4


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_nothing_is_told_of_equal_or_unknown_differences(value: float) -> None:
    assert judge(lambda level: torch.full((COUNT,), value, dtype=torch.float64), "central", search=True) is None


def test_candidates_without_a_finite_loss_are_left_out() -> None:
    def measured(level: int) -> Tensor:
        return torch.cat([differences(noise=0.01)(level), torch.tensor([math.nan, math.inf])])

    found = judge(measured, "central", search=True)
    assert found is not None
    assert (found.level, found.error) == (0, pytest.approx(0.01, rel=0.25))


# -- in nats -----------------------------------------------------------------------------------------------------------


def test_the_step_is_a_power_of_two_and_follows_the_learning_rate() -> None:
    backend = make_backend()
    gradient = backend.gradient(TensorCandidates(proxy(0)))
    found = []
    for _ in range(2):
        direction = backend.operator().apply(gradient)
        change = sum(float((direction[name].double() * value).sum()) for name, value in gradient.items())
        found.append(step_size(backend, direction, gradient))
        assert math.log2(found[-1]).is_integer()
        assert 2**-0.5 <= found[-1] * change / NATS[False] <= 2**0.5
        assert step_size(backend, direction, gradient, level=-3) == found[-1] / 8
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert 2**-0.5 <= step_size(backend, direction, gradient) * change / NATS[True] <= 2**0.5
        backend.optimizers[0].param_groups[0]["lr"] /= 1024
    assert found[1] == 1024 * found[0]


def test_powers_of_two_are_those_of_math() -> None:
    rng = torch.Generator().manual_seed(5)
    for change in (10 ** (60 * torch.rand(400, generator=rng, dtype=torch.float64) - 30)).tolist():
        for level in (0, -3, 2):
            power = max(-64, min(64, round(math.log2(0.005 / change)) + level))
            assert float(nearest_power(0.005, torch.tensor(change, dtype=torch.float64), level)) == 2.0**power
    for change in (0.0, math.nan, math.inf):
        assert float(nearest_power(0.005, torch.tensor(change, dtype=torch.float64), 4)) == 1.0


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_without_a_change_to_go_by_it_is_one_optimizer_step(value: float) -> None:
    backend = make_backend()
    gradient = {name: torch.full_like(p, value) for name, p in backend.parameters().items()}
    assert step_size(backend, gradient, gradient) == 1.0


# -- in a selector -----------------------------------------------------------------------------------------------------


OFF = 5e-4


class Waves(nn.Module):
    """The loss of x is the sine of w . x: where it is nearly flat for the proxy, it is not for others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sin()


def waves(steps: range, state: dict | None = None, **settings: object) -> tuple[list[Tensor | None], Selector]:
    """Utilities of ``steps``, no update in between; the proxy lies OFF off its maximum."""
    model = Waves()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = SelectionConfig(
        method="opus", proxy_half_life=0.0, score_micro_batch_size=64, guards=UNGUARDED, **settings
    )
    at = torch.full((4, 4), (math.pi / 2 - OFF) / 4)
    backend = ModuleBackend(model, optimizer, lambda module, x: module(x))
    selector = Selector(config, backend, num_selected=4, proxy=lambda step: at, seed=0)
    if state is not None:
        selector.load_state_dict(state)
    return [selector.select(crests(step), step).utilities for step in steps], selector


def crests(step: int) -> Tensor:
    return 0.5 + torch.rand(24, 4, generator=torch.Generator().manual_seed(step))


def exact(step: int) -> Tensor:
    _, selector = waves(range(0))
    backend, operator = selector.backend, selector.backend.operator()
    gradient = backend.gradient(TensorCandidates(torch.full((4, 4), (math.pi / 2 - OFF) / 4)))
    return exact_utilities(backend, TensorCandidates(crests(step)), operator, gradient)


def test_a_step_goes_no_further_than_curvature_allows() -> None:
    """Nats alone would move the weights over the crests of the sine."""
    power = round(math.log2(NATS[False] / (1e-3 * (math.pi / 4 * OFF) ** 2)))  # slope OFF times x, of norm pi / 4
    (spoilt,), _ = waves(range(1), epsilon=2.0**power)
    (found,), selector = waves(range(1))
    assert spoilt is not None
    assert found is not None
    assert spearman(spoilt, exact(0)) < 0.9
    assert spearman(found, exact(0)) > 0.99
    assert selector.state_dict()["estimator"]["level"] < 0


def test_a_resumed_selector_goes_as_far_as_one_that_never_stopped() -> None:
    straight, _ = waves(range(4))
    _, stopped = waves(range(2))
    resumed, _ = waves(range(2, 4), stopped.state_dict())
    assert all(map(torch.equal, resumed, straight[2:]))
    (anew,), _ = waves(range(PERIOD, PERIOD + 1), stopped.state_dict())  # judged again, from what was found
    assert anew is not None
    assert spearman(anew, exact(PERIOD)) > 0.99
    old = {key: value for key, value in stopped.state_dict().items() if key != "estimator"}
    judged, selector = waves(range(2, 4), old)  # of a version without: judged at once
    assert all(spearman(values, exact(step)) > 0.98 for values, step in zip(judged, (2, 3), strict=True))
    assert selector.state_dict()["estimator"]["period"] == 0


def test_signal_over_rounding_is_known_after_the_first_judgement() -> None:
    judged = StepJudge()
    assert judged.due(0)
    assert judged.state_dict() == {}
    assert judged.signal_to_error(SLOPES, 1.0) is None
    found = judge(differences(noise=0.01), "central", search=True)
    assert found is not None
    judged.keep(found, 3)
    assert not judged.due(PERIOD - 1)
    assert judged.due(PERIOD)
    spread = float(SLOPES.std(correction=0))
    assert judged.signal_to_error(SLOPES, 2.0) == pytest.approx(2 * spread / found.error)


def test_a_selection_tells_its_precision_where_it_scores_by_differences() -> None:
    selection = make(proxy_half_life=0.0).select(batch(0), 0)
    assert selection.signal_to_error is not None
    assert selection.signal_to_error > 100
    assert make(estimator="adjoint").select(batch(0), 0).signal_to_error is None
