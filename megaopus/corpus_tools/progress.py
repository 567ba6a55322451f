"""Lines of progress with a rate and the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]


class Stage(Protocol):
    """Starts a line of progress."""

    def __call__(self, name: str, total: int | None, unit: str = "MB/s", scale: float = 1e6) -> Advance:
        """``advance(count)`` of a line whose rate is shown as counts / ``scale`` a second."""


@contextmanager
def stages(console: Console) -> Iterator[Stage]:
    """Yield what starts lines of progress; they end with the block."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:

        def stage(name: str, total: int | None, unit: str = "MB/s", scale: float = 1e6) -> Advance:
            task = progress.add_task(name, total=total, rate="")

            def advance(count: int) -> None:
                state = progress.tasks[task]
                average = (state.completed + count) / max(state.elapsed or 0, 1e-3)
                speed = state.speed or state.finished_speed or average
                progress.update(task, advance=count, rate=f"{speed / scale:.1f} {unit}")

            return advance

        yield stage
