"""Checkpoints that are complete or not there: written beside, marked, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megaopus.checkpoint.config import CheckpointConfig
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh
from megaopus.errors import CheckpointError

COMPLETE = "COMPLETE"
FORMAT = 1
_NAME = re.compile(r"step_\d{8,}")
_PARTIAL = re.compile(r"partial_\d{8,}")
_STATE = {"step": int, "groups": list, "time_s": int | float, "selector": dict, "identity": dict, "config": dict}

Groups = dict[str, dict[str, Tensor]]


class Saveable(Protocol):
    """The part of an engine that a checkpoint needs."""

    def save(self, folder: Path, groups: Groups) -> None: ...

    def load(self, folder: Path, groups: list[str]) -> Groups: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint to go on from."""

    folder: Path
    state: dict[str, Any]
    """The plain values of state.json."""
    own: bool
    """False: of another run, whose place this new run starts from."""

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state["step"]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name)]
    found.sort(key=lambda path: int(path.name.removeprefix("step_")))
    return [path for path in found if (path / COMPLETE).is_file()]


def locate(resume: str, run_dir: Path, mesh: Mesh) -> Checkpoint | None:
    """The checkpoint that ``resume`` means for ``run_dir``, as rank 0 sees it; None: start anew. Collective.

    Raises CheckpointError on every rank, see ``resolve`` and ``read_state``.
    """

    def look() -> Checkpoint | None:
        folder = resolve(resume, run_dir)
        if folder is None:
            return None
        return Checkpoint(folder, read_state(folder), own=folder in complete_checkpoints(run_dir))

    return on_rank_0(mesh, look)


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
        raise CheckpointError(
            f"resume=required, but {run_dir}/checkpoints has no complete checkpoint: "
            "check run_dir, or use resume=auto to start anew"
        )
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
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_ANOTHER}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not the state of a checkpoint; {_ANOTHER}")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {state.get('format')!r}, this version reads {FORMAT}; {_ANOTHER}")
    if broken := [key for key, kind in _STATE.items() if not isinstance(state.get(key), kind)]:
        raise CheckpointError(f"{path}: {', '.join(broken)} missing or of another type; {_ANOTHER}")
    return state


_ANOTHER = f"delete the checkpoint's file {COMPLETE} to fall back to the one before, or name another with resume=PATH"


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
        """Write one checkpoint (collective). A kill at any moment leaves either all of it or nothing under its name.

        Raises CheckpointError if it cannot be written; checkpoints that were there stay as they were.
        """
        final = self._folder / f"step_{step:08d}"
        partial = self._folder / f"partial_{step:08d}"
        if on_rank_0(self._mesh, lambda: (final / COMPLETE).is_file() or self._prepare(partial)):
            return final
        with _explained(f"{partial}: cannot write the weights", "older checkpoints are untouched"):
            engine.save(partial / "weights", groups)
        content = {"format": FORMAT, "step": step, "groups": sorted(groups), **state}
        on_rank_0(self._mesh, lambda: self._publish(partial, final, content))
        return final

    def load(self, checkpoint: Checkpoint, engine: Saveable) -> Groups:
        """Restore ``engine`` and return the selector's groups of tensors (collective)."""
        weights = checkpoint.folder / "weights"
        with _explained(f"{weights}: cannot be restored", _ANOTHER):
            return engine.load(weights, checkpoint.state["groups"])

    def _prepare(self, partial: Path) -> bool:
        """Remove what interrupted saves left behind, and make an empty folder to write into. Returns False."""
        with _explained(f"{self._folder}: cannot write the checkpoint", "older ones are untouched"):
            whole = complete_checkpoints(self._run_dir)
            for path in self._folder.glob("*_*"):
                if path not in whole and (_NAME.fullmatch(path.name) or _PARTIAL.fullmatch(path.name)):
                    shutil.rmtree(path)
            (partial / "weights").mkdir(parents=True)
        return False

    def _publish(self, partial: Path, final: Path, content: dict[str, Any]) -> None:
        with _explained(f"{self._folder}: cannot write the checkpoint", "older ones are untouched"):
            _write(partial / "state.json", json.dumps(content, indent=1) + "\n")
            _write(partial / COMPLETE, "")
            _sync(partial)
            partial.rename(final)
            _sync(self._folder)
        for old in complete_checkpoints(self._run_dir)[: -self._config.keep]:
            with _explained(f"{old}: cannot be removed", f"delete it; {final} is complete"):
                (old / COMPLETE).unlink()  # first, or a kill now would leave half a checkpoint that claims to be whole
                shutil.rmtree(old)


@contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turn a failure inside into a CheckpointError; torch's own is no Exception and quotes every rank's traceback."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = (str(error).strip() or "no message").splitlines()[-1].strip()
        raise CheckpointError(f"{what} ({type(error).__name__}: {reason}); {remedy}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
