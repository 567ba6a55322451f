"""The ratios on curves whose answer is known, and the t-test against printed tables."""

import math
from pathlib import Path

import pytest

from megaopus.errors import DataError
from megaopus.evaluation.noise import student_t_p
from megaopus.record.types import StepRecord, ValidationRecord
from megaopus.report.compare import Comparison, Run, aggregate, compare, paired_t_test, trailing_mean

TOKENS = 1000  # a step


def make_run(
    losses: list[float],
    *,
    start: int = 10,
    every: int = 5,
    train_s: float = 1.0,
    select_s: float = 0.0,
    first: int | None = None,
    at_start: bool = True,
) -> Run:
    """Validated after ``start`` and each ``every`` steps from then on; updates recorded from ``first`` on."""
    steps, first = [], start if first is None else first
    for step in range(first, start + every * (len(losses) - 1)):
        chosen = select_s if step >= start else 0.0
        time_s = train_s * (step + 1) + select_s * max(0, step + 1 - start)
        steps.append(
            StepRecord(
                step=step,
                tokens=(step + 1) * TOKENS,
                loss=1.0,
                grad_norm=1.0,
                lr=1.0,
                time_s=time_s,
                step_s=train_s + chosen,
                select_s=chosen,
            )
        )
    validations = []
    for index, loss in enumerate(losses):
        done = start + every * index
        time_s = train_s * done + select_s * every * index
        record = ValidationRecord(step=done, tokens=done * TOKENS, time_s=time_s, loss=loss, domains={"docs": loss})
        validations.append(record)
    return Run(
        name="run",
        path=Path("run"),
        steps=steps,
        validations=validations if at_start else validations[1:],
        selections=[],
        config={},
        environment={},
    )


UNIFORM = make_run([4.0, 3.8, 3.6, 3.4, 3.2])


def test_an_arm_twice_as_fast_needs_half_the_tokens() -> None:
    arm = make_run([4.0, 3.6, 3.2, 2.8, 2.4], select_s=0.5)
    found = compare(UNIFORM, arm, start_step=10, window=1)
    assert found.tokens_ratio == pytest.approx(0.5)
    assert found.time_ratio == pytest.approx(0.75)  # half the steps at one and a half times the seconds
    assert found.overhead == pytest.approx(0.5)
    assert found.uniform_fall == pytest.approx(0.8)
    assert (found.uniform_final_loss, found.final_loss) == (3.2, 2.4)
    assert found.final_domains == {"docs": 2.4}
    assert found.reached_tokens == pytest.approx(20 * TOKENS)
    assert found.reached_time_s == pytest.approx(10 * 1.0 + 10 * 1.5)


def test_between_validations_the_loss_is_linear() -> None:
    found = compare(UNIFORM, make_run([4.0, 3.4, 3.0, 2.9, 2.8]), start_step=10, window=1)
    assert found.tokens_ratio == pytest.approx(1.5 / 4)
    assert found.time_ratio == pytest.approx(1.5 / 4)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_an_equal_arm_needs_all_tokens(window: int) -> None:
    found = compare(UNIFORM, UNIFORM, start_step=10, window=window)
    assert found.tokens_ratio == pytest.approx(1)
    assert found.self_ratio == pytest.approx(1)
    assert found.time_ratio == pytest.approx(1)


def test_an_arm_trained_longer_may_need_more_than_all_tokens() -> None:
    found = compare(UNIFORM, make_run([4.0, 3.9, 3.8, 3.7, 3.6, 3.4, 3.2]), start_step=10, window=1)
    assert found.tokens_ratio == pytest.approx(1.5)


def test_never_reached_is_none() -> None:
    found = compare(UNIFORM, make_run([4.0, 3.9, 3.8, 3.7, 3.6]), start_step=10)
    assert (found.tokens_ratio, found.time_ratio, found.reached_tokens, found.reached_time_s) == (None,) * 4


def test_nothing_is_reached_where_uniform_does_not_fall() -> None:
    found = compare(make_run([4.0, 4.1, 4.0]), make_run([4.0, 3.9, 3.8]), start_step=10, window=1)
    assert (found.tokens_ratio, found.time_ratio, found.self_ratio) == (None, None, None)
    assert found.uniform_fall == 0


def test_a_loss_that_is_not_finite_is_not_reached_and_does_not_break_what_follows() -> None:
    found = compare(UNIFORM, make_run([4.0, math.nan, 3.0, 2.9, 2.8]), start_step=10, window=1)
    assert found.tokens_ratio == pytest.approx(0.5)
    assert compare(UNIFORM, make_run([4.0, math.nan, math.nan]), start_step=10).tokens_ratio is None


def test_both_arms_are_smoothed_alike() -> None:
    found = compare(UNIFORM, make_run([4.0, 3.0, 3.5, 2.9, 2.8]), start_step=10, window=3)
    assert found.uniform_final_loss == pytest.approx((3.6 + 3.4 + 3.2) / 3)
    assert found.final_loss == pytest.approx((3.5 + 2.9 + 2.8) / 3)
    assert found.final_domains["docs"] == pytest.approx(found.final_loss)
    # Means 4.0, 3.5, 3.5, 3.133: the lucky single 3.0 does not count as reaching 3.4.
    assert found.tokens_ratio == pytest.approx((2 + (3.5 - 3.4) / (3.5 - 9.4 / 3)) / 4)


def test_trailing_mean() -> None:
    assert trailing_mean([4.0, 2.0, 3.0, 7.0], 3) == [4.0, 3.0, 3.0, 4.0]
    assert trailing_mean([1.0, 2.0], 1) == [1.0, 2.0]


def test_only_the_stretch_after_the_shared_warm_up_counts() -> None:
    """Nothing changes when the warm-up lies in the arm's own folder, or its last validation in the other's only."""
    arm = make_run([4.0, 3.6, 3.2, 2.8, 2.4], select_s=0.5)
    plain = compare(UNIFORM, arm, start_step=10)
    whole = make_run([4.0, 3.6, 3.2, 2.8, 2.4], select_s=0.5, first=0)
    early = make_run([9.0, 4.0], start=5, first=0).validations[:1]
    whole = Run(**{name: getattr(whole, name) for name in Run.__slots__} | {"validations": early + whole.validations})
    assert compare(UNIFORM, whole, start_step=10) == plain
    assert compare(UNIFORM, make_run([4.0, 3.6, 3.2, 2.8, 2.4], select_s=0.5, at_start=False), start_step=10) == plain


def test_a_stretch_nobody_validated_at_its_start_begins_at_the_first_validation() -> None:
    uniform = make_run([4.0, 3.8, 3.6, 3.4, 3.2], at_start=False)
    found = compare(uniform, make_run([4.0, 3.6, 3.2, 2.8, 2.4], at_start=False), start_step=10, window=1)
    assert found.uniform_fall == pytest.approx(0.6)
    assert found.tokens_ratio == pytest.approx(0.5)


def test_the_gap_between_arms_that_do_not_share_a_start_is_told() -> None:
    assert compare(UNIFORM, make_run([4.25, 3.6, 3.2]), start_step=10).start_gap == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("start_step", "message"),
    [(3, "first recorded update is 10, after the start step 3"), (30, "no update after start step 30 was recorded")],
)
def test_runs_that_do_not_cover_the_stretch_are_refused(start_step: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare(UNIFORM, make_run([4.0, 3.0]), start_step)


def test_a_run_without_validations_is_refused() -> None:
    blind = make_run([4.0, 3.0], at_start=False)
    blind.validations.clear()
    with pytest.raises(DataError, match=r"no validation after step 10; set train\.eval_every"):
        compare(UNIFORM, blind, start_step=10)


def comparisons(*pairs: tuple[list[float], list[float]]) -> list[Comparison]:
    return [compare(make_run(uniform), make_run(arm), start_step=10, window=1) for uniform, arm in pairs]


def test_aggregate_over_seeds() -> None:
    found = aggregate(comparisons(([4.0, 3.0], [4.0, 2.0]), ([4.0, 3.2], [4.0, 2.4]), ([4.0, 3.1], [4.0, 2.2])))
    ratios = [1 / 2, 0.8 / 1.6, 0.9 / 1.8]
    assert (found.seeds, found.reached) == (3, 3)
    assert found.tokens_ratio == pytest.approx(sum(ratios) / 3)
    assert found.tokens_ratio_std == pytest.approx(0)
    assert found.final_loss == pytest.approx(2.2)
    assert found.final_loss_std == pytest.approx(0.2)
    assert found.uniform_final_loss_std == pytest.approx(0.1)
    # Differences 1.0, 0.8, 0.9: t = 0.9 / (0.1 / sqrt 3) = 15.59 with 2 degrees of freedom, where
    # p = 1 - t / sqrt(2 + t^2).
    t = 0.9 / (0.1 / math.sqrt(3))
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)


def test_aggregate_does_not_average_over_the_lucky_seeds() -> None:
    found = aggregate(comparisons(([4.0, 3.0], [4.0, 2.0]), ([4.0, 3.0], [4.0, 3.5])))
    assert (found.reached, found.tokens_ratio, found.time_ratio) == (1, None, None)
    assert found.final_loss == pytest.approx(2.75)


def test_aggregate_of_one_seed_claims_no_spread() -> None:
    found = aggregate(comparisons(([4.0, 3.0], [4.0, 2.0])))
    assert (found.tokens_ratio_std, found.final_loss_std, found.p_value) == (None, None, None)
    assert found.tokens_ratio == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("t", "df", "p"),
    [  # two-sided critical values, as printed in tables of Student's t
        (12.706, 1, 0.05),
        (63.657, 1, 0.01),
        (4.303, 2, 0.05),
        (2.776, 4, 0.05),
        (8.610, 4, 0.001),
        (1.812, 10, 0.10),
        (2.228, 10, 0.05),
        (3.169, 10, 0.01),
        (2.042, 30, 0.05),
        (1.980, 120, 0.05),
        (0.674, 10**6, 0.50),
    ],
)
def test_student_t_against_tables(t: float, df: int, p: float) -> None:
    assert student_t_p(t, df) == pytest.approx(p, rel=2e-3)
    assert student_t_p(-t, df) == student_t_p(t, df)


def test_student_t_closed_forms() -> None:
    for t in (0.0, 0.01, 0.5, 1.0, 3.0, 50.0, 1e4):
        assert student_t_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-6)
        assert student_t_p(t, 2) == pytest.approx(2 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-9)


def test_paired_t_test_needs_pairs_and_survives_equal_ones() -> None:
    assert paired_t_test([1.0, 2.0], [1.0, 2.0]) == 1
    assert paired_t_test([1.0, 2.0], [0.0, 1.0]) == 0
    with pytest.raises(ValueError, match="two pairs"):
        paired_t_test([1.0], [2.0])
