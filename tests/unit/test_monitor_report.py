"""Runs read back, and the page made of them, on synthetic run folders with the shape of real ones."""

import argparse
import base64
import json
import math
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from megaopus.errors import DataError
from megaopus.monitor.base import SelectionRecord, StepRecord, ValidationRecord
from megaopus.monitor.compare import compare, load_run
from megaopus.monitor.report import add_arguments, run, write_report
from megaopus.monitor.sinks import JsonlSink

POOL = {"docs": 0.25, "source": 0.35, "readme": 0.25, "noise": 0.15}
TOKENS = 16 * 256


def write_run(path: Path, method: str, *, start: int = 100, steps: int = 240, pace: float = 1.0, seed: int = 0) -> Path:
    """A run folder that continues a warm-up of ``start`` steps; ``pace``: how many times faster its loss falls."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    metrics, selection = JsonlSink(path / "metrics.jsonl"), JsonlSink(path / "selection.jsonl")
    time_s = 0.4 * start

    def loss(step: int) -> float:
        return 2.6 + 1.9 * math.exp(-(start + (step - start) * pace) / 180)

    def validate(step: int) -> None:
        noise = 0.004 * rng.gauss(0, 1) if step > start else 0.0
        wanted = loss(step) + noise
        domains = {"docs": wanted, "source": 2.2 + wanted / 4, "readme": 2.9 + wanted / 5, "noise": 7.2 + 0.02 * pace}
        record = ValidationRecord(step=step, tokens=step * TOKENS, time_s=time_s, loss=wanted, domains=domains)
        metrics.write({"kind": "validation", **asdict(record)})

    validate(start)
    for step in range(start, steps):
        chosen = method != "uniform"
        select_s = (0.11 + 0.02 * rng.random()) if chosen else 0.001
        step_s = 0.4 + 0.03 * rng.random() + select_s + (2.0 if step == start + 30 else 0.0)
        time_s += step_s
        record = StepRecord(
            step=step,
            tokens=(step + 1) * TOKENS,
            loss=loss(step) + 0.05 * rng.gauss(0, 1),
            grad_norm=0.9 + 0.2 * rng.random(),
            lr=1e-3,
            time_s=time_s,
            step_s=step_s,
            select_s=select_s,
        )
        metrics.write({"kind": "step", **asdict(record)})
        selection.write(asdict(selection_record(step, chosen, min(1.0, (step - start) / 60), rng)))
        if (step + 1) % 10 == 0:
            validate(step + 1)
    metrics.close()
    selection.close()
    path.joinpath("config.yaml").write_text(f"run_dir: {path}\nseed: 1\nselection:\n  method: {method}\n  rho: 0.5\n")
    path.joinpath("environment.json").write_text(json.dumps({"commit": "abc1234", "packages": {"torch": "2.13.0"}}))
    return path


def selection_record(step: int, chosen: bool, ramp: float, rng: random.Random) -> SelectionRecord:
    def draw(weights: dict[str, float], number: int) -> dict[str, float]:
        picks = rng.choices(list(weights), list(weights.values()), k=number)
        return {domain: picks.count(domain) / number for domain in weights}

    lean = {"docs": 1 + 3 * ramp, "source": 1 - 0.4 * ramp, "readme": 1 - 0.3 * ramp, "noise": 1 - 0.9 * ramp}
    weights = {domain: share * (lean[domain] if chosen else 1) for domain, share in POOL.items()}
    return SelectionRecord(
        step=step,
        method="opus" if chosen else "uniform",
        candidate_ids=list(range(64 * step, 64 * step + 64)),
        utilities=[rng.gauss(0, 1e-3) for _ in range(64)] if chosen else None,
        picked_ids=list(range(64 * step, 64 * step + 32)),
        share=draw(weights, 32),
        pool_share=draw(POOL, 64),
        ess=rng.uniform(24, 34) if chosen else 64.0,
        max_p_ratio=rng.uniform(5, 12) if chosen else 1.0,
        **(falls(step) if chosen and step % 10 == 0 else {}),
        events=[f"{step} <b>candidates</b> with a utility that is not finite"] if chosen and step in (120, 150) else [],
    )


def falls(step: int) -> dict[str, float]:
    """Realised ones grow with the predicted ones, but for two outliers."""
    predicted = 0.01 + 1e-3 * (step % 70) + 1e-7 * step
    realised = {130: -4.0, 200: math.nan}.get(step, predicted / 2)
    return {"predicted_fall": predicted, "uniform_fall": predicted / 4, "realised_fall": realised}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "uniform", "uniform", seed=1), write_run(root / "opus", "opus", pace=2.3, seed=2)]


def report(*arguments: object) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([str(argument) for argument in arguments])
    assert run(args) == 0
    return Path(args.out).read_text()


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]


def pictures(page: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_load_run_reads_back_what_was_written(folders: list[Path]) -> None:
    loaded = load_run(folders[1])
    assert (loaded.name, loaded.config["selection"]["method"], loaded.environment["commit"]) == (
        "opus",
        "opus",
        "abc1234",
    )
    assert [record.step for record in loaded.steps] == list(range(100, 240))
    assert [record.step for record in loaded.validations] == list(range(100, 241, 10))
    assert loaded.steps[-1].tokens == 240 * TOKENS
    assert loaded.selections[0].candidates == 64
    assert loaded.selections[0].falls == pytest.approx((0.04, 0.01, 0.02), rel=1e-3)
    assert loaded.selections[1].falls is None
    assert loaded.selections[0].picked == 32
    assert loaded.selections[20].events == ["120 <b>candidates</b> with a utility that is not finite"]


def test_load_run_restores_non_finite_numbers(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    record = StepRecord(
        step=0, tokens=8, loss=math.nan, grad_norm=math.inf, lr=1.0, time_s=1.0, step_s=1.0, select_s=0.0, skipped=True
    )
    sink.write({"kind": "step", **asdict(record)})
    sink.close()
    loaded = load_run(tmp_path)
    assert math.isnan(loaded.steps[0].loss)
    assert loaded.steps[0].grad_norm == math.inf
    assert loaded.steps[0].skipped
    assert (loaded.selections, loaded.config, loaded.environment) == ([], {}, {})


STEP = (
    '{"kind":"step","step":%d,"tokens":8,"loss":1,"grad_norm":1,"lr":1,'
    '"time_s":1,"step_s":1,"select_s":0,"skipped":false}\n'
)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "metrics.jsonl: missing"),
        ({"metrics.jsonl": STEP % 0 + "{broken\n" + STEP % 1}, "metrics.jsonl, line 2: not JSON"),
        ({"metrics.jsonl": "[1]\n"}, "metrics.jsonl, line 1: expected a JSON object"),
        (
            {"metrics.jsonl": STEP % 0 + '{"kind":"step","step":1}\n'},
            "metrics.jsonl, line 2: field 'tokens' is missing",
        ),
        ({"metrics.jsonl": STEP.replace('"loss":1', '"loss":"low"') % 0}, "metrics.jsonl, line 1: .*low"),
        ({"metrics.jsonl": '{"kind":"other"}\n'}, "metrics.jsonl, line 1: kind 'other'"),
        ({"metrics.jsonl": STEP % 3 + STEP % 3}, "step 3 follows step 3"),
        ({"metrics.jsonl": STEP % 0, "selection.jsonl": '{"step":0}\n'}, "selection.jsonl, line 1: field 'method'"),
        ({"metrics.jsonl": STEP % 0, "config.yaml": "a: [1"}, "config.yaml: cannot be read"),
        ({"metrics.jsonl": STEP % 0, "environment.json": "[]"}, "environment.json: expected keys and values"),
    ],
)
def test_load_run_says_which_file_and_line_is_broken(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        tmp_path.joinpath(name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_run(tmp_path)


def test_load_run_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such run folder"):
        load_run(tmp_path / "nowhere")


def test_load_run_of_a_live_run_leaves_out_the_line_in_flight(tmp_path: Path) -> None:
    tmp_path.joinpath("metrics.jsonl").write_text(STEP % 0 + STEP[:40] % 1)
    assert [record.step for record in load_run(tmp_path).steps] == [0]


def test_report_of_two_arms(folders: list[Path], tmp_path: Path) -> None:
    page = report(*folders, "--out", tmp_path / "new" / "page.html")
    found = compare(load_run(folders[0]), load_run(folders[1]), start_step=100)
    assert found.tokens_ratio is not None
    assert found.time_ratio is not None
    rows = cells(page)
    assert rows[1][0] == "uniform"
    assert rows[1][5:] == ["baseline", "baseline"]
    assert rows[2][:2] == ["opus", f"{found.final_loss:.4f}"]
    assert rows[2][4:] == [f"{found.overhead:.1%}", f"{found.tokens_ratio:.2f}", f"{found.time_ratio:.2f}"]
    assert ["selection.method", "uniform", "opus"] in rows
    assert ["packages.torch", "2.13.0"] in rows
    assert ["opus", "2", "120", "120 &lt;b&gt;candidates&lt;/b&gt; with a utility that is not finite"] in rows
    assert "opus: median 0.015 realised, 0.04 predicted, 0.01 for a uniform draw" in page
    # 13 checks are finite; the outlier has rank 1 instead of 13, the rest one more: 1 - 6 (12^2 + 12) / (13 (13^2 - 1))
    assert "rank correlation of predicted and realised 0.57 over 13 checks" in page
    images = pictures(page)
    assert len(images) == 7
    assert all(image.startswith(b"\x89PNG") and len(image) > 10_000 for image in images)
    assert not re.search(r"https?://|<script|<link|@import", page), "the page must stand alone"
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "page.html"]


def test_report_is_the_same_twice(folders: list[Path], tmp_path: Path) -> None:
    assert report(*folders, "--out", tmp_path / "a.html") == report(*folders, "--out", tmp_path / "b.html")


def test_report_of_one_run_beside_it_by_default(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "solo", "uniform", start=0, steps=60)
    run(argparse.Namespace(runs=[str(folder)], out=None, start_step=None))
    page = (folder / "report.html").read_text()
    assert "baseline" not in cells(page)[0]
    assert len(pictures(page)) == 5  # no effective sample size where nothing was chosen by utility
    assert "None was recorded" in page


def test_report_says_why_runs_are_not_compared(folders: list[Path], tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    young.joinpath("metrics.jsonl").write_text(STEP % 100)
    page = report(folders[0], young, "--out", tmp_path / "page.html")
    assert "young is not compared with uniform" in page
    assert "no validation after step 100" in page
    assert "No config.yaml in: young" in page
    assert "not reached" not in page


def test_report_warns_of_a_plateau(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name, start=1500, steps=1560, seed=3) for name in ("uniform", "opus")]
    page = report(*folders, "--out", tmp_path / "page.html")
    assert "on such a plateau" in page


def test_report_tells_folders_of_one_name_apart(folders: list[Path], tmp_path: Path) -> None:
    for seed in ("seed1", "seed2"):
        write_run(tmp_path / seed / "opus", "opus", steps=130)
    page = report(tmp_path / "seed1/opus", tmp_path / "seed2/opus", "--out", tmp_path / "page.html")
    assert [row[0] for row in cells(page)[1:3]] == ["seed1/opus", "seed2/opus"]
    with pytest.raises(DataError, match="named twice"):
        report(folders[0], folders[0], "--out", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_write_report_shows_title_and_notes_as_text(folders: list[Path], tmp_path: Path) -> None:
    out = write_report(
        {"a<i>": load_run(folders[0])},
        tmp_path / "page.html",
        title="Small & fast",
        notes=["5 < 6 seeds"],
        start_step=100,
    )
    page = out.read_text()
    assert "<h1>Small &amp; fast</h1>" in page
    assert "<p>5 &lt; 6 seeds</p>" in page
    assert "a<i>" not in page
