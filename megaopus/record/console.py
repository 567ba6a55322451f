"""Lines a person reads while a run goes on; colours on a terminal only."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord

PLAIN_PROGRESS_SECONDS = 5.0
PACE_LINES = 10  # progress lines over which the pace behind the ETA is taken


def kind_of(event: str) -> str:
    """``event`` with its numbers blanked: events that differ in numbers only are of one kind."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?(\s*,\s*\d+)*", "#", event)


def format_count(value: float) -> str:
    """1234567 -> "1.23M": three significant digits."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{unit}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """7440 -> "2h04m", 185 -> "3m05s", 42 -> "42s"."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def format_lr(lr: float) -> str:
    """0.0003 -> "3.0e-4"."""
    return re.sub(r"e([-+])0*(\d)", lambda found: f"e{found[1].replace('+', '')}{found[2]}", f"{lr:.1e}")


def _format_share(share: float) -> str:
    text = f"{share:.2f}"
    return text[1:] if text.startswith("0") else text


class Console:
    """Progress lines every ``every`` steps, validation lines, notes and warnings of one process."""

    def __init__(
        self,
        total_steps: int,
        every: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``clock`` gives seconds; the ETA counts everything that passes on it, validation and saving included."""
        self._total_steps = total_steps
        self._every = every
        self._stream = stream if stream is not None else sys.stdout
        self._rich = RichConsole(file=self._stream, highlight=False) if self._stream.isatty() else None
        self._clock = clock
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_LINES + 1)
        self._steps: list[StepRecord] = []  # since the last progress line
        self._selections: list[SelectionRecord] = []
        self._events: Counter[str] = Counter()
        self._named: set[str] = set()

    def step(self, record: StepRecord, selection: SelectionRecord | None) -> None:
        """Take in one step; print a line if one is due. Its events are told apart, through ``event``."""
        if not self._pace:
            self._pace.append((record.step, self._clock() - record.step_s))
        self._steps.append(record)
        if selection is not None:
            self._selections.append(selection)
        done = record.step + 1
        if done % self._every == 0 or done == self._total_steps:
            self._pace.append((done, self._clock()))
            self._write(self._progress_parts())
            self._steps.clear()
            self._selections.clear()

    def _progress_parts(self) -> list[tuple[str, str]]:
        """(text, style) of each field: means over the steps since the last line, the rate of learning as of now."""
        last, number = self._steps[-1], len(self._steps)
        done = last.step + 1
        loss = sum(record.loss for record in self._steps) / number
        seconds = sum(record.step_s for record in self._steps)
        parts = [
            (f"step {done}/{self._total_steps} {done / self._total_steps:.1%}", "bold"),
            (f"loss {loss:.3f}", "bold cyan"),
            (f"grad {last.grad_norm:.2f}", ""),
            (f"lr {format_lr(last.lr)}", ""),
        ]
        if seconds > 0:
            parts.append((f"{format_count(self._tokens_per_step() * number / seconds)} tok/s", ""))
        if self._selections:
            parts += self._selection_parts(sum(record.select_s for record in self._steps) / seconds if seconds else 0.0)
        if self._events:
            parts.append((f"{sum(self._events.values())} warnings", "yellow"))
        if done < self._total_steps:
            (first_step, first_time), (last_step, last_time) = self._pace[0], self._pace[-1]
            pace = (last_time - first_time) / (last_step - first_step)
            parts.append((f"eta {format_duration(pace * (self._total_steps - done))}", "green"))
        return parts

    def _tokens_per_step(self) -> float:
        first, last = self._steps[0], self._steps[-1]
        if len(self._steps) > 1:
            return (last.tokens - first.tokens) / (len(self._steps) - 1)
        return last.tokens / (last.step + 1)

    def _selection_parts(self, time_share: float) -> list[tuple[str, str]]:
        last = self._selections[-1]
        number = last.candidates
        text = f"sel {time_share:.1%} time, keep {last.picked / max(number, 1):.2f}"
        if last.method == "uniform":
            return [(text + ", uniform", "magenta")]
        parts = [(f"{text}, ess {last.ess:.0f}/{number}", "magenta")]
        chosen = [record for record in self._selections if record.method != "uniform"]
        share: Counter[str] = Counter()
        pool: Counter[str] = Counter()
        for record in chosen:
            share.update({domain: value / len(chosen) for domain, value in record.share.items()})
            pool.update({domain: value / len(chosen) for domain, value in record.pool_share.items()})
        if len(pool) > 1:
            domain = max(pool, key=lambda name: share[name] - pool[name])
            parts.append((f"{domain} {_format_share(pool[domain])}->{_format_share(share[domain])}", ""))
        return parts

    def validation(self, record: ValidationRecord) -> None:
        """Print one validation line."""
        parts = [
            (f"validation after {record.step} steps, {format_count(record.tokens)} tokens", "bold"),
            (f"loss {record.loss:.4f}", "bold cyan"),
        ]
        if len(record.domains) > 1:
            parts.append((", ".join(f"{domain} {loss:.3f}" for domain, loss in record.domains.items()), ""))
        self._write(parts)

    def event(self, text: str) -> None:
        """Print a warning if it is the first of its kind; count it in any case."""
        kind = kind_of(text)
        self._events[kind] += 1
        if kind not in self._named:
            self._named.add(kind)
            self._write([(f"WARNING {text} (more of this kind are counted, not shown)", "bold yellow")])

    def note(self, text: str) -> None:
        """Print a line of information."""
        self._write([(text, "")])

    def close(self) -> None:
        """Say how often each kind of warning came, for those that came more than once."""
        for kind, count in self._events.items():
            if count > 1:
                self._write([(f"WARNING {count} times in all: {kind}", "yellow")])
        self._events.clear()

    def _write(self, parts: list[tuple[str, str]]) -> None:
        if self._rich is None:
            print(" | ".join(text for text, _ in parts), file=self._stream, flush=True)
            return
        line = Text()
        for at, (text, style) in enumerate(parts):
            line.append(" | " if at else "", "dim").append(text, style)
        self._rich.print(line, soft_wrap=True)


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
