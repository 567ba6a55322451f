"""Runs that continue one shared uniform warm-up with different selection settings, each a real ``train`` process."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.errors import EngineError

UNIFORM = ("selection=uniform", "selection.rho=0.5")
"""Uniform picks from the same buffers that the other arms see."""
OPUS = ("selection=opus", "selection.warmup_steps=0", "selection.score_length=64")
"""The default recipe, scoring half of the demo's sequences; the shared warm-up stands for its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A warm-up of ``warm_steps`` uniform updates and a stretch of ``steps`` more, which every arm trains on its own.

    ``settings``: overrides common to the warm-up and all arms. A finished run is not run again, a killed one goes on.
    ``threads``: of each training process; None: torch's choice. ``quiet``: write what a process prints to ``NAME.log``
    beside its run folder instead of the terminal.
    """

    folder: Path
    settings: tuple[str, ...]
    warm_steps: int
    steps: int
    seed: int
    threads: int | None = None
    quiet: bool = False
    echo: Callable[[str], None] = print

    def warm_up(self) -> Path:
        """The run folder of the shared warm-up, trained if it is not there."""
        run_dir = self.folder / f"warmup_seed{self.seed}"
        self._train(run_dir, self.warm_steps, "auto", UNIFORM)
        return run_dir

    def run(self, name: str, overrides: Sequence[str]) -> Path:
        """The run folder of arm ``name``: from the end of the warm-up to the end of the stretch."""
        run_dir = self.folder / f"{name}_seed{self.seed}"
        self._train(run_dir, self.warm_steps + self.steps, str(self.warm_up()), overrides)
        return run_dir

    def _train(self, run_dir: Path, steps: int, resume: str, overrides: Sequence[str]) -> None:
        done = complete_checkpoints(run_dir)
        if done and done[-1].name == f"step_{steps:08d}":
            return
        own = [f"train.steps={steps}", f"seed={self.seed}", f"resume={resume}", f"run_dir={run_dir}"]
        arguments = [*self.settings, *overrides, *own]
        self.echo(f"\n$ python -m megaopus train {shlex.join(arguments)}")
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        command = [sys.executable, "-m", "megaopus", "train", *arguments]
        log = run_dir.with_name(run_dir.name + ".log")
        with contextlib.ExitStack() as stack:
            output = None
            if self.quiet:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("a"))
            status = subprocess.run(command, env=environment, stdout=output, stderr=output).returncode
        if status:
            where = f"see {log}" if self.quiet else "its message is above"
            raise EngineError(f"{run_dir}: training ended with exit status {status}; {where}")
