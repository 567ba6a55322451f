"""A signal asks for a checkpoint and an orderly end; the run then goes on as if nothing had happened.

Runs that get a signal have a process of their own: in this one it would be meant for the tests.
"""

from __future__ import annotations

import ctypes
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from megaopus import build
from megaopus.__main__ import main as megaopus
from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.checkpoint.config import CheckpointConfig
from megaopus.config.compose import compose
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.engine.megatron.scoring import MegatronScoringBackend
from megaopus.training.signals import INTERRUPT_EXIT_CODE, STOP_EXIT_CODE, StopSignal, time_to_save
from tests import forks
from tests.exact.resume_runs import OPTIMIZERS, SELECTIONS, assert_same, everything, rows, settings, train
from tests.faults import at_step

CHOSEN = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"]]


@pytest.fixture(scope="module")
def straight(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(settings(tiny_corpus, run_dir, *CHOSEN)) == 0
    return everything(run_dir)


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def signal_in(owner: Any, name: str, step: int, number: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """A signal in the first call of a method of an engine (or its scoring backend) after ``step`` updates."""
    original = getattr(owner, name)
    sent = []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = getattr(self, "_engine", self)
        if engine.step == step and not sent:
            sent.append(True)
            send(number)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        yield
    assert sent


PHASES: dict[str, tuple[Callable[[], AbstractContextManager[None]], int]] = {
    # phase: (the signal, updates done when the run stops)
    "scoring": (lambda: signal_in(MegatronScoringBackend, "losses", 6), 7),  # no check of step 5 comes before
    "proxy gradient": (lambda: signal_in(MegatronScoringBackend, "gradient", 6), 7),
    "training": (lambda: signal_in(MegatronEngine, "train_step", 2), 3),
    "validating, SIGUSR1": (lambda: signal_in(MegatronEngine, "evaluate", 6, signal.SIGUSR1), 6),
    "saving": (lambda: signal_in(MegatronEngine, "prepare_save", 4), 4),
    "SIGINT, and what torchrun adds": (
        lambda: at_step(5, lambda: (send(signal.SIGINT), send())),
        6,
    ),
}


def train_with_a_signal(phase: str, overrides: list[str]) -> int:
    with PHASES[phase][0]():
        return train(overrides)


@pytest.mark.parametrize("phase", PHASES)
def test_stop_saves_and_the_run_goes_on(phase: str, straight: dict, tiny_corpus: Path, tmp_path: Path) -> None:
    updates = PHASES[phase][1]
    overrides = settings(tiny_corpus, tmp_path, *CHOSEN)
    stopped = forks.call(train_with_a_signal, phase, overrides)
    assert stopped.returncode == STOP_EXIT_CODE == 143, stopped.stderr
    assert complete_checkpoints(tmp_path)[-1].name == f"step_{updates:08d}"
    assert len((tmp_path / "selection.jsonl").read_text().splitlines()) == updates
    assert train(overrides) == 0
    assert_same(everything(tmp_path), straight)


def train_with_two_interrupts(overrides: list[str]) -> int:
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)

    def stuck() -> None:
        """Be where no handler of Python's runs, as in a collective that never ends."""
        for seconds in (0.1, 0.2):
            threading.Timer(seconds, send, [signal.SIGINT]).start()
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)

    with at_step(0, stuck):
        return train(overrides)


def test_a_second_interrupt_ends_at_once(tiny_corpus: Path, tmp_path: Path) -> None:
    ended = forks.Program(train_with_two_interrupts, settings(tiny_corpus, tmp_path)).result(60)
    assert ended.returncode == INTERRUPT_EXIT_CODE == 130, ended.stderr
    assert ended.stderr.splitlines()[-1] == "Ctrl-C again: ended at once; the checkpoints that were whole are"


def train_without_a_reader(where: str, overrides: list[str]) -> int:
    """Train with output and errors into a pipe that nobody reads, under nohup, or on a terminal that is closed."""
    ours, theirs = os.pipe()[::-1] if where == "pipe" else os.openpty()[::-1]
    os.close(theirs)
    for number in (1, 2):
        os.dup2(ours, number)
    if where == "pipe":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with at_step(5, lambda: send(signal.SIGHUP)):
        return megaopus(["train", *overrides])


@pytest.mark.parametrize(("where", "status", "updates"), [("pipe", 0, 10), ("terminal", STOP_EXIT_CODE, 6)])
def test_output_that_nobody_reads_stops_nothing(
    where: str, status: int, updates: int, straight: dict, tiny_corpus: Path, tmp_path: Path
) -> None:
    overrides = settings(tiny_corpus, tmp_path, *CHOSEN, "logging.every=1")
    assert forks.call(train_without_a_reader, where, overrides).returncode == status
    assert complete_checkpoints(tmp_path)[-1].name == f"step_{updates:08d}"
    assert rows(tmp_path / "selection.jsonl") == straight["selection"][:updates]


def test_a_run_saves_every_quarter_of_an_hour_unless_told_otherwise(tiny_corpus: Path) -> None:
    assert CheckpointConfig().every_seconds == 900
    assert compose([f"data.path={tiny_corpus}", "data.seq_len=16"]).checkpoint.every == "15m"


def test_under_torchrun_the_time_to_save_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert time_to_save() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "after 30 s: TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in time_to_save()
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert "after 600 s" in time_to_save()


def train_with_a_signal_at_the_start(overrides: list[str]) -> int:
    original = build.build_trainer

    def signalled(*args: Any) -> Any:
        send()
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_trainer", signalled)
        return train(overrides)


def test_a_stop_before_the_first_update_saves_nothing(straight: dict, tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = settings(tiny_corpus, tmp_path, *CHOSEN)
    stopped = forks.call(train_with_a_signal_at_the_start, overrides)
    assert stopped.returncode == STOP_EXIT_CODE, stopped.stderr
    assert complete_checkpoints(tmp_path) == []
    assert "no update made: nothing to save" in stopped.stdout
    assert not (tmp_path / "metrics.jsonl").exists()
    assert train(overrides) == 0
    assert_same(everything(tmp_path), straight)


def train_with_a_signal_at_the_end(overrides: list[str]) -> int:
    with at_step(9, send):
        return train(overrides)


def test_a_stop_in_the_last_update_leaves_only_the_validation(
    straight: dict, tiny_corpus: Path, tmp_path: Path
) -> None:
    overrides = settings(tiny_corpus, tmp_path, *CHOSEN)
    stopped = forks.call(train_with_a_signal_at_the_end, overrides)
    assert stopped.returncode == STOP_EXIT_CODE, stopped.stderr
    assert complete_checkpoints(tmp_path)[-1].name == "step_00000010"
    assert train(overrides) == 0
    assert_same(everything(tmp_path), straight)


def test_the_command_exits_with_143(straight: dict, tiny_corpus: Path, tmp_path: Path) -> None:
    overrides = settings(tiny_corpus, tmp_path, *CHOSEN)
    stopped = forks.program("tests.faults", "SIGTERM", "5", "0", "train", *overrides)
    assert stopped.returncode == 143, stopped.stderr
    assert "SIGTERM: stopping after 6 updates\n" in stopped.stdout
    saved = tmp_path / "checkpoints" / "step_00000006"
    assert stopped.stdout.splitlines()[-1] == f"saved {saved}: the same command goes on"
    assert train(overrides) == 0
    assert_same(everything(tmp_path), straight)


def test_a_save_starts_no_process(tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to the whole process group would end a helper process, and the save that it asks for with it."""

    def refused(self: multiprocessing.process.BaseProcess) -> None:
        raise AssertionError(f"{self.name} was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refused)
    assert train(settings(tiny_corpus, tmp_path, "train.steps=2")) == 0
    assert len(complete_checkpoints(tmp_path)) == 1


def test_a_run_in_this_process_leaves_signals_to_the_tests(tiny_corpus: Path, tmp_path: Path) -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []
    with at_step(1, lambda: inside.append(signal.getsignal(signal.SIGTERM))):
        assert train(settings(tiny_corpus, tmp_path, "train.steps=2")) == 0
    assert inside == [before]


def handlers_before_and_after() -> int:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        send()
        assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    return 0


def test_handlers_are_put_back() -> None:
    done = forks.call(handlers_before_and_after)
    assert done.returncode == 0, done.stderr
