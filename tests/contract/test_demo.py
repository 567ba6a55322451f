"""The demo end to end on a tiny corpus, and the benchmark's rows from its run folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import quality
from benchmarks.study import Results, summary_of
from megaopus import side_by_side
from megaopus.__main__ import main
from megaopus.cli import demo
from megaopus.corpus_tools.demo_corpus import build_demo_corpus
from megaopus.report.compare import load_run
from tests import forks

LIMITS = {"docs": 600_000, "code": 200_000, "readmes": 120_000, "noise": 200_000}
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def short_turns() -> Iterator[None]:
    """Steps are timed over a few updates."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SETTLED", 2), ("TURN", 1), ("ROUNDS", 2)):
            patch.setattr(side_by_side, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo: two real training processes, whose imports are done beforehand."""
    out = tmp_path_factory.mktemp("demo")
    build_demo_corpus(out / "corpus", vocab_size=512, limits=LIMITS)
    arguments = ["demo", "--out", str(out), "--steps", str(STEPS)]
    started = []

    def forked(command: list[str]) -> int:
        assert command[:2] == [sys.executable, "-m"]
        started.append(command[2:4])
        return forks.program(*command[2:]).returncode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "call", forked)
        assert main(arguments) == 0
    assert started == [["megaopus", "train"]] * 2
    return out


def test_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("tokens_ratio", "time_ratio", "overhead", "uniform.final_loss", "opus.final_loss", "seeds"):
        assert key in summary
    assert summary["uniform.final_loss"] > 0
    assert summary["opus.final_loss"] > 0
    assert summary["overhead"] > 0
    assert summary["target"] == "domains docs"
    last = load_run(folder / "opus_seed1234").validations[-3:]
    assert summary["opus.final_mean_loss"] == pytest.approx(sum(record.mean_loss or 0 for record in last) / len(last))
    if summary["tokens_ratio"] is not None:
        cost = summary["step_s"]["opus"] / summary["step_s"]["uniform"]
        assert summary["time_ratio"] == pytest.approx(summary["tokens_ratio"] * cost), "as measured in turns"
    assert set(summary["picked_share"]["opus"]) == {"docs", "code", "readmes", "noise"}
    assert sum(summary["picked_share"]["opus"].values()) == pytest.approx(1)


def test_report_is_one_page_with_its_pictures(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="http' not in page


def test_both_runs_begin_alike_and_read_one_stream(folder: Path) -> None:
    uniform, opus = (load_run(folder / f"{name}_seed1234") for name in ("uniform", "opus"))
    for run in (uniform, opus):
        assert [row.step for row in run.steps] == list(range(STEPS))
        assert run.validations[-1].step == STEPS
        assert run.steps[-1].tokens == STEPS * 8 * 128
        assert len(run.selections) == STEPS
    assert uniform.validations[0].domains == opus.validations[0].domains


def test_a_finished_demo_is_not_trained_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (folder / "opus_seed1234" / "metrics.jsonl").stat().st_mtime_ns
    main(["demo", "--out", str(folder), "--steps", str(STEPS)])
    assert (folder / "opus_seed1234" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "final target loss (docs)" in capfd.readouterr().out


def test_quality_rows(folder: Path, tmp_path: Path) -> None:
    """The demo's two runs stand in for every arm: the rows have the agreed keys and the comparison's arithmetic."""
    place = [f"data.path={folder / 'corpus'}", "data.target_domains=[docs]"]
    jobs = quality.jobs_of(quality.FULL, ["demo", "mixed"])
    study = quality.Study(quality.FULL, jobs, {"demo": place, "mixed": place}, Results(tmp_path / "r"), tmp_path)
    runs = {name: load_run(folder / f"{name}_seed1234") for name in ("uniform", "opus")}
    for job in jobs:
        run = runs["uniform" if job.arm == "uniform" else "opus"]
        row = {**asdict(job), **summary_of(run)}
        study.results.add(study.task(job).key, row)
    seconds = dict.fromkeys(quality.ARMS, 2.0) | {"uniform": 1.0}
    study.results.add("timing/demo/adamw", {"seconds": seconds})
    again = quality.Study(study.plan, jobs, study.places, Results(tmp_path / "r"), tmp_path)  # as read back
    rows = {(row["corpus"], row["optimizer"], row["arm"]): row for row in quality.rows_of(again)}
    assert {key for key in rows if key[0] == "demo"} == {("demo", "adamw", arm) for arm in quality.MAIN}
    assert {key[2] for key in rows if key[:2] == ("mixed", "adamw")} == set(quality.ARMS) - set(quality.HALF_LIVES)
    assert {key[2] for key in rows if key[:2] == ("mixed", "muon")} == set(quality.MAIN)
    uniform, opus = rows["demo", "adamw", "uniform"], rows["demo", "adamw", "opus"]
    assert (uniform["seeds"], rows["mixed", "adamw", "opus"]["seeds"]) == (3, 5)
    assert uniform["p_uniform"] is None
    assert uniform["final_loss_std"] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert uniform["final_loss"] == pytest.approx(summary["uniform.final_loss"])
    assert opus["final_loss"] == pytest.approx(summary["opus.final_loss"])
    if opus["tokens_ratio"] is not None:
        assert opus["time_ratio"] == pytest.approx(2 * opus["tokens_ratio"])
    assert len({study.task(job).key for job in jobs}) == len(jobs)
    console = Console(width=80, record=True)
    quality.print_rows(list(rows.values()), console)
    assert "…" not in console.export_text()
    quality.draw(again, list(rows.values()), tmp_path / "plots")
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"quality_demo.png", "quality_mixed.png", "quality_mixed_muon.png"}
