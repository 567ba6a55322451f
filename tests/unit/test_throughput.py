"""Model FLOPs per second against the formula, the share of a GPU's peak, and where a run shows them."""

from pathlib import Path

import pytest

from megaopus.config.parse import load
from megaopus.meters import Throughput, peak_tflops
from megaopus.models.flops import training_flops_per_token
from megaopus.record.metrics import progress_parts, wandb_row
from megaopus.record.types import StepRecord
from megaopus.report.compare import load_run
from tests.exact.resume_runs import STEPS, settings, train


def record(step_s: float, **found: float | None) -> StepRecord:
    return StepRecord(
        step=0, tokens=8, loss=1.0, grad_norm=1.0, lr=1.0, time_s=1.0, step_s=step_s, select_s=0.0, **found
    )


def test_flops_of_a_step_over_its_time_ranks_and_peak() -> None:
    found = Throughput(4e15, 8, 1000.0)(record(2.0))
    assert found == {"tflops_per_second": 250.0, "model_flops_utilisation": 0.25}
    assert Throughput(4e15, 8, None)(record(2.0))["model_flops_utilisation"] is None
    assert set(Throughput(4e15, 8, 1000.0)(record(0.0)).values()) == {None}
    shown = record(2.0, **found)
    assert [text for text, _ in progress_parts([shown])][-2:] == ["250 TFLOP/s", "MFU 25.0%"]
    sent = wandb_row(shown)
    assert (sent["throughput/tflops_per_second"], sent["throughput/model_flops_utilisation"]) == (250.0, 0.25)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_the_name_of_the_gpu(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_a_run_shows_its_flops(tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(settings(tiny_corpus, tmp_path, "selection=uniform", "logging.every=1")) == 0
    config = load(tmp_path / "config.yaml")
    flops = training_flops_per_token(config.model, 320, config.data.seq_len) * 4 * 16
    steps = load_run(tmp_path).steps
    assert len(steps) == STEPS
    for step in steps:
        assert step.tflops_per_second == pytest.approx(flops / step.step_s / 1e12)
        assert step.model_flops_utilisation is None
    said = capsys.readouterr().out
    assert said.count(" TFLOP/s") == STEPS
    assert "MFU" not in said
