"""Writes records: as JSON lines in the run folder, and to Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

from megaopus.errors import ConfigError, DataError, Problem
from megaopus.events import Event
from megaopus.fs import disk_full
from megaopus.record.config import WANDB_REMEDY
from megaopus.record.metrics import wandb_row
from megaopus.record.types import SelectionRecord, StepRecord, TasksRecord, ValidationRecord

METRICS_FILE = "metrics.jsonl"
SELECTION_FILE = "selection.jsonl"
EVENTS_FILE = "events.jsonl"
TASKS_FILE = "eval.jsonl"
RUN_ID_FILE = "wandb_run_id"


def encode(value: Any) -> Any:
    """Write every non-finite float in ``value`` as the string "nan", "inf" or "-inf", which JSON has no number for.

    ``float()`` reads those strings back, so a reader needs one rule for every numeric field.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def read_rows(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Yield ``(line number from 1, line without its newline, row)`` of a JSON-lines file.

    A last line that has no newline and does not parse was in flight when the writer was killed: it is left out.
    Raises DataError naming file and line for anything else that is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            complete = line.endswith(b"\n")
            try:
                row = json.loads(line)
            except ValueError as error:
                if not complete:
                    return
                raise DataError(f"{path}, line {number}: not JSON ({error}); mend or delete this line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object; mend or delete this line")
            yield number, line.removesuffix(b"\n"), row


class JsonlSink:
    """Writes one JSON object a line and flushes each: a killed run loses the line in flight at most."""

    def __init__(self, path: Path):
        """``path`` is opened (for appending) with the first row, so that ``truncate_after`` can go before."""
        self.path = path
        self._file: BufferedWriter | None = None

    def truncate_after(self, step: int) -> list[str]:
        """Keep what belongs to the first ``step`` updates and return what was dropped, in words.

        A row of kind "validation" describes the state after ``step`` updates and stays if its step <= ``step``; any
        other row describes the update that followed its step and stays if its step < ``step``. With ``step`` = 0
        nothing stays. The file is replaced in one go or not at all. Raises DataError for a broken line, and if the file
        cannot be written.
        """
        assert self._file is None, "truncate before the first write"
        if not self.path.exists():
            return []
        temporary = self.path.with_name(self.path.name + ".tmp")
        kept = dropped = 0
        size = self.path.stat().st_size
        try:
            with _explained(self.path, size), temporary.open("wb") as out:
                for number, line, row in read_rows(self.path):
                    if self._belongs(row, number, step):
                        kept += 1
                        out.write(line + b"\n")
                    else:
                        dropped += 1
                out.flush()
                os.fsync(out.fileno())
                new_size = out.tell()
            if new_size != size:
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        messages = []
        if dropped:
            messages.append(
                f"{self.path.name}: {dropped} rows after step {step} of an earlier run dropped, {kept} kept"
            )
        elif new_size < size:
            messages.append(f"{self.path.name}: a half-written last line dropped, {kept} rows kept")
        return messages

    def _belongs(self, row: dict[str, Any], number: int, step: int) -> bool:
        at = row.get("step")
        if not isinstance(at, int):
            raise DataError(f"{self.path}, line {number}: no whole number under 'step'; mend or delete this line")
        return step > 0 and (at <= step if row.get("kind") == "validation" else at < step)

    def write(self, row: dict[str, Any]) -> None:
        """Append ``row``; non-finite floats as in ``encode``. Raises DataError if it cannot be written."""
        line = json.dumps(encode(row), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with _explained(self.path, len(line)):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            with suppress(OSError):  # every row has been flushed, or its error raised
                self._file.close()
            self._file = None


@contextmanager
def _explained(path: Path, needed: int) -> Iterator[None]:
    """Raise a DataError where ``needed`` bytes cannot be written."""
    try:
        yield
    except OSError as error:
        room = disk_full(error, path, needed)
        raise DataError(f"{path}: cannot be written ({error}){room}; mend that, then start again") from error


class WandbSink:
    """Sends the same numbers to a Weights & Biases run.

    The run's id lies in ``run_dir/wandb_run_id``, so that a resumed run continues the same curve (offline pieces are
    joined by ``wandb sync --append``). Every metric is plotted over the field "step", not over W&B's own counter,
    which cannot go back to a checkpoint. No credential is read, passed on or stored here.
    """

    def __init__(self, project: str, mode: str, run_dir: Path, name: str, config: dict[str, Any] | None = None):
        """Start or continue the run; ``mode`` is "offline" or "online". Raises ConfigError without the package."""
        try:
            import wandb
        except ImportError as error:
            problem = Problem("logging.wandb", mode, "the package wandb is not installed", WANDB_REMEDY)
            raise ConfigError([problem]) from error
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            mode="online" if mode == "online" else "offline",
            dir=str(run_dir),
            id=_run_id(run_dir),
            name=name,
            config=encode(config or {}),
            # A resume mode means something online only; offline, the shared id is what joins the pieces.
            resume="allow" if mode == "online" else None,
            # The address of a git remote may hold a token, and the console may show anything: neither is recorded.
            settings=wandb.Settings(disable_git=True, save_code=False, console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, record: StepRecord, selection: SelectionRecord | None, events: Sequence[Event]) -> None:
        """Log one optimizer step; ``events``: all of it, which are counted by kind."""
        self._run.log(_step_row(record, selection, events))

    def validation(self, record: ValidationRecord) -> None:
        """Log one validation, each domain on its own."""
        self._run.log(wandb_row(record))

    def tasks(self, record: TasksRecord) -> None:
        """Log what was scored on benchmarks."""
        self._run.log(record.tracked())

    def close(self) -> None:
        """Hand over what is left and end the run."""
        self._run.finish()


class TensorBoardSink:
    """Writes the same numbers, by the same names, as TensorBoard's scalars, over the step."""

    FOLDER = "tensorboard"

    def __init__(self, run_dir: Path, resume_step: int):
        """Start, or go on after ``resume_step`` updates: what an earlier process wrote of later ones is not shown.

        Raises ConfigError without the package.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            reason, remedy = "the package tensorboard is not installed", "pip install 'megaopus[tensorboard]'"
            raise ConfigError([Problem("logging.tensorboard", True, reason, remedy)]) from error
        # opened with the first number, so that a run that is refused leaves nothing
        self._open = lambda: SummaryWriter(str(run_dir / self.FOLDER), purge_step=resume_step or None)
        self._writer: Any = None

    def step(self, record: StepRecord, selection: SelectionRecord | None, events: Sequence[Event]) -> None:
        """Write the numbers of one optimizer step; ``events``: all of it, which are counted by kind."""
        self._write(_step_row(record, selection, events), record.step)

    def validation(self, record: ValidationRecord) -> None:
        """Write one validation, each domain on its own."""
        row = wandb_row(record)
        self._write({name: value for name, value in row.items() if name.startswith("validation/")}, record.step)

    def tasks(self, record: TasksRecord) -> None:
        """Write what was scored on benchmarks."""
        self._write({name: value for name, value in record.tracked().items() if "/" in name}, record.step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, row: dict[str, Any], step: int) -> None:
        if self._writer is None:
            self._writer = self._open()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)


def _step_row(record: StepRecord, selection: SelectionRecord | None, events: Sequence[Event]) -> dict[str, Any]:
    """Make what a tracker is sent of one optimizer step, its events counted by kind."""
    counts = Counter(event.kind for event in events)
    row = wandb_row(record) | ({} if selection is None else wandb_row(selection))
    return row | {"events": counts.total()} | {f"events/{kind}": count for kind, count in counts.items()}


def _run_id(run_dir: Path) -> str:
    path = run_dir / RUN_ID_FILE
    if path.exists():
        return path.read_text().strip()
    run_id = uuid.uuid4().hex[:8]
    temporary = path.with_name(path.name + ".tmp")
    with _explained(path, len(run_id)):
        temporary.write_text(run_id + "\n")
        os.replace(temporary, path)
    return run_id
