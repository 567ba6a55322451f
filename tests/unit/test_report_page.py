"""Runs read back, and the page made of them, on synthetic run folders with the shape of real ones."""

import argparse
import base64
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from megaopus.cli.main import verb_parser
from megaopus.cli.report import write_page
from megaopus.errors import DataError
from megaopus.events import Event
from megaopus.record.config import LoggingConfig
from megaopus.record.metrics import read_record
from megaopus.record.recorder import Recorder
from megaopus.record.sinks import JsonlSink
from megaopus.record.types import StepRecord
from megaopus.report import drawing, figures
from megaopus.report.arms import find_arms
from megaopus.report.choice_summary import QUANTILES, summarise_choices
from megaopus.report.compare import SEED_NOISE, Run, aggregate, compare, load_run, stretch_curve, validation_at
from megaopus.report.page import write_report
from megaopus.report.sections import Texts
from tests.unit.report_runs import NOT_FINITE, TOKENS, candidates_of, write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "uniform", "uniform", seed=1), write_run(root / "opus", "opus", pace=2.3, seed=2)]


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, which take a third of the time."""
    monkeypatch.setattr(drawing, "DPI", 40)


def report(*arguments: object, texts: Texts | None = None) -> str:
    args = verb_parser("report").parse_args([str(argument) for argument in arguments])
    assert write_page(args, texts) == 0
    return Path(args.out).read_text()


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]


def pictures(page: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_load_run_reads_back_what_was_written(folders: list[Path]) -> None:
    loaded = load_run(folders[1])
    assert (loaded.name, loaded.config["selection"]["method"], loaded.environment["git"]) == (
        "opus",
        "opus",
        "abc12345678900",
    )
    assert [record.step for record in loaded.steps] == list(range(100, 240))
    assert [record.step for record in loaded.validations] == list(range(100, 241, 10))
    assert loaded.steps[-1].tokens == 240 * TOKENS
    assert loaded.selections[0].candidates == 64
    assert loaded.selections[0].falls == pytest.approx((0.04, 0.01, 0.02), rel=1e-3)
    assert loaded.selections[1].falls is None
    assert loaded.selections[0].picked == 32
    assert loaded.selections[20].events == [NOT_FINITE]


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
        ({"metrics.jsonl": STEP % 0, "events.jsonl": '{"step":0}\n'}, "events.jsonl, line 1: no step and event"),
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


@pytest.mark.usefixtures("coarse")
def test_report_of_two_arms(folders: list[Path], tmp_path: Path) -> None:
    page = report(*folders, "--out", tmp_path / "new" / "page.html")
    found = compare(load_run(folders[0]), load_run(folders[1]), start_step=100)
    assert found.tokens_ratio is not None
    assert found.time_ratio is not None
    origins, rows = cells(page)[1:3], cells(page)[3:]
    model = "1.07M parameters, 4 layers of 128, adamw"
    assert origins[0] == ["uniform", str(folders[0]), model, "983,040", "2026-11-29 09:13:58", "abc1234567"]
    assert rows[1][0] == "uniform"
    assert rows[1][5:] == ["baseline", "baseline"]
    assert rows[2][:2] == ["opus", f"{found.final_loss:.4f}"]
    assert rows[2][4:] == [f"{found.overhead:.1%}", f"{found.tokens_ratio:.2f}", f"{found.time_ratio:.2f}"]
    assert ["selection.method", "uniform", "opus"] in rows
    assert ["packages.torch", "2.13.0"] in rows
    said = "&lt;b&gt;candidates&lt;/b&gt; with a utility that is not finite"
    assert ["opus", "2", "120", "selection.not_finite", said] in rows
    assert "Skipped updates" not in page
    assert "opus: median 0.015 realised, 0.04 predicted, 0.01 for a uniform draw" in page
    # 13 checks are finite; the outlier has rank 1 instead of 13, the rest one more: 1 - 6 (12^2 + 12) / (13 (13^2 - 1))
    assert "rank correlation of predicted and realised 0.57 over 13 checks" in page
    images = pictures(page)
    assert len(images) == 11
    assert "without utilities" not in page, "as of runs that do not say what these did"
    assert all(image.startswith(b"\x89PNG") and len(image) > 2_000 for image in images)
    assert not re.search(r"https?://|<script|<link|@import", page), "the page must stand alone"
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "page.html"]


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
def test_report_is_the_same_twice(folders: list[Path], tmp_path: Path) -> None:
    assert report(*folders, "--out", tmp_path / "a.html") == report(*folders, "--out", tmp_path / "b.html")


@pytest.mark.usefixtures("coarse")
def test_report_of_one_run_beside_it_by_default(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "solo", "uniform", start=0, steps=60)
    assert len(summarise_choices(load_run(folder)).counts) == 1000  # 60 x 64 candidates
    write_page(argparse.Namespace(runs=[str(folder)], out=None, start_step=None))
    page = (folder / "report.html").read_text()
    assert "baseline" not in cells(page)[0]
    assert len(pictures(page)) == 8  # no utilities and no effective sample size where nothing was chosen by utility
    assert "None was recorded" in page


@pytest.mark.usefixtures("coarse")
def test_report_says_why_each_update_was_skipped(tmp_path: Path) -> None:
    """As recorded, of a run of this version; of one of version 0.1 that it was not."""
    reasons = {3: "gradient not finite", 5: "gradient norm 71 above 9.2 (20 times the median)", 8: "loss < 0"}
    new, old = tmp_path / "new", tmp_path / "old"
    recorder = Recorder(LoggingConfig(), new, 10, True)
    for step in range(10):
        record = read_record(StepRecord, {**json.loads(STEP % step), "skip_reason": reasons.get(step)})
        kind = "spike" if step == 5 else "gradient_not_finite"
        events = [Event(f"update.skipped.{kind}", f"step {step} skipped")] if step in (3, 5) else []
        recorder.step(record, None, [*events, Event("rank.slow", f"rank {step} is slow", rank=step)])
    recorder.close()
    old.mkdir()
    skipped = STEP.replace("false", "true")
    old.joinpath("metrics.jsonl").write_text(STEP % 0 + skipped % 1 + skipped % 2)
    rows = cells(report(new, old, "--out", tmp_path / "page.html"))
    assert [row for row in rows if len(row) == 5 and row[1].isdecimal()] == [
        ["new", "10", "0", "rank.slow", "rank 0 is slow"],
        ["new", "1", "3", "update.skipped.gradient_not_finite", "step 3 skipped"],
        ["new", "1", "5", "update.skipped.spike", "step 5 skipped"],
        ["new", "1", "8", "update.skipped", "update skipped: loss &lt; 0"],
        ["old", "2", "1", "update.skipped", "update skipped: not recorded"],
        ["new", "3", "1", "1", "gradient not finite"],
        ["new", "5", "1", "1", "gradient norm 71 above 9.2 (20 times the median)"],
        ["new", "8", "1", "1", "loss &lt; 0"],
        ["old", "1", "1", "1", "not recorded"],
        ["old", "2", "1", "1", "not recorded"],
    ]


def test_each_metric_that_is_to_be_drawn_has_a_panel(folders: list[Path]) -> None:
    """Return where some run has values of it; a step of a version that did not measure it is passed over."""
    run = load_run(folders[0])
    inks = drawing.inks(find_arms({"a": run}), None)

    def drawn(**peaks: int | None) -> list[str]:
        steps = [replace(record, **peaks) if record.step > 180 else record for record in run.steps]
        figure = figures.metrics_figure({"a": replace(run, steps=steps)}, inks, 100)
        assert figure is not None
        return [axis.get_title("left") for axis in figure.axes if axis.get_visible()]

    assert drawn() == ["grad_norm", "lr", "step_s"]
    assert drawn(memory_resident=5 << 30) == ["grad_norm", "lr", "step_s", "memory_resident"]
    assert figures.metrics_figure({"a": replace(run, steps=[])}, inks, 100) is None


@pytest.mark.usefixtures("coarse")
def test_report_says_why_runs_are_not_compared(folders: list[Path], tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    young.joinpath("metrics.jsonl").write_text(STEP % 100)
    page = report(folders[0], young, "--out", tmp_path / "page.html")
    assert "young is not compared with uniform" in page
    assert "no validation after step 100" in page
    assert "No config.yaml in: young" in page
    assert "not reached" not in page


@pytest.mark.usefixtures("coarse")
def test_one_seed_claims_no_difference_that_another_seed_would_make(folders: list[Path], tmp_path: Path) -> None:
    """It is neither a win of .003 nor a loss of it."""
    near = write_run(tmp_path / "near", "opus", pace=1.02, seed=3)
    found = compare(load_run(folders[0]), load_run(near), start_step=100)
    assert 0 < found.uniform_final_loss - found.final_loss < SEED_NOISE
    assert found.tokens_ratio is not None
    page = report(folders[0], near, "--out", tmp_path / "page.html")
    assert f"No difference measurable with one seed: near ends at {found.final_loss:.3f}, uniform at" in page
    assert "reaches" not in page
    assert next(row for row in cells(page)[4:] if row[0] == "near")[5:] == ["not measurable", "not measurable"]


def test_losses_are_drawn_as_measured_and_the_baseline_in_front(folders: list[Path]) -> None:
    runs = {each.name: load_run(each) for each in folders}
    inks, found = drawing.inks(find_arms(runs), "uniform"), compare(runs["uniform"], runs["opus"], 100)
    curves = {name: stretch_curve(run, 100, 3, validation_at(run, 100)) for name, run in runs.items()}
    (axis,) = figures.loss_figure(curves, inks, {"opus": found}, "tokens", "uniform").axes
    lines = {str(line.get_label()): line for line in axis.lines}
    for name, run in runs.items():
        assert list(lines[name].get_ydata()) == [record.loss for record in run.validations]
    assert lines["uniform"].get_zorder() > lines["opus"].get_zorder()
    assert lines["uniform"].get_linestyle() == "--"


def with_influence(run: Run, signals: Sequence[str] = ("utility", "importance")) -> Run:
    """The run, told of every second step what utilities did; in every tenth they changed nothing."""
    told = [
        replace(
            row,
            changed_by_utilities=0.0 if row.step % 10 == 0 else row.step / 400,
            swapped_utility=None if row.step % 10 == 0 else 1e-4 * row.step,
            swapped_importance=None if row.step % 10 == 0 else math.nan if row.step == 102 else -0.01 * row.step,
            share_swapped_in={} if row.step % 10 == 0 else {"docs": 0.75, "source": 0.25},
            share_swapped_out={} if row.step % 10 == 0 else {"docs": 0.25, "noise": 0.75},
            signal_spread={signal: 0.1 * (at + 1) for at, signal in enumerate(signals)},
            odds_weights={} if len(signals) < 3 else {"utility": -0.5, "loss squared": 0.25},
        )
        if row.step % 2 == 0
        else row
        for row in run.selections
    ]
    return replace(run, selections=told)


@pytest.mark.usefixtures("coarse")
def test_the_page_shows_what_utilities_did(folders: list[Path], tmp_path: Path) -> None:
    uniform, opus = (load_run(each) for each in folders)
    page = write_report({"uniform": uniform, "opus": with_influence(opus)}, tmp_path / "page.html").read_text()
    assert len(pictures(page)) == 15
    share = sum(0 if step % 10 == 0 else step / 400 for step in range(100, 240, 2)) / 70
    assert f"opus: {share:.1%} of all picks" in page


def test_what_utilities_did_is_drawn_as_recorded(folders: list[Path]) -> None:
    run = with_influence(load_run(folders[1]), ("utility", "importance", "loss"))
    runs, rows = {"opus": run}, {"opus": [row for row in run.selections if row.changed_by_utilities is not None]}
    inks = drawing.inks(find_arms(runs), None)
    (axis,) = figures.changed_figure(runs, rows, inks).axes
    dots, line = axis.lines
    assert list(dots.get_ydata()) == [row.changed_by_utilities for row in rows["opus"]]
    assert list(dots.get_xdata()) == [(row.step + 1) * TOKENS for row in rows["opus"]]
    assert list(line.get_ydata()) == pytest.approx(drawing.smooth(list(dots.get_ydata()), 3))
    expected = {"signal_spread": {"utility": 0.1, "importance": 0.2, "loss": 0.1 * 3}}
    expected["odds_weights"] = {"utility": -0.5, "loss squared": 0.25}
    for metric, values in expected.items():
        figure = figures.signal_figure(runs, rows, metric, "number")
        assert figure is not None
        (axis,) = figure.axes
        lines = {str(line.get_label()): line for line in axis.lines}
        for signal, value in values.items():
            assert list(lines[signal].get_ydata()) == [value] * 70
            assert list(lines[signal].get_xdata()) == list(dots.get_xdata())
    figure = figures.swapped_figure(runs, rows, inks)
    assert figure is not None
    utility, importance = figure.axes
    assert (utility.get_title("left"), importance.get_title("left")) == ("utility", "importance")
    steps = [row.step for row in rows["opus"] if row.step % 10]
    assert list(utility.lines[0].get_ydata()) == [1e-4 * step for step in steps]
    assert list(importance.lines[0].get_ydata()) == [-0.01 * step for step in steps if step != 102]
    figure = figures.swapped_domains_figure(rows)
    assert figure is not None
    (axis,) = figure.axes
    domains = [label.get_text() for label in axis.get_yticklabels()]
    for bars, shares in zip(
        axis.containers, ({"docs": 0.75, "source": 0.25}, {"docs": 0.25, "noise": 0.75}), strict=True
    ):
        widths = dict(zip(domains, (bar.get_width() for bar in bars), strict=True))
        assert widths == pytest.approx({"docs": 0, "source": 0, "readme": 0, "noise": 0, **shares})
    silent = [replace(row, swapped_utility=None, swapped_importance=None, odds_weights={}) for row in rows["opus"]]
    assert figures.signal_figure(runs, {"opus": silent}, "odds_weights", "number") is None
    assert figures.swapped_figure(runs, {"opus": silent}, inks) is None
    assert figures.swapped_domains_figure({"opus": [replace(row, share_swapped_in={}) for row in silent]}) is None


def test_a_folder_of_runs_is_told_to_be_one(folders: list[Path]) -> None:
    with pytest.raises(DataError, match=rf"there are runs in it, name those: {folders[1]} {folders[0]}$"):
        load_run(folders[0].parent)


def test_a_page_that_cannot_be_written_is_one_line(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/page.html: the page cannot be written \(.*\); name another file"):
        report(folders[0], "--out", tmp_path / "file" / "page.html")


@pytest.mark.usefixtures("coarse")
def test_report_warns_of_a_plateau(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name, start=1500, steps=1560, seed=3) for name in ("uniform", "opus")]
    page = report(*folders, "--out", tmp_path / "page.html")
    assert "on such a plateau" in page


@pytest.mark.usefixtures("coarse")
def test_report_tells_folders_of_one_name_apart(folders: list[Path], tmp_path: Path) -> None:
    for seed in ("seed1", "seed2"):
        write_run(tmp_path / seed / "opus", "opus", steps=130)
    page = report(tmp_path / "seed1/opus", tmp_path / "seed2/opus", "--out", tmp_path / "page.html")
    assert [row[0] for row in cells(page)[1:3]] == ["seed1/opus", "seed2/opus"]
    with pytest.raises(DataError, match="named twice"):
        report(folders[0], folders[0], "--out", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


@pytest.mark.usefixtures("coarse")
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


def test_digest_of_choices(folders: list[Path]) -> None:
    run = load_run(folders[1])
    found = summarise_choices(run, 120)
    assert [each.step for each in found.spreads] == list(range(120, 240))
    values = np.random.default_rng(130).normal(size=64) * 1e-3
    spread = found.spreads[10]
    assert spread.quantiles == pytest.approx(np.quantile(values, QUANTILES))
    assert spread.picked == pytest.approx(np.median(values[values >= np.median(values)]))
    best = found.best[0]
    assert (best.sequence, best.step, best.utility, best.picked, best.domain) == (700, 140, 1.0, True, "docs")
    assert best.deviations == pytest.approx(math.sqrt(63), rel=0.01)
    deviations = [each.deviations for each in (*found.best, *reversed(found.worst))]
    assert deviations == sorted(deviations, reverse=True)
    assert len({each.sequence for each in found.best}) == len(found.best) == len(found.worst) == 5
    rows = [candidates_of(step, True) for step in range(100, 240)]
    picks = np.concatenate([each["sequence"][each["picked"]] for each in rows])
    assert found.counts.tolist() == np.unique(picks, return_counts=True)[1].tolist()
    before = set(picks[: 32 * 120].tolist())  # of steps 100 to 219
    last = rows[120].picks()["sequence"]
    assert dict(found.repeat_share)[220] == pytest.approx(sum(int(n) in before for n in last) / 32)


@pytest.mark.slow
@pytest.mark.usefixtures("coarse")
def test_a_page_shows_repeats_and_the_text_that_stood_out(folders: list[Path], tmp_path: Path) -> None:
    asked: list[int] = []

    def texts(path: Path, sequences: Sequence[int]) -> list[tuple[str, str]]:
        assert path == folders[1]
        asked.extend(sequences)
        return [(f"book{number}", f"number <{number}>\x00" + "x" * 900) for number in sequences]

    page = report(*folders, "--out", tmp_path / "page.html", texts=texts)
    assert asked[0] == 700
    assert len(asked) == 10
    assert "<pre>number &lt;700&gt;\ufffdxxx" in page
    assert "+7.9 sd, utility 1, step 140, picked; docs, book700" in page
    assert "…</pre>" in page
    assert "x" * 601 not in page
    counts = summarise_choices(load_run(folders[1])).counts
    (row,) = [row for row in cells(page) if row[0] == "opus" and len(row) == 8]
    assert row[1:4] == [f"{32 * 140:,}", f"{len(counts):,}", f"{counts.max()}"]
    assert row[4] == f"{(counts == 1).mean():.1%}"

    def gone(path: Path, sequences: Sequence[int]) -> list[tuple[str, str]]:
        raise DataError("corpus/: no such folder")

    page = report(*folders, "--out", tmp_path / "page.html", texts=gone)
    assert "The text of opus is not shown: corpus/: no such folder" in page
    assert "step 140, picked; docs, sequence 700" in page


@pytest.mark.usefixtures("coarse")
def test_seeds_of_an_arm_are_compared_with_a_p_value(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{method}_seed{seed}", method, pace=pace, steps=160, seed=seed)
        for method, pace in (("uniform", 1.0), ("opus", 1.5))
        for seed in (1, 2, 3)
    ]
    page = report(*paths, "--out", tmp_path / "page.html")
    runs = {path.name: load_run(path) for path in paths}
    assert [(arm.name, list(arm.runs)) for arm in find_arms(runs)] == [("uniform", [1, 2, 3]), ("opus", [1, 2, 3])]
    each = [compare(runs[f"uniform_seed{seed}"], runs[f"opus_seed{seed}"], 100) for seed in (1, 2, 3)]
    found = aggregate(each)
    assert found.p_value is not None
    assert f"(p = {found.p_value:.2g})" in page
    rows = cells(page)
    (row,) = [row for row in rows if row[:2] == ["opus", "3"]]
    assert row[2] == f"{found.final_loss:.4f} ± {found.final_loss_std:.4f}"
    assert row[5] == f"{found.p_value:.2g}"
    assert [row[-1] for row in rows if row[0].startswith("uniform_seed")][3:6] == ["baseline"] * 3
    assert ["selection.method", "uniform", "opus"] in rows


PROBE = """<script>
const pictures = [...document.images].map(each => [each.complete, each.naturalWidth, each.clientHeight]);
const wide = document.documentElement.scrollWidth > window.innerWidth;
console.error("the probe's own");
document.body.innerHTML = "";
document.title = JSON.stringify({pictures, wide});
</script>"""


def test_the_page_opens_in_a_browser(folders: list[Path], tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no Chromium here: none of {', '.join(names)} is on the PATH")
    page = report(*folders, "--out", tmp_path / "page.html", texts=lambda _, numbers: [("", "text")] * len(numbers))
    (tmp_path / "probed.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    opened = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1200,900"),
            *("--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            f"file://{tmp_path / 'probed.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = re.search(r"<title>(.*?)</title>", opened.stdout)
    assert told is not None, opened.stderr
    found = json.loads(told[1])
    assert len(found["pictures"]) == 11
    assert all(complete and width > 500 and height > 100 for complete, width, height in found["pictures"])
    assert not found["wide"]
    console = [line for line in opened.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    assert "the probe's own" in console[0]
