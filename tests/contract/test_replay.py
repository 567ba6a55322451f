"""Picks made again from a run folder: the same for every method, and a changed record is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaopus.__main__ import main
from megaopus.record.parquet import FOLDER, parts, read_part
from megaopus.selection import decide
from tests.exact.resume_runs import SELECTIONS, STEPS, settings, train
from tests.faults import Interrupted, at_step, interrupt

SMALL = ["selection.warmup_steps=2", "selection.rho=0.5"]
PRESCREEN = ["selection.warmup_steps=2", "selection.prescreen.slice=32", "selection.prescreen.refit=16"]
CASES = {
    "uniform": ["selection=uniform"],
    "dsir": ["selection=dsir"],
    "importance": ["selection=importance"],
    "opus": ["selection=opus"],
    "screened": ["selection=screened", *PRESCREEN, "selection.prescreen.every=2"],
    "opus_without_prior": SELECTIONS["predict"],
    "opus_exact": ["selection=opus_exact", *SMALL],
    "opus_cascade": ["selection=opus_cascade", *PRESCREEN, "selection.rho=0.25"],
    "cascade_with_a_floor": SELECTIONS["cascade"],
    "high_ppl": ["selection=high_ppl"],
    "mid_ppl": ["selection=mid_ppl"],
    "domain_oracle": ["selection=domain_oracle", "selection.guards.domain_floor=0.5"],
    "buffers_that_serve": ["selection=opus_exact", *SMALL, "selection.score_every=3"],
    "raw": ["selection=opus_boltzmann", *SMALL, "selection.utilities=raw", "selection.temperature=1e-3"],
    "alarm_of_pairs": ["selection=low_ppl", "selection.guards.min_distinct=1"],
    "repeats": ["selection=high_ppl", "selection.guards.exposure_window=5", "selection.rho=0.02"],
    "opus_paper": ["selection=opus_paper", "selection.sketch_dim=64", "selection.warmup_steps=2"],
    "greats": ["selection=greats", "selection.warmup_steps=2"],
    "diverse": ["selection=opus_exact", *SMALL, "selection.redundancy=1", "selection.score_every=2"],
    "diverse_cascade": ["selection=opus_cascade", *PRESCREEN, "selection.rho=0.25", "selection.redundancy=0.5"],
    "diverse_alarm": [
        *("selection=opus_exact", *SMALL, "selection.redundancy=1", "selection.guards.min_unique=1"),
        *("selection.guards.domain_floor=0.5", "selection.guards.exposure_window=5"),
    ],
}


def replayed(run: Path, steps: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = main(["report", str(run), "--replay", steps])
    said = capsys.readouterr()
    return status, (said.out + said.err).splitlines()


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_made_again(
    case: str, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    run = tmp_path / "run"
    assert train(settings(corpus, run, *CASES[case])) == 0
    assert replayed(run, "all", capsys) == (0, [f"{STEPS} identical, 0 DIFFERENT, 0 not on record"])
    corpus.rename(tmp_path / "gone")
    status, lines = replayed(run, "all", capsys)
    alarms = sum("tokens, which are in the corpus alone" in line for line in lines)
    assert (alarms > 0) == (case == "alarm_of_pairs")
    assert status == (3 if alarms else 0)
    assert lines[-2].startswith("without the corpus (")
    assert lines[-1] == f"{STEPS - alarms} identical, 0 DIFFERENT, {alarms} not on record"


def test_what_is_not_on_record_is_said(tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bound = "logging.overlaps_mb=0.0002"  # 4 picks of 8 candidates are 256 bytes
    assert train(settings(tiny_corpus, tmp_path, *CASES["greats"], "train.steps=4", bound)) == 0
    status, lines = replayed(tmp_path, "1,3", capsys)
    assert status == 3
    expected = "the picks depend on inner products of 8 updates, which this step did not keep (logging.overlaps_mb)"
    assert lines[-2] == f"step 3: not on record: {expected}"


def test_a_changed_overlap_is_seen(tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that the picks hang on: with what was picked first now much like the second."""
    run = tmp_path / "run"
    assert train(settings(tiny_corpus, run, *CASES["greats"], "checkpoint.every=0")) == 0
    (part,) = parts(run / FOLDER)
    rows = read_part(part).to_pylist()[8 * 6 : 8 * 7]
    picked = [at for at, row in enumerate(rows) if row["picked"]]
    assert [at for at, row in enumerate(rows) if row["overlaps"]] == picked
    first, *others = sorted(picked, key=lambda at: -rows[at]["utility"])
    for at in picked:
        assert rows[at]["overlaps"][at] == rows[at]["squared_norm"]
        assert rows[at]["overlaps"][first] == pytest.approx(rows[first]["overlaps"][at], rel=1e-12)
    overlaps = list(rows[first]["overlaps"])
    for at in others:
        overlaps[at] = 1e6
    altered(run, 6, overlaps={first: overlaps})
    status, lines = replayed(run, "5,6", capsys)
    assert status == 1
    assert lines[0].startswith("step 5: identical: greats")
    assert lines[1].startswith("step 6: DIFFERENT: picked in the record only")
    altered(run, 6, overlaps={first: overlaps[1:]})
    status, lines = replayed(run, "6", capsys)
    assert status == 2
    assert "step 6: overlaps of another number of candidates" in lines[0]


def altered(run: Path, step: int, **columns: dict[int, object]) -> None:
    """Other values in the log: column -> {row of the step: value}."""
    (path,) = parts(run / FOLDER)
    table = read_part(path)
    first = table["step"].to_pylist().index(step)
    for name, changes in columns.items():
        values = table[name].to_pylist()
        for at, value in changes.items():
            values[first + at] = value
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def drawn(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by Boltzmann sampling, whose log is one part."""
    run = tmp_path_factory.mktemp("drawn") / "run"
    assert train(settings(tiny_corpus, run, "selection=opus_boltzmann", *SMALL, "checkpoint.every=0")) == 0
    return run


def test_a_changed_log_is_seen(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (part,) = parts(drawn / FOLDER)
    rows = read_part(part).to_pylist()[8 * 6 : 8 * 7]
    taken, left = (next(at for at, row in enumerate(rows) if row["picked"] is kind) for kind in (True, False))
    best = max(range(8), key=lambda at: rows[at]["utility"])
    changes = {
        "pick": {"picked": {taken: False, left: True}},
        "utility": {"utility": {best: rows[best]["utility"] - 1}},
        "not scored": {"utility": {left: None}},
        "id": {"id": {left: 99999}},
        "domain": {"domain": {left: "docs" if rows[left]["domain"] != "docs" else "code"}},
        "probability": {"probability": {left: rows[left]["probability"] * 1.001}},
        "exposures": {"exposures": {taken: 2}},
    }
    said = {}
    for name, columns in changes.items():
        run = tmp_path / name
        shutil.copytree(drawn, run)
        altered(run, 6, **columns)
        status, lines = replayed(run, "5,6,7", capsys)
        assert status == 1, name
        assert lines[0].startswith("step 5: identical: opus, 4 of 8 candidates")
        assert lines[1].startswith("step 6: DIFFERENT: "), name
        assert lines[2].startswith("step 7: identical")
        said[name] = lines[1]
    assert str(rows[taken]["id"]) in said["pick"]
    assert "when made again only" in said["pick"]
    assert "the id of 1 candidates is not that of the stream" in said["id"]
    assert "1 probabilities" in said["probability"]
    assert "other candidates were scored" in said["not scored"]


def test_what_an_older_version_picked_otherwise_is_told_from_a_changed_record(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rules of version 0.1 redundancy grew with the steps that a buffer serves."""
    rule = decide._Penalty.__call__
    monkeypatch.setattr(decide._Penalty, "__call__", lambda self, pick: rule(self, pick) * 2)
    diverse = ["selection=opus_exact", *SMALL, "selection.redundancy=20", "selection.score_every=2"]
    run = tmp_path / "run"
    assert train(settings(tiny_corpus, run, *diverse)) == 0
    monkeypatch.undo()
    status, lines = replayed(run, "all", capsys)
    assert (status, "DIFFERENT: picked in the record only" in lines[0]) == (1, True)
    path = run / "launches" / "000" / "environment.json"
    environment = json.loads(path.read_text())
    assert environment.pop("picking") == decide.PICKING
    path.write_text(json.dumps(environment))
    status, lines = replayed(run, "all", capsys)
    assert status == 3
    older = "not on record: the picks depend on rules of an older version (megaopus 0.2.0"
    assert older in lines[0]
    assert lines[0].endswith("which can make them: redundancy was score_every times as strong")
    assert ", 0 DIFFERENT, " in lines[-1]


def test_other_settings_are_seen(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (old, new) in enumerate({"temperature: 0.9": "temperature: 0.5", "seed: 1234": "seed: 1235"}.items()):
        run = tmp_path / str(number)
        shutil.copytree(drawn, run)
        config = run / "launches" / "000" / "config.yaml"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new, 1))
        assert replayed(run, "6", capsys)[0] == 1


def test_a_resumed_run_is_replayed_with_the_settings_of_each_launch(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = settings(tiny_corpus, run, "selection=high_ppl", "train.steps=8", "logging.selection_every=2")
    with at_step(6, interrupt), pytest.raises(Interrupted):
        train(first)
    changed = "selection.method,selection.sampler,selection.warmup_steps,train.steps"
    again = settings(tiny_corpus, run, "selection=opus_boltzmann", *SMALL, f"resume_allow=[{changed}]")
    again.append("logging.selection_every=3")
    assert train(again) == 0
    status, lines = replayed(run, "all", capsys)
    assert status == 3
    away = [int(line.split(":")[0].removeprefix("step ")) for line in lines if "sampled away" in line]
    assert away == [1, 3, 4, 5, 7, 8]
    assert lines[-1] == f"{STEPS - 6} identical, 0 DIFFERENT, 6 not on record"
    assert [line.split(", ")[0] for line in replayed(run, "2,6", capsys)[1][:2]] == [
        "step 2: identical: high_ppl",
        "step 6: identical: opus",
    ]


def test_what_cannot_be_replayed_is_an_error(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "step 10 is not recorded in selection.jsonl, which has steps 0 to 9" in replayed(drawn, "10", capsys)[1][0]
    assert "'x' is not a step" in replayed(drawn, "3,x", capsys)[1][0]
    status, lines = replayed(tmp_path, "3", capsys)
    assert status == 2
    assert "selection.jsonl: missing" in lines[0]
    run = tmp_path / "run"
    shutil.copytree(drawn, run)
    shutil.rmtree(run / FOLDER)
    status, lines = replayed(run, "3", capsys)
    assert (status, lines[0]) == (3, lines[0])
    assert "choices/ has no row of it" in lines[0]
