"""A rank that stops is found out within ``engine.timeout_minutes``: its place, and where the others wait for it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.training.watchdog import HangWatchdog
from tests.exact.resume_runs import settings
from tests.harness import free_ports


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_and_the_others_end(stopped: int, tiny_corpus: Path, tmp_path: Path) -> None:
    """Rank 0 keeps the store here: when it is stopped, the other cannot ask who is silent, but tells where it waits."""
    waiting = 1 - stopped
    (port,) = free_ports(1)
    program = [sys.executable, "-m", "tests.faults", "SIGSTOP", "3", str(stopped), "train"]
    program += settings(tiny_corpus, tmp_path, "engine.timeout_minutes=0.15")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            program,
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        _, said = ranks[waiting].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[waiting].returncode == 1
    assert re.search(rf"no progress for \d+ s: rank {waiting} in phase '[a-z]+' of update [23]; its stacks:", said), (
        said
    )
    assert re.search(r'File ".*", line \d+ in run$', said, re.MULTILINE), said
    if stopped == 1:
        place = rf"host .*, pid {ranks[1].pid}, phase '.*' of update \d"
        assert re.search(rf"rank 0 says of rank 1: {place}; SILENT: stopped, cut off or gone", said), said
    assert re.search("(?i)time.?d? ?out", said)  # gloo's own words, when engine.timeout_minutes are over


def test_a_rank_alone_tells_where_it_is() -> None:
    mesh, stream = Mesh(ParallelConfig(), "cpu"), io.StringIO()
    watch = HangWatchdog(mesh, 0.2, stream)
    try:
        with watch.phase("score", 7):
            time.sleep(0.6)
        for _ in range(10):  # progress
            with watch.phase("train", 8):
                time.sleep(0.05)
    finally:
        watch.close()
        mesh.close()
    said = stream.getvalue()
    assert re.search(r"no progress for \d+ s: rank 0 in phase 'score' of update 7", said)
    assert said.count("no progress") == 1
