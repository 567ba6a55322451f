"""The one object the training loop tells what happened."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaopus.record.config import LoggingConfig
from megaopus.record.console import Console
from megaopus.record.parquet import FOLDER, ChoiceSink
from megaopus.record.sinks import JsonlSink, WandbSink, read_rows
from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord


class Recorder:
    """Writes metrics.jsonl, selection.jsonl and choices/, prints, and feeds Weights & Biases; on the writer rank only.

    On every other rank all methods do nothing.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: str | Path,
        total_steps: int,
        is_writer: bool,
        resume_step: int = 0,
        wandb_config: dict[str, Any] | None = None,
    ):
        """``resume_step``: updates already done; rows of later ones, left by a killed run, are dropped.

        ``wandb_config``: the run's settings as plain values, shown beside its curves. Raises DataError for a broken
        file of an earlier run, ConfigError if wandb is asked for but not installed.
        """
        self._console: Console | None = None
        self._wandb: WandbSink | None = None
        if not is_writer:
            return
        run_dir = Path(run_dir)
        if config.wandb != "off":
            self._wandb = WandbSink(config.wandb_project, config.wandb, run_dir, run_dir.name, wandb_config)
        self._console = Console(total_steps, config.every)
        self._metrics = JsonlSink(run_dir / "metrics.jsonl")
        self._selection = JsonlSink(run_dir / "selection.jsonl")
        self._choices = ChoiceSink(run_dir / FOLDER, config.selection_every, config.overlaps_mb)
        for sink in (self._metrics, self._selection, self._choices):
            for message in sink.truncate_after(resume_step):
                self._console.note(message)
        # A run killed between validation and the next update validates at that step again: one row is enough.
        self._validated = _last_validation(self._metrics.path)
        self._write_selection = config.selection

    def step(self, record: StepRecord, selection: SelectionRecord | None) -> None:
        """Record one update; ``selection`` None if the batch was not chosen from candidates.

        Its events go into the file only; ``event`` shows them.
        """
        if self._console is None:
            return
        self._metrics.write({"kind": "step", **asdict(record)})
        if selection is not None and self._write_selection:
            self._selection.write(selection.facts())
            if selection.choices is not None:
                self._choices.add(selection.step, selection.choices)
        self._console.step(record, selection)
        if self._wandb is not None:
            self._wandb.step(record, selection)

    def validation(self, record: ValidationRecord) -> None:
        """Record one validation; a second one after the same update is shown but not written again."""
        if self._console is None:
            return
        if record.step != self._validated:
            self._metrics.write({"kind": "validation", **asdict(record)})
            self._validated = record.step
        self._console.validation(record)
        if self._wandb is not None:
            self._wandb.validation(record)

    def flush(self) -> None:
        """Put everything on disk: a checkpoint is about to say that these steps need not be taken again."""
        if self._console is not None:
            self._choices.flush()

    def event(self, text: str) -> None:
        """Warn of something that went another way than asked: the first of its kind is shown, the rest counted."""
        if self._console is not None:
            self._console.event(text)

    def note(self, text: str) -> None:
        """Print a line of information."""
        if self._console is not None:
            self._console.note(text)

    def close(self) -> None:
        """Close the files, end the W&B run and sum the warnings up; may be called twice."""
        if self._console is None:
            return
        self._metrics.close()
        self._selection.close()
        self._choices.flush()
        self._console.close()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None


def _last_validation(path: Path) -> int | None:
    if not path.exists():
        return None
    return max((row["step"] for _, _, row in read_rows(path) if row.get("kind") == "validation"), default=None)
