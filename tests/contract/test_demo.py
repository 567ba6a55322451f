"""The demo end to end on a tiny corpus, and the benchmark's rows from its run folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import quality
from megaopus.__main__ import main
from megaopus.data.demo_corpus import build_demo_corpus
from megaopus.monitor.compare import load_run

LIMITS = {"docs": 600_000, "code": 200_000, "readmes": 120_000, "noise": 200_000}
WARM_STEPS, STEPS = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo: three real training processes."""
    out = tmp_path_factory.mktemp("demo")
    build_demo_corpus(out / "corpus", vocab_size=512, limits=LIMITS)
    arguments = ["demo", "--out", str(out), "--warm-steps", str(WARM_STEPS), "--steps", str(STEPS)]
    assert main(arguments) == 0
    return out


def test_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("tokens_ratio", "time_ratio", "overhead", "uniform.final_loss", "opus.final_loss", "seeds"):
        assert key in summary
    assert summary["uniform.final_loss"] > 0
    assert summary["opus.final_loss"] > 0
    assert summary["overhead"] > 0
    assert set(summary["picked_share"]["opus"]) == {"docs", "code", "readmes", "noise"}
    assert sum(summary["picked_share"]["opus"].values()) == pytest.approx(1)


def test_report_is_one_page_with_its_pictures(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="http' not in page


def test_both_arms_continue_one_warm_up(folder: Path) -> None:
    warm, uniform, opus = (load_run(folder / f"{name}_seed1234") for name in ("warmup", "uniform", "opus"))
    assert [row.step for row in warm.steps] == list(range(WARM_STEPS))
    for run in (uniform, opus):
        assert [row.step for row in run.steps] == list(range(WARM_STEPS, WARM_STEPS + STEPS))
        assert run.validations[-1].step == WARM_STEPS + STEPS
        assert run.steps[-1].tokens == (WARM_STEPS + STEPS) * 8 * 128
    assert {row.method for row in uniform.selections} == {"uniform"}
    assert {row.method for row in opus.selections} == {"opus"}
    candidates = [
        [json.loads(line)["candidate_ids"] for line in (run.path / "selection.jsonl").read_text().splitlines()]
        for run in (uniform, opus)
    ]
    assert candidates[0] == candidates[1]


def test_a_finished_demo_is_not_trained_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (folder / "opus_seed1234" / "metrics.jsonl").stat().st_mtime_ns
    main(["demo", "--out", str(folder), "--warm-steps", str(WARM_STEPS), "--steps", str(STEPS)])
    assert (folder / "opus_seed1234" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "final loss on docs" in capfd.readouterr().out


def test_quality_rows(folder: Path, tmp_path: Path) -> None:
    """The demo's two runs stand in for every arm: the rows have the agreed keys and the comparison's arithmetic."""
    for optimizer in quality.OPTIMIZERS:
        for arm in quality.ARMS:
            source = folder / ("uniform_seed1234" if arm == "uniform" else "opus_seed1234")
            for seed in (1, 2):
                shutil.copytree(source, tmp_path / optimizer / f"{arm}_seed{seed}")
    plan = quality.Plan(warm_steps=WARM_STEPS, steps=STEPS, eval_every=25, seeds=(1, 2), timing_repeats=1)
    seconds = dict.fromkeys(quality.ARMS, 2.0) | {"uniform": 1.0}
    rows = quality.rows_of(plan, tmp_path, dict.fromkeys(quality.OPTIMIZERS, seconds))
    assert [(row["optimizer"], row["arm"]) for row in rows] == [
        (o, a) for o in quality.OPTIMIZERS for a in quality.ARMS
    ]
    for row in rows:
        assert {"corpus", "tokens_ratio", "time_ratio", "final_loss", "final_loss_std", "p_value"} <= row.keys()
        assert row["seeds"] == 2
        assert row["final_loss_std"] == 0
    uniform, opus = rows[0], rows[2]
    assert uniform["p_value"] is None
    summary = json.loads((folder / "summary.json").read_text())
    assert uniform["final_loss"] == pytest.approx(summary["uniform.final_loss"])
    assert opus["final_loss"] == pytest.approx(summary["opus.final_loss"])
