"""Files of the run folder: complete lines only, and the same after a kill and resume."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megaopus.errors import DataError
from megaopus.events import Event
from megaopus.record import parquet as choices_module
from megaopus.record.config import LoggingConfig
from megaopus.record.metrics import metrics_of, read_record, write_record
from megaopus.record.parquet import FOLDER, ChoiceSink, first_step, parts, pick_counts, read_part
from megaopus.record.recorder import Recorder
from megaopus.record.sinks import EVENTS_FILE, JsonlSink
from megaopus.record.types import NOT_RECORDED, SelectionRecord, StepRecord, ValidationRecord
from megaopus.selection.candidate_table import CandidateTable, Lists, Masked

MEASURED = {each.name for kind in (StepRecord, ValidationRecord) for each in metrics_of(kind) if not each.reproducible}
SPIKE = Event("update.skipped.spike", "step 6: a spike", reason="a spike", ids=[6, 7])
SLOW = Event("rank.slow", "rank 1 is slow", rank=1)


def step_record(step: int, *, loss: float | None = None, skip_reason: str | None = None) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=(step + 1) * 64,
        loss=4 - step / 10 if loss is None else loss,
        grad_norm=1.0,
        lr=1e-3,
        time_s=random.random() + step,
        step_s=random.random() + 1e-3,
        select_s=random.random() * 1e-3,
        skip_reason=skip_reason,
    )


def selection_record(step: int, events: tuple[Event, ...] = ()) -> SelectionRecord:
    return SelectionRecord(
        step=step,
        method="opus",
        candidates=4,
        picked=1,
        share={"docs": 1.0},
        pool_share={"docs": 0.25, "noise": 0.75},
        ess=2.5,
        max_p_ratio=2.0,
        events=list(events),
        realised_fall=0.1357924,
        choices=candidates_of(step),
    )


def candidates_of(step: int) -> CandidateTable:
    columns = {
        "id": np.arange(4 * step, 4 * step + 4),
        "sequence": np.arange(4 * step, 4 * step + 4) % 10,
        "domain": np.array([0, 1, 1, 1]),
        "picked": np.array([True, False, False, False]),
        "probability": np.array([0.5, 0.25, 0.25, 0.0]),
        "exposures": np.array([1, 2, 1, 1]),
    }
    if step % 2:
        scored = np.array([True, True, True, False])
        columns["utility"] = Masked(np.array([1e-5 / 3, np.nan, np.inf, np.nan]), scored)
        columns["squared_norm"] = Masked(np.array([0.5, 2.0, np.inf, np.nan]), scored)
        overlaps = np.array([[-0.1, 2.0, 0.3, np.nan], [0.5, -0.1, 0.7, np.nan]])
        columns["overlaps"] = Lists(np.array([1, 0]), overlaps)
    return CandidateTable(columns, ["docs", "noise"])


def logged(folder: Path) -> list[dict]:
    """Every row of choices/, with nan as text so that rows can be compared."""

    def comparable(value: Any) -> Any:
        if isinstance(value, list):
            return [comparable(each) for each in value]
        return str(value) if value != value else value

    found = [row for path in parts(folder / FOLDER) for row in read_part(path).to_pylist()]
    return [{key: comparable(value) for key, value in row.items()} for row in found]


def validation_record(step: int) -> ValidationRecord:
    domains = {"docs": 3.0, "noise": 7.0}
    target, time_s = {"items": 4 - step / 5, "nearest": 4.0}, random.random()
    loss = 4 - step / 10
    return ValidationRecord(step=step, tokens=64 * step, time_s=time_s, loss=loss, target=target, domains=domains)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_timing(path: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows(path)]


def train(folder: Path, start: int, stop: int, every: int = 4) -> None:
    """The trainer's calls for the updates from ``start`` up to ``stop``, cut off without a close."""
    monitor = Recorder(LoggingConfig(every=1000), folder, 12, True, start)
    if start == 0:
        monitor.validation(validation_record(0))
    for step in range(start, stop):
        spike = step == 6
        monitor.step(
            step_record(step, skip_reason="a spike" if spike else None),
            selection_record(step),
            [SPIKE] if spike else [],
        )
        if (step + 1) % every == 0:
            monitor.validation(validation_record(step + 1))
            monitor.flush()  # as before a checkpoint


def test_every_row_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "deep" / "metrics.jsonl")
    for step in range(3):
        sink.write({"step": step})
        assert len(rows(tmp_path / "deep" / "metrics.jsonl")) == step + 1


def test_non_finite_numbers_are_strings_that_float_reads(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "rows.jsonl")
    sink.write({"step": 0, "list": [math.nan, 1.5], "nested": {"inf": math.inf}, "low": -math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((tmp_path / "rows.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 0, "list": ["nan", 1.5], "nested": {"inf": "inf"}, "low": "-inf"}
    assert float(row["low"]) == -math.inf


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 123456789.123456789]
    JsonlSink(tmp_path / "rows.jsonl").write({"step": 0, "values": values})
    assert rows(tmp_path / "rows.jsonl")[0]["values"] == values


@pytest.mark.parametrize("part_rows", [1 << 17, 12, 4])
@pytest.mark.parametrize("killed_at", [4, 6, 8, 11])
def test_a_killed_and_resumed_run_leaves_the_files_of_a_straight_one(
    tmp_path: Path, killed_at: int, part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints every 4 updates; the kill comes later, in the middle of a line and of a part."""
    monkeypatch.setattr(choices_module, "PART_ROWS", part_rows)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(straight, 0, 12)
    train(resumed, 0, killed_at)
    for name in ("metrics.jsonl", "selection.jsonl", EVENTS_FILE):
        with (resumed / name).open("a") as file:
            file.write('{"kind":"step","st')
    (resumed / FOLDER / ".part-00000008.tmp").write_bytes(b"PAR1 half")
    assert logged(resumed) == [row for row in logged_of(12) if row["step"] < (steps_on_disk(resumed))]
    train(resumed, killed_at // 4 * 4, 12)
    assert logged(resumed) == logged(straight) == logged_of(12)
    assert not list(resumed.rglob("*.tmp"))
    for name in ("metrics.jsonl", "selection.jsonl"):
        assert without_timing(resumed / name) == without_timing(straight / name)
    assert rows(resumed / EVENTS_FILE) == [{"step": 6, "event": SPIKE.as_row()}]
    assert len(rows(straight / "metrics.jsonl")) == 12 + 4


def test_a_validation_made_again_after_resume_is_written_once(tmp_path: Path) -> None:
    train(tmp_path, 0, 4)
    monitor = Recorder(LoggingConfig(), tmp_path, 12, True, 4)
    monitor.validation(validation_record(4))
    monitor.validation(validation_record(5))
    steps = [row["step"] for row in rows(tmp_path / "metrics.jsonl") if row["kind"] == "validation"]
    assert steps == [0, 4, 5]


def test_truncate_keeps_bytes_and_says_what_went(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(tmp_path, 0, 8)
    lines = path.read_bytes().splitlines(keepends=True)
    assert JsonlSink(path).truncate_after(8) == []
    assert path.read_bytes() == b"".join(lines)
    messages = JsonlSink(path).truncate_after(4)
    assert messages == ["metrics.jsonl: 5 rows after step 4 of an earlier run dropped, 6 kept"]
    assert path.read_bytes() == b"".join(lines[:6])
    with path.open("ab") as file:
        file.write(lines[6][:20])
    assert JsonlSink(path).truncate_after(4) == ["metrics.jsonl: a half-written last line dropped, 6 rows kept"]
    assert path.read_bytes() == b"".join(lines[:6])
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".tmp"] == []


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":0}\n{"step":1}')
    assert JsonlSink(path).truncate_after(5) == []
    JsonlSink(path).write({"step": 2})
    assert [row["step"] for row in rows(path)] == [0, 1, 2]


def test_a_fresh_start_in_the_same_folder_keeps_nothing(tmp_path: Path) -> None:
    train(tmp_path, 0, 4)
    train(tmp_path, 0, 2)
    assert [(row["kind"], row["step"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        ("validation", 0),
        ("step", 0),
        ("step", 1),
    ]


@pytest.mark.parametrize(
    ("line", "message"), [("{oops", "line 2: not JSON"), ("{}", "line 2: no whole number"), ("7", "line 2: expected")]
)
def test_a_broken_line_stops_the_resume_and_changes_nothing(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step":0}}\n{line}\n{{"step":2}}\n'
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        Recorder(LoggingConfig(), tmp_path, 10, True, 1)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_writer_rank_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Recorder(LoggingConfig(every=1, wandb="offline"), tmp_path / "run", 10, False)
    monitor.step(step_record(0), selection_record(0, (SLOW,)), [SPIKE])
    monitor.validation(validation_record(1))
    monitor.note("note")
    monitor.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_selection_file_can_be_switched_off(tmp_path: Path) -> None:
    monitor = Recorder(LoggingConfig(selection=False), tmp_path, 10, True)
    monitor.step(step_record(0), selection_record(0))
    monitor.step(step_record(1), None)
    monitor.close()
    monitor.close()
    assert [row["kind"] for row in rows(tmp_path / "metrics.jsonl")] == ["step", "step"]
    assert not (tmp_path / "selection.jsonl").exists()


def test_events_are_facts_in_the_files_and_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the selection with it, the others apart; a sentence is an event of the kind that it is like."""
    fallback = Event("selection.fallback", "picked uniformly", candidates=4)
    seen: list[StepRecord] = []
    monitor = Recorder(LoggingConfig(every=1), tmp_path, 10, True, meters=[lambda record: seen.append(record) or {}])
    monitor.step(step_record(0), selection_record(0, (fallback,)), [fallback, SPIKE, "rank 3 waits 20%"])
    monitor.close()
    sentence = {"kind": "rank # waits #%", "text": "rank 3 waits 20%"}
    assert rows(tmp_path / "selection.jsonl")[0]["events"] == [fallback.as_row()]
    assert rows(tmp_path / EVENTS_FILE) == [{"step": 0, "event": row} for row in (SPIKE.as_row(), sentence)]
    assert SPIKE.as_row()["ids"] == [6, 7]
    said = capsys.readouterr().out
    assert said.count("WARNING") == 3
    assert "| 3 warnings |" in said
    assert [record.step for record in seen] == [0]


def test_events_are_kept_where_the_selection_is_not_recorded(tmp_path: Path) -> None:
    fallback = Event("selection.fallback", "picked uniformly")
    monitor = Recorder(LoggingConfig(selection=False), tmp_path, 10, True)
    monitor.step(step_record(3), selection_record(3, (fallback,)), [SLOW])
    monitor.close()
    assert rows(tmp_path / EVENTS_FILE) == [{"step": 3, "event": row.as_row()} for row in (fallback, SLOW)]


def test_meters_fill_the_record_in_order(tmp_path: Path) -> None:
    monitor = Recorder(
        LoggingConfig(),
        tmp_path,
        10,
        True,
        meters=[
            lambda record: {"memory_resident": 100 + record.step},
            lambda record: {"memory_estimate": 2 * (record.memory_resident or 0)},
        ],
    )
    monitor.step(step_record(5), None)
    monitor.close()
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["memory_resident"], row["memory_estimate"], row["memory_allocated"]) == (105, 210, None)


def test_a_row_of_a_record_is_read_back_as_that_record() -> None:
    step = step_record(3, skip_reason="a spike")
    chosen = selection_record(4, (SPIKE,))
    chosen.choices = None
    for record in (step, chosen, validation_record(2)):
        row = json.loads(json.dumps(write_record(record)))
        assert read_record(type(record), row) == record
        assert read_record(type(record), {**row, "of_a_newer_version": 1}) == record


def test_a_validation_of_an_older_version_has_no_target_and_a_mean() -> None:
    row = {"step": 3, "tokens": 8, "time_s": 1, "loss": 3.5, "domains": {"docs": 3.5, "noise": 7.0}}
    found = read_record(ValidationRecord, row)
    assert (found.loss, found.target, found.held_out, found.mean_loss) == (3.5, {}, {}, 5.25)
    named = read_record(ValidationRecord, {**row, "target": {"docs": 3.5}})
    assert (named.target, named.held_out) == ({"docs": 3.5}, {})
    lost = read_record(ValidationRecord, {**row, "target": {"docs": "nan"}, "domains": {"docs": "nan"}})
    assert lost.held_out == {}
    held = read_record(ValidationRecord, {**row, "target": {"docs": 3.0}})
    assert held.held_out == {"docs": 3.0}


def test_rows_of_version_0_1_are_read() -> None:
    """Without the metrics that came later; why an update was skipped is not in them; events are sentences."""
    old = {"step": 3, "tokens": 8, "loss": "nan", "grad_norm": 1, "lr": 1, "time_s": 1, "step_s": 1, "select_s": 0}
    applied, skipped = (read_record(StepRecord, {**old, "skipped": skipped}) for skipped in (False, True))
    assert (applied.skip_reason, skipped.skip_reason, skipped.skipped) == (None, NOT_RECORDED, True)
    assert math.isnan(applied.loss)
    assert applied.memory_resident is None
    row = {**selection_record(1).facts(), "events": ["alarm: 3 of 4", "alarm: 2 of 9"]}
    assert [event.kind for event in read_record(SelectionRecord, row).events] == ["alarm: # of #"] * 2
    with pytest.raises(ValueError, match="field 'tokens' is missing"):
        read_record(StepRecord, {"step": 1})
    with pytest.raises(ValueError, match="an event needs kind and text: 7"):
        read_record(SelectionRecord, {**row, "events": [7]})


def logged_of(steps: int) -> list[dict]:
    """Return what the log of a run must hold."""
    found = []
    for step in range(steps):
        utilities = [1e-5 / 3, "nan", math.inf, None] if step % 2 else [None] * 4
        norms = [0.5, 2.0, math.inf, None] if step % 2 else [None] * 4
        overlaps = [[0.5, -0.1, 0.7, "nan"], [-0.1, 2.0, 0.3, "nan"], None, None] if step % 2 else [None] * 4
        for at in range(4):
            found.append(
                {
                    "step": step,
                    "id": 4 * step + at,
                    "sequence": (4 * step + at) % 10,
                    "domain": "docs" if at == 0 else "noise",
                    "utility": utilities[at],
                    "prescreen_score": None,
                    "loss": None,
                    "odds": None,
                    "exposures": [1, 2, 1, 1][at],
                    "squared_norm": norms[at],
                    "overlaps": overlaps[at],
                    "picked": at == 0,
                    "probability": [0.5, 0.25, 0.25, 0.0][at],
                }
            )
    return found


def steps_on_disk(folder: Path) -> int:
    return max((row["step"] for row in logged(folder)), default=-1) + 1


def test_a_row_per_step_and_a_row_per_candidate(tmp_path: Path) -> None:
    monitor = Recorder(LoggingConfig(), tmp_path, 10, True)
    for step in range(2):
        monitor.step(step_record(step), selection_record(step))
    assert not (tmp_path / FOLDER).exists()
    monitor.close()
    monitor.close()
    row = rows(tmp_path / "selection.jsonl")[0]
    assert (row["candidates"], row["picked"], row["share"], row["ess"]) == (4, 1, {"docs": 1.0}, 2.5)
    assert "choices" not in row
    assert logged(tmp_path) == logged_of(2)


def test_a_part_that_straddles_the_checkpoint_is_cut(tmp_path: Path) -> None:
    """As where the newest checkpoint is gone and the run goes on from the one before."""
    train(tmp_path, 0, 8, every=8)
    assert [first_step(path) for path in parts(tmp_path / FOLDER)] == [0]
    assert ChoiceSink(tmp_path / FOLDER).truncate_after(3) == [
        "choices: 20 rows after step 3 of an earlier run dropped, 12 kept"
    ]
    assert logged(tmp_path) == logged_of(3)
    assert ChoiceSink(tmp_path / FOLDER).truncate_after(3) == []
    assert len(ChoiceSink(tmp_path / FOLDER).truncate_after(0)) == 1
    assert parts(tmp_path / FOLDER) == []


@pytest.mark.parametrize("moment", ["write", "rename", "cut"])
def test_a_kill_while_a_part_is_written_leaves_a_readable_log(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 0, 8)

    def half(table: object, where: Path, **_: object) -> None:
        where.write_bytes(b"PAR1 half of it")
        raise KeyboardInterrupt

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(choices_module.os, "replace", killed)
        else:
            patch.setattr(pq, "write_table", half)
        with pytest.raises(KeyboardInterrupt):
            ChoiceSink(tmp_path / FOLDER).truncate_after(6) if moment == "cut" else train(tmp_path, 8, 12)
    assert logged(tmp_path) == logged_of(8)
    train(tmp_path, 4, 12)
    assert logged(tmp_path) == logged_of(12)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_part_that_cannot_be_read_stops_the_resume(tmp_path: Path) -> None:
    train(tmp_path, 0, 8)
    (part, _) = parts(tmp_path / FOLDER)
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DataError, match=r"part-00000000.parquet: cannot be read"):
        Recorder(LoggingConfig(), tmp_path, 10, True, 4)
    assert len(parts(tmp_path / FOLDER)) == 2


def test_a_full_disk_is_an_error_that_names_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monitor = Recorder(LoggingConfig(), tmp_path, 10, True)
    monitor.step(step_record(0), selection_record(0))
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(DataError, match=r"part-00000000.*No space left"):
            monitor.flush()
    monitor.close()
    assert logged(tmp_path) == logged_of(1)


@pytest.mark.parametrize(("megabytes", "kept"), [(1.0, 2), (64e-6, 2), (63e-6, 0), (0.0, 0)])
def test_overlaps_are_kept_up_to_a_size(megabytes: float, kept: int, tmp_path: Path) -> None:
    """Two chosen of four candidates: 64 bytes."""
    sink = ChoiceSink(tmp_path / FOLDER, overlaps_mb=megabytes)
    sink.add(1, candidates_of(1))
    sink.flush()
    rows = logged(tmp_path)
    assert sum(row["overlaps"] is not None for row in rows) == kept
    assert [row["squared_norm"] for row in rows] == [0.5, 2.0, math.inf, None]


def test_sampling_bounds_the_log_and_keeps_every_pick(tmp_path: Path) -> None:
    """A 16th of the steps keep all of 512 candidates, of which 8 are picked."""
    size = {}
    for every in (1, 16):
        sink = ChoiceSink(tmp_path / str(every) / FOLDER, every)
        rng = np.random.default_rng(0)
        for step in range(64):
            ids = rng.permutation(512) + 512 * step
            columns = {
                "id": ids,
                "sequence": ids % 300,
                "domain": ids % 2,
                "picked": np.arange(512) < 8,
                "probability": np.full(512, 1 / 512),
                "utility": rng.normal(size=512),
                "exposures": np.ones(512, dtype=np.int64),
            }
            sink.add(step, CandidateTable(columns, ["a", "b"]))
        sink.flush()
        size[every] = sum(path.stat().st_size for path in parts(tmp_path / str(every) / FOLDER))
    assert size[16] < size[1] / 8
    whole, sampled = logged(tmp_path / "1"), logged(tmp_path / "16")
    assert sampled == [row for row in whole if row["step"] % 16 == 0 or row["picked"]]
    counts = [pick_counts(tmp_path / str(every)) for every in (1, 16)]
    assert counts[0].tolist() == counts[1].tolist()
    assert (counts[0].sum(), len(counts[0])) == (512, len({row["sequence"] for row in whole if row["picked"]}))
    assert size[1] / len(whole) < 24  # bytes a row; 8 of them are the utility
