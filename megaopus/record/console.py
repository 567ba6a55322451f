"""Prints the lines that a person reads while a run goes on; in colours on a terminal only."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from megaopus.events import Event
from megaopus.record.formatting import format_count, format_duration, format_share
from megaopus.record.metrics import progress_parts
from megaopus.record.quiet import quiet
from megaopus.record.types import SelectionRecord, StepRecord, TasksRecord, ValidationRecord

PLAIN_PROGRESS_SECONDS = 5.0
LEGEND = {
    "grad ": "grad: norm of the gradient",
    "lr ": "lr: learning rate",
    "mem ": "mem: peak memory, and as `check` estimates it",
    "sel ": "sel: time spent choosing, picks of candidates",
    "ess ": "ess: effective sample size of the draw",
    "->": "NAME .2->.7: share of candidates, of picks",
}
"""Explains the fields of a progress line, by what they are known by."""
PACE_LINES = 10  # progress lines over which the pace behind the ETA is taken


class Console:
    """Prints a progress line every ``every`` steps, validations, notes, and the first warning of each kind."""

    def __init__(
        self,
        total_steps: int,
        every: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        selects: bool = True,
    ):
        """``clock`` gives seconds; the ETA counts everything that passes on it, validation and saving included.

        ``selects`` False: the run draws every batch uniformly, so that of its choices there is nothing to tell.
        """
        self._total_steps = total_steps
        self._every = every
        self._stream = quiet(stream if stream is not None else sys.stdout)
        self._rich = RichConsole(file=self._stream, highlight=False) if self._stream.isatty() else None
        self._clock = clock
        self._began = clock()
        self._selects = selects
        self._legend_shown = False
        self._validated: ValidationRecord | None = None  # the last
        self._done = 0
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_LINES + 1)
        self._steps: list[StepRecord] = []  # since the last progress line
        self._selections: list[SelectionRecord] = []
        self._events: Counter[str] = Counter()  # by kind
        self._first: dict[str, str] = {}  # the words of each kind's first

    def step(self, record: StepRecord, selection: SelectionRecord | None) -> None:
        """Take in one step; print a line if one is due. Its events are told apart, through ``event``."""
        if not self._pace:
            self._pace.append((record.step, self._clock() - record.step_s))
        self._steps.append(record)
        if selection is not None and self._selects:
            self._selections.append(selection)
        self._done = done = record.step + 1
        if done % self._every == 0 or done == self._total_steps:
            self._pace.append((done, self._clock()))
            parts = self._progress_parts()
            self._show_legend(" | ".join(text for text, _ in parts))
            self._write(parts)
            self._steps.clear()
            self._selections.clear()

    def _show_legend(self, line: str) -> None:
        """Explain once, before the first progress line, what is in it."""
        if not self._legend_shown:
            self._legend_shown = True
            told = [(means, "dim") for key, means in LEGEND.items() if key in line]
            self._write([("in the lines below", "dim"), *told])

    def _progress_parts(self) -> list[tuple[str, str]]:
        """(text, style) of each field: the metrics that say how they are shown, and what comes of several."""
        done = self._steps[-1].step + 1
        seconds = sum(record.step_s for record in self._steps)
        parts = [(f"step {done}/{self._total_steps} {done / self._total_steps:.1%}", "bold")]
        parts += progress_parts(self._steps)
        if self._selections:
            parts += self._selection_parts(sum(record.select_s for record in self._steps) / seconds if seconds else 0.0)
        if self._events:
            parts.append((f"{self._events.total()} warnings", "yellow"))
        if done < self._total_steps:
            (first_step, first_time), (last_step, last_time) = self._pace[0], self._pace[-1]
            pace = (last_time - first_time) / (last_step - first_step)
            parts.append((f"eta {format_duration(pace * (self._total_steps - done))}", "green"))
        return parts

    def _selection_parts(self, time_share: float) -> list[tuple[str, str]]:
        last = self._selections[-1]
        number = last.candidates
        text = f"sel {time_share:.1%} time, {last.picked} of {number}"
        if last.method == "uniform":
            return [(text + " uniformly", "magenta")]
        parts = [(f"{text}, ess {last.ess:.0f}/{number}", "magenta")]
        chosen = [record for record in self._selections if record.method != "uniform"]
        changed = [each.changed_by_utilities for each in chosen if each.changed_by_utilities is not None]
        if changed:
            weights = ", ".join(f"{name} {value:+.1f}" for name, value in last.odds_weights.items())
            by = f" (weights {weights})" if weights else ""
            parts.append((f"utilities changed {sum(changed) / len(changed):.0%} of picks{by}", "magenta"))
        share: Counter[str] = Counter()
        pool: Counter[str] = Counter()
        for record in chosen:
            share.update({domain: value / len(chosen) for domain, value in record.share.items()})
            pool.update({domain: value / len(chosen) for domain, value in record.pool_share.items()})
        if len(pool) > 1:
            domain = max(pool, key=lambda name: share[name] - pool[name])
            parts.append((f"{domain} {format_share(pool[domain])}->{format_share(share[domain])}", ""))
        return parts

    def validation(self, record: ValidationRecord) -> None:
        """Print one validation line."""
        self._validated, self._done = record, record.step
        parts = [(f"validation after {record.step} steps, {format_count(record.tokens)} tokens", "bold")]
        if record.target:
            parts.append((f"target loss {record.loss:.4f} ({_each(record.target)})", "bold cyan"))
            parts += _mean(record)
        else:
            parts.append((f"loss {record.loss:.4f}", "bold cyan"))
        if len(record.domains) > 1:
            parts.append((_each(record.domains), ""))
        self._write(parts)

    def tasks(self, record: TasksRecord) -> None:
        """Print one line on what was scored on benchmarks."""
        parts = [(f"benchmarks after {record.step} steps", "bold")]
        for row in record.headlines:
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
            bits = record.bits_per_byte(row["task"])
            smooth = "" if bits is None else f" ({bits:.3f} bits/byte)"
            parts.append((f"{row['task']} {row['metric']} {row['value']:.3f}{error}{smooth}", "cyan"))
        self._write(parts)

    def event(self, event: Event) -> None:
        """Print a warning if it is the first of its kind; count it in any case."""
        if event.kind not in self._events:
            self._first[event.kind] = str(event)
            self._write([(f"WARNING {event} (more of this kind are counted, not shown)", "bold yellow")])
        self._events[event.kind] += 1

    def note(self, text: str) -> None:
        """Print a line of information; fields are parted by " | "."""
        self._write([(part, "") for part in text.split(" | ")])

    def close(self) -> None:
        """Say how often each kind of warning came, for those that came more than once."""
        for kind, count in self._events.items():
            if count > 1:
                self._write([(f"WARNING {count} times in all, first: {self._first[kind]}", "yellow")])
        self._events.clear()

    def closing(self, saved: Path | None, following: str) -> None:
        """Print the last line: how far the run came and how long it took, its loss, where it lies, what comes next.

        ``saved``: the last checkpoint; ``following``: the next command.
        """
        parts = [(f"done: {self._done} of {self._total_steps} steps", "bold")]
        parts.append((f"{format_duration(self._clock() - self._began)} in this process", ""))
        if (last := self._validated) is not None and last.target:
            parts.append((f"last target loss {last.loss:.4f}", "bold cyan"))
            parts += _mean(last)
        elif last is not None:
            parts.append((f"last validation loss {last.loss:.4f}", "bold cyan"))
        parts.append((f"saved in {saved}" if saved else "nothing saved, for no update was made", ""))
        parts.append((f"next: {following}", "green"))
        self._write(parts)

    def _write(self, parts: list[tuple[str, str]]) -> None:
        if self._rich is None:
            print(" | ".join(text for text, _ in parts), file=self._stream, flush=True)
            return
        line, place = Text(), 0
        for at, (text, style) in enumerate(parts):
            joint = " | " if at else ""
            if at and place + len(joint) + len(text) > self._rich.width:  # narrow: broken between fields alone
                joint, place = "\n  ", 0
            line.append(joint, "dim").append(text, style)
            place += len(joint.lstrip("\n")) + len(text)
        self._rich.print(line, soft_wrap=True)


def _mean(record: ValidationRecord) -> list[tuple[str, str]]:
    return [] if record.mean_loss is None else [(f"mean over all domains {record.mean_loss:.4f}", "")]


def _each(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())


@contextmanager
def progress(
    description: str,
    total: int | None = None,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Show how far long work is: ``with progress("tokenising", total=n) as advance: ... advance(1)``.

    A bar on a terminal; elsewhere a plain line every few seconds and one at the end. ``total`` None: not known.
    """
    stream = stream if stream is not None else sys.stdout
    if not stream.isatty():
        yield from _plain_progress(description, total, stream, clock)
        return
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=RichConsole(file=stream)) as bar:
        task = bar.add_task(description, total=total)

        def advance(number: int = 1) -> None:
            bar.advance(task, number)

        yield advance


def _plain_progress(
    description: str, total: int | None, stream: TextIO, clock: Callable[[], float]
) -> Iterator[Callable[[int], None]]:
    start = shown = clock()
    done = 0

    def advance(number: int = 1) -> None:
        nonlocal done, shown
        done += number
        now = clock()
        if now - shown >= PLAIN_PROGRESS_SECONDS:
            shown = now
            of = f"/{format_count(total)} {done / total:.0%}" if total else ""
            eta = f", eta {format_duration((now - start) / done * (total - done))}" if total and done else ""
            print(f"{description}: {format_count(done)}{of}{eta}", file=stream, flush=True)

    yield advance
    print(f"{description}: {format_count(done)} in {format_duration(clock() - start)}", file=stream, flush=True)
