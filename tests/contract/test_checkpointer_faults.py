"""A save that ends at any moment leaves the older checkpoint usable, and nothing that looks like a new one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from megaopus.checkpoint import checkpointer
from megaopus.checkpoint.checkpointer import (
    COMPLETE,
    Checkpoint,
    Checkpointer,
    complete_checkpoints,
    locate,
    read_state,
)
from megaopus.checkpoint.config import CheckpointConfig
from megaopus.checkpoint.pending_save import PendingSave
from megaopus.distributed.mesh import MeshShape
from megaopus.errors import CheckpointError

STATE: dict[str, Any] = {"time_s": 1.0, "selector": {}, "guard": {}, "identity": {}, "config": {}}


class Alone:
    """The part of a Mesh that a checkpointer needs, for one process."""

    rank = 0
    shape = MeshShape(1)

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag


class FileEngine:
    """Saves one number."""

    def __init__(self, value: float = 0.0, during: Callable[[], None] = lambda: None):
        self.value = value
        self.during = during

    def prepare_save(self, folder: Path, groups: dict, copy: bool) -> PendingSave:
        value = self.value

        def write() -> list[Path]:
            torch.save(value, folder / "first")
            self.during()
            torch.save(groups, folder / "second")
            return [folder / "first", folder / "second"]

        return PendingSave(write, list)

    def load(self, folder: Path, groups: list[str]) -> dict:
        self.value = torch.load(folder / "first")
        return torch.load(folder / "second")


@pytest.fixture
def saver(tmp_path: Path) -> Checkpointer:
    """With a complete checkpoint after 10 updates."""
    saver = Checkpointer(CheckpointConfig(every=10), tmp_path, Alone(), size=123_456)  # type: ignore[arg-type]
    saver.save(10, FileEngine(10.0), {"average": {"w": torch.ones(2)}}, STATE)
    return saver


def newest(run_dir: Path) -> Checkpoint:
    found = locate("required", run_dir, Alone())  # type: ignore[arg-type]
    assert found is not None
    return found


def fail_before_weights(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> FileEngine:
    class Failing(FileEngine):
        def prepare_save(self, folder: Path, groups: dict, copy: bool) -> PendingSave:
            fault()
            raise AssertionError("the fault did nothing")

    return Failing()


def fail_amid_weights(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> FileEngine:
    return FileEngine(during=fault)


def _before(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], fault: Callable) -> FileEngine:
    original = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            fault()
        return original(*args, **kwargs)

    patch.setattr(owner, name, faulty)
    return FileEngine()


def fail_before_state(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> FileEngine:
    return _before(patch, checkpointer, "_write", lambda path, text: path.name == "state.json", fault)


def fail_before_complete(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> FileEngine:
    return _before(patch, checkpointer, "_write", lambda path, text: path.name == COMPLETE, fault)


def fail_before_rename(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> FileEngine:
    return _before(patch, Path, "rename", lambda path, target: True, fault)


PHASES = [fail_before_weights, fail_amid_weights, fail_before_state, fail_before_complete, fail_before_rename]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__.removeprefix("fail_"))
@pytest.mark.parametrize("how", ["disk full", "torch", "SIGKILL"])
def test_an_interrupted_save(phase: Callable, how: str, saver: Checkpointer, tmp_path: Path) -> None:
    def fault() -> None:
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "torch":
            raise CheckpointException("save", {})
        raise OSError(28, "No space left on device")

    def save() -> None:
        with pytest.MonkeyPatch.context() as patch:
            saver.save(20, phase(patch, fault), {}, STATE)

    if how == "SIGKILL":
        child = os.fork()
        if child == 0:
            save()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    else:
        room = r"; the disk is full: 123,456 bytes are needed, [\d,]+ bytes are free" if how == "disk full" else ""
        with pytest.raises(CheckpointError, match=rf"cannot write the [^;]*{room}\)+; older checkpoints are untouched"):
            save()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000010"]
    engine = FileEngine()
    found = newest(tmp_path)
    groups = saver.load(found, engine)
    assert (found.step, engine.value, groups["average"]["w"].tolist()) == (10, 10.0, [1.0, 1.0])
    saver.save(30, FileEngine(30.0), {}, STATE)  # not 20: a resumed run may save at other steps
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000010", "step_00000030"]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_it_unmarked(
    saver: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.save(20, FileEngine(), {}, STATE)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(CheckpointError, match=r"step_00000010: cannot be removed .*step_00000030 is complete"):
            saver.save(30, FileEngine(), {}, STATE)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000020", "step_00000030"]
    assert newest(tmp_path).step == 30
    saver.save(40, FileEngine(), {}, STATE)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000030", "step_00000040"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    saver = Checkpointer(CheckpointConfig(every=1, keep=keep), tmp_path, Alone())  # type: ignore[arg-type]
    for step in (1, 2, 9, 10, 99_999_999, 100_000_000):  # names sort by number, not as text
        saver.save(step, FileEngine(), {}, STATE)
    expected = ["step_00000009", "step_00000010", "step_99999999", "step_100000000"][-keep:]
    assert [path.name for path in complete_checkpoints(tmp_path)] == expected
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(expected)


def test_what_is_not_ours_is_left_alone(saver: Checkpointer, tmp_path: Path) -> None:
    for name in ("step_00000010_keep", "step_final", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    for step in (20, 30, 40):
        saver.save(step, FileEngine(), {}, STATE)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_00000010_keep", "step_final", "notes", "step_00000030", "step_00000040"}


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    saver = Checkpointer(CheckpointConfig(), tmp_path, Alone())  # type: ignore[arg-type]
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot write the checkpoint \(PermissionError"):
        saver.save(10, FileEngine(), {}, STATE)


def test_a_checkpoint_that_is_there_is_not_written_again(saver: Checkpointer, tmp_path: Path) -> None:
    saver.save(10, FileEngine(99.0), {}, STATE)
    engine = FileEngine()
    saver.load(newest(tmp_path), engine)
    assert engine.value == 10.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "not the state of a checkpoint"),
        (b"{}", "format None, this version reads 2"),
        (b'{"format": 1}', "format 1, this version reads 2"),
        (
            b'{"format": 2, "step": "10", "groups": []}',
            "step, time_s, selector, guard, identity, config missing or of another type",
        ),
    ],
)
def test_a_foreign_or_broken_state(content: bytes | None, message: str, saver: Checkpointer, tmp_path: Path) -> None:
    path = newest(tmp_path).folder / "state.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(path.parent)
    assert str(path) in str(caught.value)
    assert "fall back to the one before" in str(caught.value)


def test_damaged_weights(saver: Checkpointer, tmp_path: Path) -> None:
    found = newest(tmp_path)
    (found.folder / "weights" / "first").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights: cannot be restored .* fall back to the one before"):
        saver.load(found, FileEngine())


def names(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(run_dir)]


def test_temporary_and_kept_checkpoints(tmp_path: Path) -> None:
    saver = Checkpointer(CheckpointConfig(every=200, keep=2, keep_every=1000), tmp_path, Alone())  # type: ignore[arg-type]
    steps = [step for step in range(1, 2500) if saver.due(step)]
    assert steps == list(range(200, 2500, 200))
    for step in steps:
        saver.save(step, FileEngine(), {}, STATE)
    assert names(tmp_path) == [1000, 2000, 2200, 2400]
    only_kept = Checkpointer(CheckpointConfig(keep_every=1000), tmp_path, Alone())  # type: ignore[arg-type]
    assert [step for step in range(2500) if only_kept.due(step)] == [1000, 2000]


def test_checkpoints_by_time(tmp_path: Path) -> None:
    now = [0.0]
    config = CheckpointConfig(every="15m", keep_every=50)
    saver = Checkpointer(config, tmp_path, Alone(), clock=lambda: now[0])  # type: ignore[arg-type]
    saved = []
    for step in range(1, 61):
        now[0] += 100.0  # seconds an update
        if saver.due(step):
            saved.append(step)
            saver.save(step, FileEngine(), {}, STATE)
    assert saved == [9, 18, 27, 36, 45, 50, 59]
    assert names(tmp_path) == [45, 50, 59]


def test_a_time_is_a_number_and_a_unit() -> None:
    found = {text: CheckpointConfig(every=text).every_seconds for text in ("90s", "15m", "1.5h", "200")}
    assert found == {"90s": 90.0, "15m": 900.0, "1.5h": 5400.0, "200": 0.0}
    assert CheckpointConfig(every="200").every_steps == 200
