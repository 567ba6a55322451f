"""Two jobs never write into one run folder."""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from megaopus.__main__ import main
from megaopus.errors import CheckpointError
from megaopus.run_folder import LOCK, run_lock
from tests.exact.resume_runs import settings, train

HOLD = "import sys, pathlib; from megaopus.run_folder import run_lock\n"
HOLD += "with run_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); input()\n"


def test_the_second_job_is_refused_and_a_killed_one_is_no_obstacle(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = settings(tiny_corpus, run, "train.steps=1")
    assert train(overrides) == 0
    before = (run / "metrics.jsonl").read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert main(["train", *overrides]) == 2
        said = capsys.readouterr().err
        assert f"another job works in this folder (host {socket.gethostname()}, pid {first.pid}, since " in said
        assert (run / "metrics.jsonl").read_bytes() == before
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (run / LOCK).exists()
    assert train(overrides) == 0


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), run_lock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / LOCK).exists()
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with run_lock(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []  # a folder that was there stays


def test_what_the_run_wrote_stays(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        (tmp_path / "config.yaml").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", LOCK}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    again = run_lock(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"run folder cannot be written .*; set another run_dir"), again:
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with run_lock(tmp_path / "run"):
        pass
    assert "cannot be locked" in capsys.readouterr().out
