"""Checkpoints written while training goes on: of the moment they were asked for, and no danger to the ones before."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopus.checkpoint.checkpointer import Checkpointer, complete_checkpoints
from megaopus.checkpoint.pending_save import PendingSave
from megaopus.errors import CheckpointError
from megaopus.training.signals import STOP_EXIT_CODE
from tests import forks
from tests.cluster.slurm import until
from tests.exact.resume_runs import OPTIMIZERS, SELECTIONS, assert_same, everything, settings, tensors, train
from tests.faults import at_step

CHOSEN = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"]]
BACKGROUND = [*CHOSEN, "checkpoint.background=true"]
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def straight(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(settings(tiny_corpus, run_dir, *CHOSEN)) == 0
    return run_dir


@contextmanager
def writing(before: Callable[[], None]) -> Iterator[list[int]]:
    """Threads do ``before`` before they write; yields the updates in which a save was in flight."""
    run, poll, flying = PendingSave._run, Checkpointer.poll, []

    def slow(self: PendingSave) -> None:
        if self._thread is not None:
            try:
                before()
            except OSError as error:
                self._error = error
                return
        run(self)

    def counted(self: Checkpointer) -> None:
        flying.append(int(self.writing))
        poll(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingSave, "_run", slow)
        patch.setattr(Checkpointer, "poll", counted)
        yield flying


def test_it_is_that_of_the_moment_it_was_asked_for(straight: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    with writing(lambda: until(lambda: sum(flying) >= 2, PATIENCE_S, "no updates meanwhile")) as flying:
        assert train(settings(tiny_corpus, tmp_path, *BACKGROUND)) == 0
    assert_same(everything(tmp_path), everything(straight))
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["step_00000008", "step_00000010"]
    found, expected = (tensors(run / "checkpoints" / names[0] / "weights") for run in (tmp_path, straight))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def killed_in_the_second_write(overrides: list[str]) -> None:
    """In a process of its own: the save after eight updates never ends, and SIGKILL comes before the tenth."""
    writes = [0.0, 3600.0]
    with writing(lambda: time.sleep(writes.pop(0))), at_step(9, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        train(overrides)


def test_a_kill_while_it_is_written_leaves_the_one_before(straight: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = settings(tiny_corpus, tmp_path, *BACKGROUND)
    done = forks.call(killed_in_the_second_write, overrides)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["partial_00000008", "step_00000004"]
    assert train(overrides) == 0
    assert_same(everything(tmp_path), everything(straight))


def stopped_amid_a_write(overrides: list[str]) -> int:
    """In a process of its own: a signal comes during the save after four updates, which ends when it is waited for."""
    waited_for, finish = threading.Event(), Checkpointer.finish

    def finishing(self: Checkpointer) -> None:
        waited_for.set()
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "finish", finishing)
        with writing(lambda: until(waited_for.is_set, PATIENCE_S, "nobody waits")), at_step(5, send):
            return train(overrides)


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_waits_for_it(straight: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = settings(tiny_corpus, tmp_path, *BACKGROUND)
    stopped = forks.call(stopped_amid_a_write, overrides)
    assert stopped.returncode == STOP_EXIT_CODE, stopped.stderr
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000004", "step_00000006"]
    assert train(overrides) == 0
    assert_same(everything(tmp_path), everything(straight))


def test_a_full_disk_is_told_at_the_next_update(tiny_corpus: Path, tmp_path: Path) -> None:
    def full() -> None:
        time.sleep(0.05)
        if complete_checkpoints(tmp_path):
            raise OSError(28, "No space left on device")

    with writing(full), pytest.raises(CheckpointError, match=r"partial_00000008: .*rank 0: OSError: .*No space left"):
        train(settings(tiny_corpus, tmp_path, *BACKGROUND))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000004"]


def test_a_thread_takes_no_signals(straight: Path) -> None:
    """Python runs handlers in the main thread alone, and a thread dies with its process: nothing is left behind."""
    seen: list[Any] = []
    going_on = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        saving = PendingSave(lambda: going_on.wait(PATIENCE_S) and [], list)  # type: ignore[arg-type,return-value]
        saving.start(lambda path: None, background=True)
        send()
        assert seen == [signal.SIGTERM]
        assert not saving.done()
        going_on.set()
        assert saving.error() is None
    finally:
        signal.signal(signal.SIGTERM, before)
