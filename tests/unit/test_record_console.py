"""A person reads one line every few steps, each kind of warning once, no colour codes in files."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megaopus.events import Event, read_event
from megaopus.record.console import Console, progress
from megaopus.record.formatting import format_bytes, format_count, format_duration, format_lr
from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, *, loss: float = 3.0, **more: int) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=(step + 1) * 8192,
        loss=loss,
        grad_norm=0.912,
        lr=3e-4,
        time_s=0.2 * (step + 1),
        step_s=0.2,
        select_s=0.05,
        **more,
    )


def chosen(step: int, docs: float = 0.75, method: str = "opus") -> SelectionRecord:
    return SelectionRecord(
        step=step,
        method=method,
        candidates=64,
        picked=32,
        share={"docs": docs, "noise": 1 - docs},
        pool_share={"docs": 0.25, "noise": 0.75},
        ess=30.6,
        max_p_ratio=4.0,
    )


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_progress_line() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(4000, 10, stream, clock)
    for step in range(20):
        clock.now += 0.25  # 0.05 s of each go into validation
        console.step(record(step, loss=3.0 + step % 10 / 10), chosen(step, docs=0.6 + 0.2 * (step % 2)))
    legend, _, second = lines(stream)
    assert legend.startswith("in the lines below | grad: norm of the gradient | lr: learning rate | sel: time spent")
    assert "ess: " in legend
    assert "mem: " not in legend, "it explains what is there"
    assert second == (
        "step 20/4000 0.5% | loss 3.450 | grad 0.91 | lr 3.0e-4 | 41.0k tok/s | sel 25.0% time, 32 of 64, ess 31/64 | "
        "docs .25->.70 | eta 16m25s"
    )


def test_what_utilities_changed_and_by_which_weights() -> None:
    stream = io.StringIO()
    console = Console(100, 2, stream, Clock())
    for step, changed in ((0, 0.25), (1, 0.5)):
        weights = {"importance": 0.94, "utility": 1.5, "loss": -0.26 * step}
        console.step(record(step), replace(chosen(step), changed_by_utilities=changed, odds_weights=weights))
    said = "utilities changed 38% of picks (weights importance +0.9, utility +1.5, loss -0.3) |"
    assert said in stream.getvalue()
    stream.truncate(0)
    for step in (2, 3):
        console.step(record(step), replace(chosen(step), changed_by_utilities=0.0))
    assert "utilities changed 0% of picks |" in stream.getvalue()


def test_a_uniform_step_shows_no_sample_size() -> None:
    stream = io.StringIO()
    Console(100, 1, stream, Clock()).step(record(0), chosen(0, method="uniform"))
    assert "sel 25.0% time, 32 of 64 uniformly |" in stream.getvalue()
    assert "ess" not in stream.getvalue()


def test_a_run_that_draws_uniformly_tells_nothing_of_its_choices() -> None:
    stream = io.StringIO()
    Console(100, 1, stream, Clock(), selects=False).step(record(0), chosen(0, method="uniform"))
    assert "sel" not in stream.getvalue()
    assert "32 of 64" not in stream.getvalue()


def test_a_run_without_selection_and_the_last_step() -> None:
    stream = io.StringIO()
    console = Console(3, 2, stream, Clock())
    for step in range(3):
        console.step(record(step), None)
    _, first, last = lines(stream)
    assert first.startswith("step 2/3 66.7% | loss 3.000")
    assert first.endswith("tok/s | eta 0s")
    assert last == "step 3/3 100.0% | loss 3.000 | grad 0.91 | lr 3.0e-4 | 41.0k tok/s"


def test_a_resumed_run_takes_its_pace_from_its_own_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    clock.now = 1000.0
    console = Console(200, 10, stream, clock)
    for step in range(100, 110):
        clock.now += 0.2
        console.step(record(step), None)
    assert "step 110/200 55.0%" in stream.getvalue()
    assert "41.0k tok/s" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("eta 18s")


def test_warnings_first_of_each_kind_then_counted() -> None:
    stream = io.StringIO()
    console = Console(100, 2, stream, Clock())
    for step in range(4):
        text = f"{step + 1} candidates with a non-finite utility: ids {step}, {step + 7}"
        console.event(Event("selection.not_finite", text, ids=[step, step + 7]))
        if step == 1:
            console.event(Event("update.skipped.spike", "step 1: update skipped"))
        console.step(record(step), chosen(step))
    console.event(Event("checkpoint.slow", "checkpoint slow"))
    console.close()
    warnings = [line for line in lines(stream) if line.startswith("WARNING")]
    assert warnings[0].startswith("WARNING 1 candidates with a non-finite utility: ids 0, 7")
    assert warnings[1].startswith("WARNING step 1: update skipped")
    assert warnings[2].startswith("WARNING checkpoint slow")
    assert warnings[3:] == ["WARNING 4 times in all, first: 1 candidates with a non-finite utility: ids 0, 7"]
    progress_lines = [line for line in lines(stream) if line.startswith("step")]
    assert "| 3 warnings |" in progress_lines[0]
    assert "| 5 warnings |" in progress_lines[1]


def test_events_count_by_their_kind_whatever_they_say() -> None:
    stream = io.StringIO()
    console = Console(100, 2, stream, Clock())
    for kind, text in (("a.b", "one"), ("a.c", "one"), ("a.b", "quite another thing")):
        console.event(Event(kind, text))
    console.close()
    assert [line.split(" (")[0] for line in lines(stream)] == [
        "WARNING one",
        "WARNING one",
        "WARNING 2 times in all, first: one",
    ]


def test_totals_show_no_blanked_numbers() -> None:
    """The kind of a sentence of an older version is itself with its numbers blanked."""
    stream = io.StringIO()
    console = Console(100, 2, stream, Clock())
    for number in (-1.5, 2):
        console.event(read_event(f"the utility fell by {number}, 10% of it"))
    console.close()
    assert lines(stream)[-1] == "WARNING 2 times in all, first: the utility fell by -1.5, 10% of it"


def test_the_last_line_says_where_the_run_lies_and_what_comes_next() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(3, 1, stream, clock)
    console.step(record(0), None)
    clock.now = 130
    console.closing(None, "another command")
    console.validation(ValidationRecord(step=3, tokens=24576, time_s=0.6, loss=3.25, domains={"docs": 3.25}))
    console.closing(Path("runs/a/checkpoints/step_00000003"), "python -m megaopus report runs/a")
    stopped, _, done = lines(stream)[2:]
    assert stopped == (
        "done: 1 of 3 steps | 2m10s in this process | nothing saved, for no update was made | next: another command"
    )
    assert done == (
        "done: 3 of 3 steps | 2m10s in this process | last validation loss 3.2500 | "
        "saved in runs/a/checkpoints/step_00000003 | next: python -m megaopus report runs/a"
    )


def test_a_narrow_terminal_breaks_lines_between_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    console = Console(4000, 1, stream, Clock())
    console.step(record(0), chosen(0))
    console.note("1 rank on cpu | 1,071,872 parameters, fp32, adamw, megatron | 30 steps of 8 x 128 tokens")
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines(stream)]
    assert all(len(line) <= 60 for line in plain)
    assert any("grad" in line and "lr" in line for line in plain), "as many fields as fit"
    assert plain[-2:] == ["1 rank on cpu | 1,071,872 parameters, fp32, adamw, megatron", "  30 steps of 8 x 128 tokens"]


@pytest.mark.parametrize(
    ("memory", "shown"),
    [
        ([{"memory_resident": 3 << 28, "memory_estimate": 11 << 27}, {"memory_resident": 5 << 28}], "mem 1.2G"),
        (
            [{"memory_resident": 5 << 28}, {"memory_resident": 3 << 28, "memory_estimate": 11 << 27}],
            "1.2G of 1.4G est.",
        ),
        ([{"memory_allocated": 70 << 30, "memory_reserved": 75 << 30, "memory_resident": 9 << 30}] * 2, "mem 70.0G"),
    ],
)
def test_the_peak_of_memory_stands_beside_its_estimate(memory: list[dict[str, int]], shown: str) -> None:
    """Of the device where there is one, else of the process; the largest since the last line."""
    stream = io.StringIO()
    console = Console(100, 2, stream, Clock())
    for step, peaks in enumerate(memory):
        console.step(record(step, **peaks), None)
    parts = [part for part in lines(stream)[1].split(" | ") if part.startswith("mem")]
    assert len(parts) == 1
    assert parts[0].endswith(shown)
    assert "mem" not in line_of(record(0))


def line_of(step: StepRecord) -> str:
    stream = io.StringIO()
    Console(100, 1, stream, Clock()).step(step, None)
    return lines(stream)[-1]


def test_validation_line() -> None:
    stream = io.StringIO()
    domains = {"docs": 3.0, "noise": 7.0}
    validation = ValidationRecord(step=20, tokens=1280, time_s=9.0, loss=2.0, domains=domains)
    Console(100, 1, stream, Clock()).validation(validation)
    assert lines(stream) == ["validation after 20 steps, 1.28k tokens | loss 2.0000 | docs 3.000, noise 7.000"]


def test_the_target_loss_is_the_first_number() -> None:
    stream = io.StringIO()
    target, domains = {"items": 2.5, "nearest": 1.5}, {"docs": 3.0, "noise": 7.0}
    validation = ValidationRecord(step=20, tokens=1280, time_s=9.0, loss=2.0, target=target, domains=domains)
    console = Console(20, 1, stream, Clock())
    console.validation(validation)
    console.closing(Path("saved"), "another command")
    shown, closing = lines(stream)
    start = "validation after 20 steps, 1.28k tokens | target loss 2.0000"
    assert shown == f"{start} (items 2.500, nearest 1.500) | mean over all domains 5.0000 | docs 3.000, noise 7.000"
    assert " | last target loss 2.0000 | mean over all domains 5.0000 | saved in saved | " in closing


def test_no_colour_codes_outside_a_terminal_and_no_field_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        console = Console(100, 1, stream, Clock())
        console.step(record(0), chosen(0))
        console.event(Event("selection.fallback", "fell back [to] uniform"))
        console.note("a note " * 40)
    assert "\x1b" not in plain.getvalue()
    assert "\x1b[1mstep 1/100" in terminal.getvalue()
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert shown.replace("\n  ", " | ") == plain.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1.00k"),
        (1234567, "1.23M"),
        (41234, "41.2k"),
        (412000, "412k"),
        (2.5e12, "2.50T"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0B"), (1023, "1023B"), (1 << 20, "1.0M"), (1288490189, "1.2G"), (139 << 30, "139G")]
)
def test_sizes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (8040, "2h14m"), (90000, "1d01h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("lr", "text"), [(3e-4, "3.0e-4"), (0.02, "2.0e-2"), (1.0, "1.0e0"), (0.0, "0.0e0"), (3e-11, "3.0e-11")]
)
def test_learning_rates(lr: float, text: str) -> None:
    assert format_lr(lr) == text


def test_progress_without_a_terminal_is_a_plain_line_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress("tokenising", 100, stream, clock) as advance:
        for _ in range(100):
            clock.now += 0.25
            advance()
    assert lines(stream) == [
        "tokenising: 20/100 20%, eta 20s",
        "tokenising: 40/100 40%, eta 15s",
        "tokenising: 60/100 60%, eta 10s",
        "tokenising: 80/100 80%, eta 5s",
        "tokenising: 100/100 100%, eta 0s",
        "tokenising: 100 in 25s",
    ]


def test_progress_of_unknown_length() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress("reading", None, stream, clock) as advance:
        clock.now += 6
        advance(1500)
    assert lines(stream) == ["reading: 1.50k", "reading: 1.50k in 6s"]


def test_progress_of_work_that_fails_does_not_say_done() -> None:
    def work() -> None:
        with progress("reading", 10, stream):
            raise OSError("disk full")

    stream = io.StringIO()
    with pytest.raises(OSError, match="disk full"):
        work()
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar() -> None:
    stream = Terminal()
    with progress("tokenising", 3, stream) as advance:
        for _ in range(3):
            advance()
    assert "tokenising" in stream.getvalue()
    assert "3/3" in stream.getvalue()
