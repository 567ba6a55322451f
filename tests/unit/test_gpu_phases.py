"""The phases of benchmarks/gpu.py: rows as they come, deadlines, and what is compared; on a CPU, at toy sizes."""

from __future__ import annotations

import json
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_phases
from benchmarks.carried import use_wheels
from benchmarks.gpu_phases import PHASES, Row, Setup, compared, read_peaks, run_phase, run_phases
from benchmarks.gpu_shapes import CASES

CHILD = """
    import json, os, sys, time
    name = sys.argv[sys.argv.index("--phase") + 1]
    print("what a library says")
    print(json.dumps({"phase": name, "device": sys.argv[sys.argv.index("--device") + 1]}), flush=True)
    if name == "correct_cpu":
        time.sleep(60)
    if name == "correct_device":
        print(json.dumps({"phase": name, "error": "ValueError: no"}), flush=True)
    sys.exit(name == "correct_device")
"""


def test_rows_come_one_by_one_and_a_late_phase_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_phases, "_PATIENCE", 1)
    names = ["environment", "correct_cpu", "correct_device", "estimators"]
    monkeypatch.setattr(gpu_phases, "PHASES", {name: replace(PHASES[name], seconds=3.0) for name in names})
    child, rows = tmp_path / "child.py", []
    child.write_text(textwrap.dedent(CHILD))
    started = time.monotonic()
    run_phases(names, Setup("cpu", True, tmp_path), rows.append, command=(sys.executable, str(child)))
    assert time.monotonic() - started < 30
    assert [(row["phase"], row.get("error")) for row in rows] == [
        ("environment", None),
        ("correct_cpu", None),
        ("correct_cpu", "ended: its 3 seconds were over"),
        ("correct_device", None),
        ("correct_device", "ValueError: no"),
        ("estimators", None),
    ]
    assert all(row["device_kind"] == "cpu" and row["commit"] for row in rows)
    rows.clear()
    run_phases(names[:1], Setup("cpu", True, tmp_path), rows.append, minutes=0, command=(sys.executable, str(child)))
    assert rows[0]["error"] == "left out: the 0 minutes are over"


def lines_of(name: str, setup: Setup, tmp_path: Path) -> list[Row]:
    """Return what a phase writes."""
    with (tmp_path / "rows").open("w+") as lines:
        run_phase(name, setup, lines)
        lines.seek(0)
        return [json.loads(line) for line in lines]


def test_a_device_is_held_against_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU itself gives the same; in 16 bits nearly so."""
    monkeypatch.setattr(gpu_phases, "STYLES", {"gpt2": gpu_phases.STYLES["gpt2"]})
    monkeypatch.setattr(gpu_phases, "KINDS", (("fp32", "eager"), ("bf16", "eager")))
    setup = Setup("cpu", True, tmp_path)
    assert lines_of("correct_cpu", setup, tmp_path)[0]["case"] == "cpu fp32 eager"
    same, rounded = lines_of("correct_device", setup, tmp_path)
    assert (same["loss_error"], same["utility_error"], same["same_picks"]) == (0, 0, 1)
    assert 0 < rounded["loss_error"] < 1e-2
    assert rounded["utility_correlation"] > 0.9
    (there,) = lines_of("environment", setup, tmp_path)
    assert there["phase"] == "environment"
    assert there["product_flops"] > 1e8
    assert there["copy_bytes"] > 1e7


def test_what_is_compared() -> None:
    expected = {"losses": torch.tensor([2.0, 4.0]), "utilities": torch.arange(16.0)}
    found = {"losses": torch.tensor([2.0, 4.4]), "utilities": torch.arange(16.0).roll(1)}
    row = compared(found, expected)
    assert row["loss_error"] == pytest.approx(0.1)
    assert row["same_picks"] == 0.5  # of the best two one
    assert row["utility_correlation"] == pytest.approx(1 - 0.5 * 240 / 340)


def test_an_error_is_a_row_too(tmp_path: Path) -> None:
    with (tmp_path / "rows").open("w+") as lines:
        with pytest.raises(FileNotFoundError):
            run_phase("correct_device", Setup("cpu", True, tmp_path), lines)
        lines.seek(0)
        assert json.loads(lines.read())["error"].startswith("FileNotFoundError")


def test_peaks_are_read_off_the_device() -> None:
    """Of an H100 SXM its data sheet has 989.4 TFLOP/s, at a clock of 1.83 GHz, and 3.35 TB/s."""
    told: dict[str, Any] = {"major": 9, "multi_processor_count": 132, "clock_rate": 1_830_000}
    device = SimpleNamespace(**told, memory_clock_rate=2_619_000, memory_bus_width=5120)
    found = read_peaks(device)
    assert found["read_flops"] == pytest.approx(989.4e12, rel=1e-3)
    assert found["read_bytes"] == pytest.approx(3.35e12, rel=1e-3)
    assert read_peaks(SimpleNamespace(major=9, multi_processor_count=132)) == {"read_flops": None, "read_bytes": None}


@pytest.mark.parametrize("name", [name for name in CASES if name in PHASES])
def test_a_shape_can_be_rehearsed(name: str) -> None:
    case = gpu_phases.small(CASES[name])
    assert case.config().model.hidden_size == 128
    assert case.config().model.activation == CASES[name].config().model.activation


def test_packages_are_taken_from_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(FileNotFoundError, match="no wheels in"):
        use_wheels(tmp_path)
    with zipfile.ZipFile(tmp_path / "carried_away-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_away/__init__.py", "ANSWER = 42")
    place = use_wheels(tmp_path)
    assert sys.path[-1] == str(place)
    assert __import__("carried_away").ANSWER == 42


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--fake", "--only", "product"], "--only product: no shape"),
        (["--device", "cpu", "--only", "llama_8b"], "--only llama_8b: no phase on one device"),
        (["--phase", "environment"], "--phase needs --work FOLDER"),
    ],
)
def test_what_a_mode_does_not_have_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert told in capsys.readouterr().err
