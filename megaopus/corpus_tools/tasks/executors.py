"""Chooses who does work that is divided into units: tasks in local processes, of a Slurm array, or on Ray.

The tasks are datatrove's; this file says what it needs without importing it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megaopus.corpus_tools.readers.stored import needed
from megaopus.corpus_tools.workers import cores
from megaopus.errors import DataError

LOCAL, SLURM, RAY = "local", "slurm", "ray"
KINDS = (LOCAL, SLURM, RAY)
_OPTION = re.compile(r"[a-z][a-z0-9-]*(=[^\s'\"\\$`]+)?")
_PATH = re.compile(r"[^\s'\"\\$`;&|<>()*?]+")


@dataclass(frozen=True, slots=True)
class Executor:
    """Says who does the tasks, and how many there are."""

    kind: str
    tasks: int | None = None
    """None: one for each worker, or core."""
    workers: int | None = None
    """Tasks at a time; None: as many as there are cores here, or places on the cluster."""
    slurm: tuple[str, ...] = ()
    """Options for sbatch, ``KEY=VALUE`` or ``KEY``."""
    plugins: tuple[str, ...] = field(default=())
    """Modules that every task imports."""

    def check(self, work: Path) -> None:
        """Raise DataError for what cannot be used, before any work; ``work``: where the tasks' files will lie."""
        if self.kind not in KINDS:
            raise DataError(f"--executor {self.kind}: no such executor; give one of {', '.join(KINDS)}")
        for name, count in (("--tasks", self.tasks), ("--workers", self.workers)):
            if count is not None and count < 1:
                raise DataError(f"{name} {count}: must be at least 1")
        needed("datatrove.executor", f"--executor {self.kind}", "scale")
        if self.kind == RAY:
            needed("ray", "--executor ray", "scale")
        if self.kind == SLURM:
            self._check_slurm(work)
        elif self.slurm:
            raise DataError(f"--slurm {self.slurm[0]}: is for --executor slurm")

    def _check_slurm(self, work: Path) -> None:
        for program in ("sbatch", "squeue"):
            if shutil.which(program) is None:
                raise DataError(f"--executor slurm: no program {program} here; start it where jobs are submitted")
        for option in self.slurm:
            if not _OPTION.fullmatch(option):
                raise DataError(f"--slurm {option}: write KEY=VALUE or KEY, of sbatch, without blanks or quotes")
        if not _PATH.fullmatch(str(work.absolute())):
            raise DataError(f"{work}: a batch script takes no blanks or quotes in a path; choose another folder")

    @property
    def count(self) -> int:
        """Tasks, at most."""
        return self.tasks or self.at_a_time

    @property
    def at_a_time(self) -> int:
        """Tasks that run at a time, at most."""
        return self.workers or (self.tasks if self.on_a_cluster else None) or cores()

    @property
    def on_a_cluster(self) -> bool:
        """Tell whether tasks run on other machines, of which this one does not know the cores."""
        return self.kind == SLURM or (self.kind == RAY and "RAY_ADDRESS" in os.environ)

    @property
    def alone(self) -> bool:
        """Tell whether tasks run in this process, one after the other."""
        return self.kind == LOCAL and min(self.count, self.at_a_time) == 1

    @property
    def slurm_options(self) -> Mapping[str, str]:
        """Option of sbatch -> value, empty for one that has none."""
        return {key: value for key, _, value in (option.partition("=") for option in self.slurm)}
