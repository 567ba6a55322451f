"""Checkpoints that are complete or not there: written beside, marked, then renamed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megaopus.checkpoint.config import CheckpointConfig
from megaopus.distributed.mesh import Mesh
from megaopus.errors import CheckpointError

COMPLETE = "COMPLETE"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8})")

Groups = dict[str, dict[str, Tensor]]


class Saveable(Protocol):
    """The part of an engine that a checkpoint needs."""

    def save(self, folder: Path, groups: Groups) -> None: ...

    def load(self, folder: Path, groups: list[str]) -> Groups: ...


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step_*")
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / COMPLETE).is_file())


def resolve(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that ``resume`` (auto, never, required or a path) means for ``run_dir``; None: start anew.

    A path says where a *new* run begins: once the run has checkpoints of its own, it goes on from those. Raises
    ``CheckpointError`` where there is nothing to go on from, or where a fresh start would mix two runs in one folder.
    """
    own = complete_checkpoints(run_dir)
    if resume == "never":
        if own or (run_dir / "metrics.jsonl").exists():
            raise CheckpointError(
                f"{run_dir} already holds a run, and resume=never would write over it: "
                "choose another run_dir, or resume=auto to go on"
            )
        return None
    if own:
        return own[-1]
    if resume == "auto":
        return None
    if resume == "required":
        raise CheckpointError(f"resume=required, but {run_dir}/checkpoints has no complete checkpoint")
    path = Path(resume)
    if (path / COMPLETE).is_file():
        return path
    if found := complete_checkpoints(path):
        return found[-1]
    raise CheckpointError(
        f"resume={resume}: neither a complete checkpoint nor a run folder with one "
        f"(a checkpoint is a folder step_NNNNNNNN with a file {COMPLETE})"
    )


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint. Raises ``CheckpointError`` if unreadable or of another format."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {state.get('format')!r}, this version reads {FORMAT}")
    return state


class Checkpointer:
    """Saves under ``run_dir/checkpoints`` every ``config.every`` steps and keeps the newest ``config.keep``.

    A checkpoint folder has ``weights/`` (megatron's sharded format: weights, optimizer state, parameter-shaped tensors
    of the selector), ``state.json`` (plain values) and, written last, ``COMPLETE``.
    """

    def __init__(self, config: CheckpointConfig, run_dir: Path, mesh: Mesh):
        self._config = config
        self._folder = run_dir / "checkpoints"
        self._run_dir = run_dir
        self._mesh = mesh

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after ``step`` updates."""
        return self._config.every > 0 and step > 0 and step % self._config.every == 0

    def save(self, step: int, engine: Saveable, groups: Groups, state: dict[str, Any]) -> Path:
        """Write one checkpoint (collective). A kill at any moment leaves either all of it or nothing under its name."""
        final = self._folder / f"step_{step:08d}"
        if (final / COMPLETE).is_file():
            return final
        partial = self._folder / f"partial_{step:08d}"
        self._on_writer(lambda: _fresh(partial))
        engine.save(partial / "weights", groups)
        self._mesh.barrier()

        def finish() -> None:
            content = {"format": FORMAT, "step": step, "groups": sorted(groups), **state}
            (partial / "state.json").write_text(json.dumps(content, indent=1))
            (partial / COMPLETE).write_text("")
            shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same name
            partial.rename(final)
            for old in complete_checkpoints(self._run_dir)[: -self._config.keep]:
                shutil.rmtree(old)

        self._on_writer(finish)
        return final

    def _on_writer(self, action: Callable[[], None]) -> None:
        """Run on rank 0 while the others wait; a failure is raised on every rank."""
        problem: str | None = None
        if self._mesh.rank == 0:
            try:
                action()
            except OSError as error:
                problem = str(error)
        problem = self._mesh.broadcast_object(problem)
        if problem is not None:
            raise CheckpointError(f"{self._folder}: cannot write the checkpoint ({problem}); older ones are untouched")


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "weights").mkdir(parents=True)
