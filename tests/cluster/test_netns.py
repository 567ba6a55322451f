"""launch/torchrun.sh on two nodes with addresses of their own: one is cut off, both end in time, the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megaopus.checkpoint.checkpointer import complete_checkpoints
from tests.cluster import netns
from tests.cluster.conftest import CUT_SECONDS, ROOT, TORCHRUN, environment, overrides, updates
from tests.cluster.slurm import until
from tests.exact.resume_runs import assert_same, everything
from tests.forks import TIMEOUT_S as PATIENCE_S


@pytest.fixture
def pair() -> Iterator[list[netns.Node]]:
    if reason := netns.missing():
        pytest.skip(reason)
    with netns.nodes() as pair:
        yield pair


def start(pair: list[netns.Node], folder: Path, settings: list[str]) -> list[subprocess.Popen]:
    """One rank on each node; what they say goes to ``folder``/node0 and node1."""
    started = []
    for rank, node in enumerate(pair):
        node.environment |= environment()
        with (folder / f"node{rank}").open("w") as out:
            started.append(node.start([TORCHRUN, "1", *settings], cwd=ROOT, stdout=out, stderr=out))
    return started


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_node_cut_off_ends_both_in_time_and_the_run_goes_on(
    pair: list[netns.Node], straight: dict[str, Any], tiny_corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = overrides(tiny_corpus, run_dir)
    nodes = start(pair, tmp_path, settings)
    try:
        until(lambda: updates(run_dir) >= 6 or nodes[0].poll() is not None, PATIENCE_S, "no updates")
        pair[1].link("down")
        assert [node.wait(PATIENCE_S) for node in nodes] == [1, 1]
    finally:
        end(nodes)
    for rank in range(2):
        said = (tmp_path / f"node{rank}").read_text()
        assert f"Timed out waiting {CUT_SECONDS * 1000}ms" in said, said
        assert f"rank      : {rank} (local_rank: 0)" in said
    assert 4 <= updates(run_dir) < 40
    saved = complete_checkpoints(run_dir)[-1].name
    pair[1].link("up")
    nodes = start(pair, tmp_path, settings)
    try:
        assert [node.wait(PATIENCE_S) for node in nodes] == [0, 0], (tmp_path / "node0").read_text()
    finally:
        end(nodes)
    assert f"resumed from {run_dir / 'checkpoints' / saved} " in (tmp_path / "node0").read_text().replace("\n", "")
    assert_same(everything(run_dir), straight)
