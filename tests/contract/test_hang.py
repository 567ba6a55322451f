"""A rank that stops is found out within ``engine.timeout_minutes``: its place, and where the others wait for it."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.training.timers import Timers
from megaopus.training.watchdog import KEY, HangWatchdog
from tests import forks
from tests.cluster.slurm import until
from tests.exact.resume_runs import settings
from tests.pool import free_ports

TIMEOUT_S = 15.0


@pytest.fixture(scope="module")
def hung(
    tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory, selected: Callable[[str], list[int]]
) -> Iterator[dict[int, list[forks.Program]]]:
    """The rank that is stopped -> both ranks of a run, all of them started: each waits for most of its time."""
    runs = {stopped: start(tiny_corpus, tmp_path_factory.mktemp("hung"), stopped) for stopped in selected("stopped")}
    try:
        yield runs
    finally:
        for run in runs.values():
            for rank in run:
                rank.kill()


def start(corpus: Path, run_dir: Path, stopped: int) -> list[forks.Program]:
    (port,) = free_ports(1)
    command = ["tests.faults", "SIGSTOP", "3", str(stopped), "train"]
    command += settings(corpus, run_dir, f"engine.timeout_minutes={TIMEOUT_S / 60}")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        forks.Program(forks.main, *command, environment={**place, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_and_the_others_end(stopped: int, hung: dict[int, list[forks.Program]]) -> None:
    """Rank 0 keeps the store here: when it is stopped, the other cannot ask who is silent, but tells where it waits."""
    waiting = 1 - stopped
    ended = hung[stopped][waiting].result()
    said = ended.stderr
    assert ended.returncode == 1
    assert re.search(rf"no progress for \d+ s: rank {waiting} in phase '[a-z]+' of update [23]; its stacks:", said), (
        said
    )
    assert re.search(r'File ".*", line \d+ in run$', said, re.MULTILINE), said
    if stopped == 1:
        place = rf"host .*, pid {hung[stopped][1].pid}, phase '.*' of update \d"
        assert re.search(rf"rank 0 says of rank 1: {place}; SILENT: stopped, cut off or gone", said), said
    assert re.search("(?i)time.?d? ?out", said)  # gloo's own words, when engine.timeout_minutes are over


def test_a_rank_alone_tells_where_it_is() -> None:
    now = [0.0]
    mesh, timers, stream = Mesh(ParallelConfig(), "cpu"), Timers(lambda: now[0]), io.StringIO()
    watch = HangWatchdog(mesh, timers, 0.2, stream)
    try:
        timers.step = 7
        with timers("select"):
            now[0] += 1
            until(lambda: "no progress" in stream.getvalue(), forks.TIMEOUT_S, "nothing is said")
        timers.step = 8
        for _ in range(10):  # progress
            with timers("train"):
                now[0] += 0.1
                time.sleep(0.05)
    finally:
        watch.close()
        mesh.close()
    said = stream.getvalue()
    assert re.search(r"no progress for \d+ s: rank 0 in phase 'select' of update 7", said)
    assert said.count("no progress") == 1


def test_one_rank_speaks_for_a_large_job() -> None:
    """Of 40 ranks 36 wait in an update, two are still in the one before, rank 0 and another have stopped."""
    stores, streams, watches = dist.HashStore(), [io.StringIO() for _ in range(40)], []
    now = [0.0]
    silent, late = (0, 30), (7, 8)
    for rank in range(40):
        mesh: Any = SimpleNamespace(rank=rank, shape=SimpleNamespace(world_size=40))
        timers = Timers(lambda: now[0])
        timers.step = 4 if rank in late else 5
        watches.append(HangWatchdog(mesh, timers, 1.0, streams[rank], stores))
    try:
        until(lambda: stores.check([KEY.format(rank=rank) for rank in range(40)]), forks.TIMEOUT_S, "ranks are silent")
        for rank in silent:
            watches[rank].close()
        now[0] += 2
        until(lambda: "no progress" in streams[7].getvalue(), forks.TIMEOUT_S, "nobody is asked")
    finally:
        for watch in watches:
            watch.close()
    said = [stream.getvalue() for stream in streams]
    assert [rank for rank, text in enumerate(said) if text] == [1, 7], "who speaks, and the first of the late ones"
    lines = said[1].splitlines()
    assert re.fullmatch("no progress for 2 s: rank 1 in phase '.*' of update 5; its stacks:", lines[0])
    told = [line for line in lines if line.startswith("rank 1 says of")]
    assert len(told) == 4
    assert told[0].startswith("rank 1 says of ranks 2-6, 9-29, 31-39: phase")
    assert told[1].startswith("rank 1 says of ranks 7-8: phase")
    assert [line.endswith("SILENT: stopped, cut off or gone") for line in told[2:]] == [True, True]
