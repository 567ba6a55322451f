"""Checkpoints that are complete or not there: written beside, marked, then renamed."""

from __future__ import annotations

import functools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megaopus.checkpoint.config import CheckpointConfig
from megaopus.checkpoint.manifest import COMPLETE, MANIFEST, Entry, digest_of, entry, manifest_text, verify
from megaopus.checkpoint.pending_save import PendingSave
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh
from megaopus.errors import CheckpointError
from megaopus.fs import disk_full, sync

FORMAT = 2
_NAME = re.compile(r"step_\d{8,}")
_PARTIAL = re.compile(r"partial_\d{8,}")
_STATE = {
    "step": int,
    "groups": list,
    "time_s": int | float,
    "selector": dict,
    "guard": dict,
    "identity": dict,
    "config": dict,
}

Groups = dict[str, dict[str, Tensor]]


class Saveable(Protocol):
    """The part of an engine that a checkpoint needs."""

    def prepare_save(self, folder: Path, groups: Groups, copy: bool) -> PendingSave: ...

    def load(self, folder: Path, groups: list[str]) -> Groups: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint to go on from."""

    folder: Path
    state: dict[str, Any]
    """The plain values of state.json."""
    own: bool
    """False: of another run, whose place this new run starts from."""
    damaged: tuple[str, ...] = ()
    """What is wrong with each newer one that was passed over, in words that name its bad files."""
    passed_over: tuple[Path, ...] = ()
    """Their folders."""

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state["step"]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name)]
    found.sort(key=_step_of)
    return [path for path in found if (path / COMPLETE).is_file()]


def temporary_checkpoints(run_dir: Path, keep_every: int) -> list[Path]:
    """Complete checkpoints of a run that later ones replace, oldest first."""
    return [path for path in complete_checkpoints(run_dir) if not keep_every or _step_of(path) % keep_every]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def locate(resume: str, run_dir: Path, mesh: Mesh) -> Checkpoint | None:
    """The checkpoint that ``resume`` means for ``run_dir``, every byte of it checked; None: start anew. Collective.

    A damaged one is passed over for the one before (``Checkpoint.damaged``), unless ``resume`` names it itself. Raises
    CheckpointError on every rank where none is good, and see ``resolve``.
    """
    folders = on_rank_0(mesh, lambda: resolve(resume, run_dir))
    damaged: list[str] = []
    for number, folder in enumerate(folders):
        if problem := verify(folder, mesh):
            damaged.append(problem)
            continue
        own = folder.parent.parent == run_dir
        state = on_rank_0(mesh, functools.partial(read_state, folder))
        return Checkpoint(folder, state, own, tuple(damaged), tuple(folders[:number]))
    if damaged:
        lines = "\n".join(f"  {problem}" for problem in damaged)
        raise CheckpointError(
            f"no checkpoint that resume={resume} means for {run_dir} is whole:\n{lines}\n"
            "Restore these files, or name another checkpoint with resume=PATH (nothing was written)"
        )
    return None


def resolve(resume: str, run_dir: Path) -> list[Path]:
    """The checkpoints that ``resume`` (auto, never, required or a path) means for ``run_dir``, best first.

    Several: later ones stand in for damaged ones. Empty: start anew. A path says where a *new* run begins: once the run
    has checkpoints of its own, it goes on from those. Raises ``CheckpointError`` where there is nothing to go on from,
    or where a fresh start would mix two runs in one folder.
    """
    own = complete_checkpoints(run_dir)[::-1]
    if resume == "never":
        if own or (run_dir / "metrics.jsonl").exists():
            raise CheckpointError(
                f"{run_dir} already holds a run, and resume=never would write over it: "
                "choose another run_dir, or resume=auto to go on"
            )
        return []
    if own or resume == "auto":
        return own
    if resume == "required":
        raise CheckpointError(
            f"resume=required, but {run_dir}/checkpoints has no complete checkpoint: "
            "check run_dir, or use resume=auto to start anew"
        )
    path = Path(resume)
    if (path / COMPLETE).is_file():
        return [path]
    if found := complete_checkpoints(path)[::-1]:
        return found
    raise CheckpointError(
        f"resume={resume}: neither a complete checkpoint nor a run folder with one "
        f"(a checkpoint is a folder step_NNNNNNNN with a file {COMPLETE})"
    )


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to damaged_NNNNNNNN, where nothing looks for it and nothing removes it.

    Raises CheckpointError if that cannot be done.
    """
    number = folder.name.removeprefix("step_")
    place = folder.with_name(f"damaged_{number}")
    for again in range(1, 1000):
        if not place.exists():
            break
        place = folder.with_name(f"damaged_{number}_{again}")
    with _explained(f"{folder}: cannot be renamed to {place.name}", "move the damaged checkpoint away"):
        folder.rename(place)
    return place


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


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save that is being written."""

    saving: PendingSave
    partial: Path
    final: Path
    content: dict[str, Any]


class Checkpointer:
    """Saves under ``run_dir/checkpoints`` by ``config``'s rules.

    A checkpoint folder has ``weights/`` (weights, optimizer state, parameter-shaped tensors of the selector),
    ``state.json`` (plain values), ``manifest.json`` (size and sha256 of all these) and, written last, ``COMPLETE`` (the
    sha256 of the manifest). A save in the background is finished by ``poll`` or before the next one begins.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run_dir: Path,
        mesh: Mesh,
        clock: Callable[[], float] = time.monotonic,
        size: int = 0,
    ):
        """``clock`` gives seconds; ``size``: bytes of a checkpoint, about, to be told where the disk is full."""
        self._config = config
        self._size = size
        self._folder = run_dir / "checkpoints"
        self._run_dir = run_dir
        self._mesh = mesh
        self._clock = clock
        self._saved_at = clock()
        self._pending: _Pending | None = None

    def due(self, step: int) -> bool:
        """Return whether a checkpoint belongs after ``step`` updates. Collective if ``every`` is a time (rank 0's)."""
        config = self._config
        if seconds := config.every_seconds:
            late = self._mesh.rank == 0 and self._clock() - self._saved_at >= seconds
            if self._mesh.any(late):
                return True
        return any(every > 0 and step > 0 and step % every == 0 for every in (config.every_steps, config.keep_every))

    def save(self, step: int, engine: Saveable, groups: Groups, state: dict[str, Any], *, wait: bool = True) -> None:
        """Write one checkpoint (collective). A kill at any moment leaves either all of it or nothing under its name.

        ``wait`` False: if ``config.background``, return while it is being written. Raises CheckpointError if it, or the
        one before that was still being written, cannot be written; checkpoints that were there stay as they were.
        """
        self.finish()
        final = self._folder / f"step_{step:08d}"
        partial = self._folder / f"partial_{step:08d}"
        self._saved_at = self._clock()
        if on_rank_0(self._mesh, lambda: (final / COMPLETE).is_file() or self._prepare(partial)):
            return
        background = self._config.background and not wait
        with self._written(f"{partial}: cannot write the weights", partial):
            saving = engine.prepare_save(partial / "weights", groups, background)
        content = {"format": FORMAT, "step": step, "groups": sorted(groups), **state}
        saving.start(entry, background)
        self._pending = _Pending(saving, partial, final, content)
        if not background:
            self.finish()

    @property
    def writing(self) -> bool:
        """Return whether a save in the background is not finished yet."""
        return self._pending is not None

    def poll(self) -> None:
        """Finish a save in the background if every rank has written its part (collective). Raises as ``save``."""
        if self._pending is not None and not self._mesh.any(not self._pending.saving.done()):
            self.finish()

    def finish(self) -> None:
        """Wait for a save in the background, if there is one, and finish it (collective). Raises as ``save``."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        problem = pending.saving.error()
        partial = pending.partial
        what = None
        if problem is not None:
            what = f"rank {self._mesh.rank}: {_reason(problem)}{self._room(problem, partial)}"
        problems = [each for each in self._mesh.gather_objects(what) if each]
        if problems:
            where = f"{partial}: cannot write the weights ({'; '.join(problems)})"
            raise CheckpointError(f"{where}; {_UNTOUCHED}") from problem
        with self._written(f"{partial}: cannot write the weights", partial):
            written = pending.saving.commit()
        files: dict[str, Entry] = {}
        for each in self._mesh.gather_objects(
            {path.relative_to(partial).as_posix(): found for path, found in written.items()}
        ):
            files |= each
        on_rank_0(self._mesh, lambda: self._publish(pending, files))

    def last(self) -> Path | None:
        """The newest complete checkpoint (collective)."""
        return on_rank_0(self._mesh, lambda: max(complete_checkpoints(self._run_dir), key=_step_of, default=None))

    def load(self, checkpoint: Checkpoint, engine: Saveable) -> Groups:
        """Restore ``engine`` and return the selector's groups of tensors (collective)."""
        weights = checkpoint.folder / "weights"
        with _explained(f"{weights}: cannot be restored", _ANOTHER):
            return engine.load(weights, checkpoint.state["groups"])

    def _prepare(self, partial: Path) -> bool:
        """Remove what interrupted saves left behind, and make an empty folder to write into. Returns False."""
        with self._written(f"{self._folder}: cannot write the checkpoint", partial):
            whole = complete_checkpoints(self._run_dir)
            for path in self._folder.glob("*_*"):
                if path not in whole and (_NAME.fullmatch(path.name) or _PARTIAL.fullmatch(path.name)):
                    shutil.rmtree(path)
            (partial / "weights").mkdir(parents=True)
        return False

    def _publish(self, pending: _Pending, files: dict[str, Entry]) -> None:
        partial, final = pending.partial, pending.final
        with self._written(f"{self._folder}: cannot write the checkpoint", partial):
            _write(partial / "state.json", json.dumps(pending.content, indent=1) + "\n")
            manifest = manifest_text(files | {"state.json": entry(partial / "state.json")})
            _write(partial / MANIFEST, manifest)
            sync(partial / "weights")
            _write(partial / COMPLETE, digest_of(manifest) + "\n")
            sync(partial)
            partial.rename(final)
            sync(self._folder)
        for old in self._outlived():
            with _explained(f"{old}: cannot be removed", f"delete it; {final} is complete"):
                (old / COMPLETE).unlink()  # first, or a kill now would leave half a checkpoint that claims to be whole
                shutil.rmtree(old)

    @contextmanager
    def _written(self, what: str, partial: Path) -> Iterator[None]:
        with _explained(what, _UNTOUCHED, lambda error: self._room(error, partial)):
            yield

    def _room(self, error: BaseException, partial: Path) -> str:
        """Say what is needed and free where a full disk is the reason; what is in ``partial`` makes way for a save."""
        there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        return disk_full(error, self._folder, self._size, there)

    def _outlived(self) -> list[Path]:
        """Checkpoints to remove: neither among the newest nor of a step that is kept for good."""
        return temporary_checkpoints(self._run_dir, self._config.keep_every)[: -self._config.keep]


def split_groups(state: dict[str, Any]) -> tuple[Groups, dict[str, Any]]:
    """Split an object's state into groups of parameter-shaped tensors, saved beside the weights, and plain values."""
    groups = {
        key: value
        for key, value in state.items()
        if isinstance(value, dict) and all(isinstance(item, Tensor) for item in value.values())
    }
    return groups, {key: value for key, value in state.items() if key not in groups}


_UNTOUCHED = "older checkpoints are untouched"


@contextmanager
def _explained(what: str, remedy: str, more: Callable[[BaseException], str] = lambda error: "") -> Iterator[None]:
    """Turn a failure inside into a CheckpointError; torch's own is no Exception and quotes every rank's traceback."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{what} ({_reason(error)}{more(error)}); {remedy}") from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1].strip()}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
