"""Says which benchmarks a run is scored on while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from megaopus.evaluation.task_list import PROTOCOLS
from megaopus.settings import HARMLESS, setting

REMEDY = "pip install 'megaopus[eval]'"


@dataclass(slots=True, kw_only=True)
class TasksConfig:
    """Benchmarks that a run is scored on while it trains, through lm-eval."""

    RESUME: ClassVar[str] = HARMLESS

    every: int = setting(
        0,
        min=0,
        doc="Steps from one scoring to the next, and after the last; 0: never (`train.eval_every` is the validation).",
        hint="0 scores no benchmark",
    )
    suite: list[str] = setting([], doc="paper10, outside6, or names of lm-eval's tasks (docs/evaluation.md).")
    limit: int | None = setting(None, min=1, doc="Items of a task, at most, from its first; null: all.")
    num_fewshot: int | None = setting(None, min=0, doc="Examples before each item; null: as each task has it.")
    protocol: str = setting("lm-eval", choices=PROTOCOLS, doc="Whose prompts and normalisation.")
    data: str | None = setting(
        None, schemes=(), doc="Folder of files TASK_SPLIT.jsonl with the items; null: they come from the hub."
    )

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, reason, remedy) of what does not hold between settings."""
        if self.every and not self.suite:
            yield "suite", "names no task, though tasks.every is set", "name some, or tasks.every=0"
        if self.every and find_spec("lm_eval") is None:
            yield "every", "the package lm_eval is not installed", f"{REMEDY}, or tasks.every=0"
