"""Takes what the training loop tells of a run: writes it to files, prints it, sends it to W&B and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaopus.events import Event, read_event
from megaopus.record.config import LoggingConfig
from megaopus.record.console import Console
from megaopus.record.metrics import write_record
from megaopus.record.parquet import FOLDER, ChoiceSink
from megaopus.record.sinks import (
    EVENTS_FILE,
    METRICS_FILE,
    RUN_ID_FILE,
    SELECTION_FILE,
    TASKS_FILE,
    JsonlSink,
    TensorBoardSink,
    WandbSink,
    read_rows,
)
from megaopus.record.types import SelectionRecord, StepRecord, TasksRecord, ValidationRecord

Meter = Callable[[StepRecord], Mapping[str, Any]]
"""Works out further metrics of a step, by name, from its record so far."""
SCORES = (TASKS_FILE, "eval.json", "eval_items", "contamination.json")
"""Of benchmarks: while the run trained, and of its checkpoints later."""
RECORD = (METRICS_FILE, SELECTION_FILE, EVENTS_FILE, FOLDER, RUN_ID_FILE, TensorBoardSink.FOLDER, *SCORES)
"""Files and folders of a record, in the run folder."""


class Recorder:
    """Writes metrics, selection, events and eval.jsonl, and choices/, prints, and feeds W&B and TensorBoard.

    On the writer rank only; on every other rank all methods do nothing.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: str | Path,
        total_steps: int,
        is_writer: bool,
        resume_step: int = 0,
        wandb_config: dict[str, Any] | None = None,
        meters: Iterable[Meter] = (),
        selects: bool = True,
    ):
        """``resume_step``: updates already done; rows of later ones, left by a killed run, are dropped.

        ``wandb_config``: the run's settings as plain values, shown beside its curves. ``meters``: called on each step's
        record, in order; what they find is put into it. ``selects``: as of Console. Raises DataError for a broken file
        of an earlier run, ConfigError if W&B or TensorBoard is asked for and not installed.
        """
        self._console: Console | None = None
        self._trackers: list[WandbSink | TensorBoardSink] = []
        if not is_writer:
            return
        run_dir = Path(run_dir)
        if config.wandb != "off":
            self._trackers.append(WandbSink(config.wandb_project, config.wandb, run_dir, run_dir.name, wandb_config))
        if config.tensorboard:
            self._trackers.append(TensorBoardSink(run_dir, resume_step))
        self._console = Console(total_steps, config.every, selects=selects)
        self._meters = list(meters)
        self._metrics = JsonlSink(run_dir / METRICS_FILE)
        self._selection = JsonlSink(run_dir / SELECTION_FILE)
        self._events = JsonlSink(run_dir / EVENTS_FILE)
        self._tasks = JsonlSink(run_dir / TASKS_FILE)
        self._choices = ChoiceSink(run_dir / FOLDER, config.selection_every, config.overlaps_mb)
        for sink in (self._metrics, self._selection, self._events, self._tasks, self._choices):
            for message in sink.truncate_after(resume_step):
                self._console.note(message)
        # A run killed between validation and the next update validates at that step again: one row is enough.
        self._validated = last_validation(self._metrics.path)
        self._write_selection = config.selection

    def step(self, record: StepRecord, selection: SelectionRecord | None, events: Sequence[Event | str] = ()) -> None:
        """Record one update and what happened in it; ``selection`` None if no batch was chosen from candidates.

        ``events`` may name those of ``selection`` again: equal ones count once. Those of ``selection`` are written with
        it, the others to events.jsonl. Events may be sentences, which count with those that differ in numbers only.
        """
        if self._console is None:
            return
        for meter in self._meters:
            record = replace(record, **meter(record))
        chosen = selection.events if selection is not None else []
        others = [event for event in map(read_event, events) if event not in chosen]
        self._metrics.write({"kind": "step", **write_record(record)})
        if selection is not None and self._write_selection:
            self._selection.write(selection.facts())
            if selection.choices is not None:
                self._choices.add(selection.step, selection.choices)
        for event in others if self._write_selection else [*chosen, *others]:
            self._events.write({"step": record.step, "event": event.as_row()})
        for event in (*chosen, *others):
            self._console.event(event)
        self._console.step(record, selection)
        for tracker in self._trackers:
            tracker.step(record, selection, [*chosen, *others])

    def validation(self, record: ValidationRecord) -> None:
        """Record one validation; a second one after the same update is shown but not written again."""
        if self._console is None:
            return
        if record.step != self._validated:
            self._metrics.write({"kind": "validation", **write_record(record)})
            self._validated = record.step
        self._console.validation(record)
        for tracker in self._trackers:
            tracker.validation(record)

    def tasks(self, record: TasksRecord) -> None:
        """Record what was scored on benchmarks; a run that goes on at this step scores again, and writes it then."""
        if self._console is None:
            return
        for line in record.lines():
            self._tasks.write(line)
        self._console.tasks(record)
        for tracker in self._trackers:
            tracker.tasks(record)

    def flush(self) -> None:
        """Put everything on disk: a checkpoint is about to say that these steps need not be taken again."""
        if self._console is not None:
            self._choices.flush()

    def note(self, text: str) -> None:
        """Print a line of information."""
        if self._console is not None:
            self._console.note(text)

    def closing(self, saved: Path | None, following: str) -> None:
        """Print the last line of a run that ends as it should; arguments as of Console."""
        if self._console is not None:
            self._console.closing(saved, following)

    def close(self) -> None:
        """Close the files, end what W&B and TensorBoard are told and sum the warnings up; may be called twice."""
        if self._console is None:
            return
        self._metrics.close()
        self._selection.close()
        self._events.close()
        self._tasks.close()
        self._choices.flush()
        self._console.close()
        while self._trackers:
            self._trackers.pop().close()


def last_validation(path: Path) -> int | None:
    """Read after how many updates a run was last validated, from its metrics.jsonl; None: never."""
    if not path.exists():
        return None
    return max((row["step"] for _, _, row in read_rows(path) if row.get("kind") == "validation"), default=None)
