"""Goodput on paper: the simulation against closed forms, against counted cases, and what the verb prints of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.goodput import llama
from megaopus.cli.main import main
from megaopus.planning.goodput import Faults, best_interval, best_simulated, expected_goodput, of_job, replay, simulate

WEEK = 7 * 86400.0
JOB = Faults(mtbf=4 * 3600, save=60, restart=300)


@pytest.mark.parametrize("interval", [300.0, 1200.0, 4800.0])
@pytest.mark.parametrize("restart", [0.0, 1800.0])
def test_the_simulation_is_the_closed_form_where_that_holds(interval: float, restart: float) -> None:
    faults = replace(JOB, restart=restart)
    found = simulate(6 * WEEK, interval, faults)
    error = found.spread / math.sqrt(12)
    assert found.goodput == pytest.approx(expected_goodput(interval, faults), abs=4 * error)
    assert error < 0.004
    assert found.goodput + found.lost + found.saving + found.restarting == pytest.approx(1, abs=1e-6)


def test_young_and_daly() -> None:
    """Daly's is within a thousandth of the best of his own model, Young's is that of its first order."""
    for save in (10, 60, 600):
        faults = replace(JOB, save=save)
        young, daly = best_interval(save, JOB.mtbf)
        assert young == pytest.approx(math.sqrt(2 * save * JOB.mtbf))
        best = max(expected_goodput(daly * factor / 50, faults) for factor in range(10, 150))
        assert expected_goodput(daly, faults) >= 0.999 * best
    assert best_interval(3 * JOB.mtbf, JOB.mtbf)[1] == JOB.mtbf


def test_the_best_interval_is_found() -> None:
    interval, outcome = best_simulated(4 * WEEK, JOB)
    assert 0.5 < interval / best_interval(JOB.save, JOB.mtbf)[1] < 2
    assert outcome.goodput >= simulate(4 * WEEK, 4 * interval, JOB).goodput
    assert outcome.goodput >= simulate(4 * WEEK, interval / 4, JOB).goodput


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    assert simulate(WEEK, 1200, JOB, seed=3) == simulate(WEEK, 1200, JOB, seed=3)
    assert simulate(WEEK, 1200, JOB, seed=3) != simulate(WEEK, 1200, JOB, seed=4)


def test_nothing_but_saving_without_failures() -> None:
    never = replace(JOB, mtbf=math.inf)
    found = simulate(3600, 600, never, repeats=2)
    assert found.goodput == pytest.approx(3600 / (3600 + 5 * 60))  # none after the last part
    assert (found.failures, found.lost) == (0, 0)


def test_slow_ranks_cost_their_share_of_the_speed() -> None:
    slow = replace(JOB, mtbf=math.inf, save=0.0, straggler_mtbf=7200, slowdown=0.5, spell=1800)
    found = simulate(4 * WEEK, 600, slow)
    # in 7200 s of full speed and 1800 s of half of it are 8100 s of work
    assert found.goodput == pytest.approx(8100 / 9000, abs=0.01)
    assert slow.straggling == pytest.approx(0.1)


def test_a_checkpoint_that_is_whole_later_loses_more() -> None:
    late = replace(JOB, lag=1500.0)
    assert simulate(4 * WEEK, 1200, late).lost > simulate(4 * WEEK, 1200, JOB).lost + 0.03


def test_a_job_that_cannot_end_is_given_up() -> None:
    hopeless = Faults(mtbf=60, save=600, restart=10)
    assert simulate(86400, 3600, hopeless, repeats=1).goodput == 0
    assert expected_goodput(1e9, hopeless) == 0


def test_one_gpu_s_failures_make_a_job_s() -> None:
    assert of_job(Faults(mtbf=5e4, save=1, restart=1), 16384).mtbf == pytest.approx(5e4 / 16384)


def test_the_published_run_of_llama_3(capsys: pytest.CaptureFixture[str]) -> None:
    """419 interruptions of 16,384 GPUs in 54 days are one in 50,700 h of a GPU; what 90 % would take, as arithmetic."""
    hours = 54 * 24 * 16384 / 419
    assert hours == pytest.approx(50_700, rel=0.001)
    told = {}
    for save, restart in ((5, 300), (30, 600)):
        given = ["--checkpoint-seconds", str(save), "--restart-seconds", str(restart)]
        assert main(["plan", "--gpus", "16384", "--mtbf", f"{hours:.0f}", "--days", "54", *given]) == 0
        out = capsys.readouterr().out
        assert "one does every 3h05m" in out
        told[save] = float(out.split("goodput ")[1].split("%")[0])
    assert told[5] > 90 > told[30]


def test_a_plan_tells_the_goodput_of_its_choice(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model=gpt2_xl", "model.vocab_size=50257", "train.global_batch_size=2048", "train.tokens=3000000000000"]
    assert main(["plan", *given, "--gpus", "1024", "--memory", "80GB", "--top", "1", "--mtbf", "20000"]) == 0
    out = capsys.readouterr().out
    assert "assumed: its bytes at 2 GB/s of each node" in out
    assert "as set" in out
    assert "Set checkpoint.every=" in out
    lines = [line for line in out.splitlines() if line[:1] in "┃│┏└"]
    assert max(map(len, lines)) <= 100


def test_a_job_that_is_killed_is_replayed_as_it_was() -> None:
    """By hand: starts of 10 s, 20 steps of 1 s, a save of 0.5 s after each 4."""
    faults = Faults(mtbf=math.inf, save=0.5, restart=10)
    whole = 10 + 20 + 4 * 0.5
    assert replay(20, 4, faults, []) == pytest.approx(whole)
    # killed before its first update; 6.2 s after another start, two steps after a save; then left alone from step 4 on
    assert replay(20, 4, faults, [7, 10 + 4 + 0.5 + 2]) == pytest.approx(7 + 16.5 + whole - 4.5)
    # killed in a save: the checkpoint is none
    assert replay(20, 4, faults, [10 + 4 + 0.3]) == pytest.approx(14.3 + whole)


def test_the_illustration_is_that_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    for row in llama():
        restart = f"{row['restart_s']:.0f} s" if row["restart_s"] > 1 else "none does"
        assert f"| {row['save_s']} s | {row['interval_s']:.0f} s | {restart} |" in page
        kept = Faults(mtbf=3600 * 54 * 24 / 419, save=row["save_s"], restart=row["restart_s"])
        assert expected_goodput(row["interval_s"], kept) == pytest.approx(0.9, abs=0.006)
