"""W&B and TensorBoard are told what the files of the run folder say."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaopus.errors import ConfigError
from megaopus.record.config import LoggingConfig
from megaopus.record.metrics import metrics_of
from megaopus.record.recorder import Recorder
from megaopus.record.sinks import RUN_ID_FILE, read_rows
from megaopus.record.types import StepRecord, TasksRecord, ValidationRecord
from tests.unit.test_record_files import SLOW, SPIKE, selection_record, step_record, validation_record


def test_tensorboard_missing_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"logging\.tensorboard = True.*\n.*pip install 'megaopus\[tensorboard\]'"):
        Recorder(LoggingConfig(tensorboard=True), tmp_path / "run", 10, True)
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_what_the_files_say_also_after_a_kill(tmp_path: Path) -> None:
    reader = "tensorboard.backend.event_processing.event_accumulator"
    event_files = pytest.importorskip(reader, reason="tensorboard is an optional extra (megaopus[tensorboard])")
    for first in (0, 2):  # the second process goes on after two updates, and makes the third again
        recorder = Recorder(LoggingConfig(tensorboard=True), tmp_path, 10, True, first)
        for at in range(first, first + 3):
            record = replace(step_record(at, loss=3.0 + first - at / 8), layer_grad_norms={"layers.1": 0.5 + at})
            recorder.step(record, selection_record(at), ["a warning"])
        recorder.validation(validation_record(first + 3))
        recorder.tasks(
            TasksRecord(step=first + 3, tokens=9, time_s=1.0, rows=[score("piqa", None), score("part", "all")])
        )
        recorder.close()
    shown = event_files.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    rows = [row for _, _, row in read_rows(tmp_path / "metrics.jsonl")]
    curves = {name: [(each.step, each.value) for each in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    for kind, record in (("step", StepRecord), ("validation", ValidationRecord)):
        for metric in metrics_of(record):
            written = [(row["step"], row[metric.name]) for row in rows if row["kind"] == kind]
            shared = metric.name in ("step", "tokens", "time_s")  # of both kinds: over the step, and as of the step
            numbers = bool(written) and isinstance(written[0][1], int | float)
            if metric.wandb and numbers and metric.name != "step" and not (shared and kind == "validation"):
                assert curves[metric.wandb] == [(at, pytest.approx(float(value))) for at, value in written], metric.name
    assert curves["train/layer_grad_norm/layers.1"] == [(at, 0.5 + at) for at in range(5)]
    assert curves["events"] == [(at, 1) for at in range(5)]
    assert "selection/ess" in curves
    assert curves["tasks/piqa/acc"] == [(5, 0.5)]
    assert "tasks/part/acc" not in curves
    told = [(row["step"], row["task"]) for _, _, row in read_rows(tmp_path / "eval.jsonl")]
    assert told == [(5, "piqa"), (5, "part")]


def score(task: str, part_of: str | None) -> dict[str, Any]:
    """A row of what a run scored on a benchmark."""
    return {"task": task, "metric": "acc", "value": 0.5, "stderr": 0.1, "headline": True, "part_of": part_of}


def test_wandb_missing_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb = 'offline'"):
        Recorder(LoggingConfig(wandb="offline"), tmp_path / "run", 10, True)
    assert not (tmp_path / "run").exists()


def test_wandb_offline_run_continues_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional extra (megaopus[wandb])")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    losses = {0: 3.7346190, 2: 3.5280917}
    for step, loss in losses.items():
        monitor = Recorder(LoggingConfig(wandb="offline"), tmp_path, 10, True, step, {"optim": {"beta": 0.9371}})
        monitor.step(step_record(step, loss=loss), selection_record(step, (SLOW,)), [SPIKE])
        monitor.validation(validation_record(step + 1))
        monitor.tasks(TasksRecord(step=step + 1, tokens=9, time_s=1.0, rows=[score("piqa", None)]))
        monitor.close()
        time.sleep(1.1)  # offline pieces are named by the second
    pieces = [path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))]
    run_id = (tmp_path / RUN_ID_FILE).read_bytes().strip()
    assert len(pieces) == 2
    for piece, loss in zip(pieces, losses.values(), strict=True):
        names = (
            b"train/loss",
            b"selection/ess",
            b"selection/share/docs",
            b"selection/realised_fall",
            b"selection/events",
            b"tasks/piqa/acc",
            b"events/rank.slow",
            b"events/update.skipped.spike",
            b"0.1357924",
            b"validation/domain/noise",
            b"beta",
            b"0.9371",
        )
        assert [name for name in (run_id, *names, str(loss).encode()) if name not in piece] == []
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"0123456789abcdef0123456789abcdef" not in everything
