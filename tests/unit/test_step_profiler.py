"""A span of steps is recorded by torch.profiler, and nothing else."""

import json
from pathlib import Path

import pytest
import torch

from megaopus.record.config import LoggingConfig
from megaopus.settings import problems
from megaopus.training.step_profiler import StepProfiler


def work(profiler: StepProfiler, steps: int) -> None:
    for number in range(steps):
        with profiler.step(number):
            torch.ones(8, number + 1).sum()


def test_a_span_of_steps_is_written_as_a_trace(tmp_path: Path) -> None:
    profiler = StepProfiler([1, 2], tmp_path, 3)
    work(profiler, 4)
    profiler.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_3.json"]
    events = json.loads(profiler.path.read_text())["traceEvents"]
    assert len([event for event in events if event.get("name") == "aten::ones"]) == 2


def test_a_run_cut_off_within_the_span_leaves_what_there_is(tmp_path: Path) -> None:
    profiler = StepProfiler([0, 100], tmp_path, 0)
    work(profiler, 3)
    assert not profiler.path.exists()
    profiler.close()
    assert profiler.path.exists()


def test_without_a_span_nothing_is_recorded(tmp_path: Path) -> None:
    profiler = StepProfiler([], tmp_path, 0)
    work(profiler, 2)
    profiler.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("span", [[3], [4, 2], [-1, 2]])
def test_a_span_is_two_steps(span: list[int]) -> None:
    (problem,) = problems(LoggingConfig(profile_steps=span))
    assert problem.reason == "must be two steps, first and last"
