"""launch/submit.py under a real Slurm: preempted, requeued, resumed; and which ends of a job are requeued."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import slurm
from tests.cluster.conftest import ROOT, environment, overrides, updates
from tests.cluster.slurm import until
from tests.exact.resume_runs import assert_same, everything
from tests.forks import TIMEOUT_S as PATIENCE_S


class Cluster:
    """Commands of a running Slurm."""

    def __init__(self, variables: dict[str, str]):
        self.environment = {**variables, **{name: environment()[name] for name in ("PYTHON", "OMP_NUM_THREADS")}}

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, settings: list[str], *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/submit.py", "--time", "10", "--stop-before", "60", "--partition", "low"]
        command += [*options, "--", *settings]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)

    def job(self, submitted: subprocess.CompletedProcess[str]) -> str:
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.split()[1]

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))
        assert found
        return found[1]

    def end(self, job: str) -> str:
        """Wait for it; its state then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return until(
            lambda: (state := self.field(job, "JobState")) in ended and state, PATIENCE_S, f"job {job} does not end"
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := slurm.missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            variables = stack.enter_context(slurm.running())
        except OSError as error:
            pytest.skip(f"Slurm cannot start here: {error}")
        yield Cluster(variables)


def test_a_preempted_job_saves_is_requeued_and_ends_as_the_straight_run(
    cluster: Cluster, straight: dict[str, Any], tiny_corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    output = run_dir / "submissions" / "000" / "output.txt"
    settings = overrides(tiny_corpus, run_dir)
    job = cluster.job(cluster.submit(settings, "--tasks-per-node", "2"))
    until(lambda: updates(run_dir) >= 6, PATIENCE_S, "no updates")
    # Held until Slurm preempts it (SIGCONT, SIGTERM), so that it is amid its forty updates then.
    cluster.call("scancel", "--signal=STOP", job)
    second = cluster.submit(settings, "--tasks-per-node", "2")
    assert second.returncode == 2
    assert f"job {job} of {run_dir}/submissions/000 is " in second.stderr  # RUNNING, or SIGNALING a moment
    assert [path.name for path in (run_dir / "submissions").iterdir()] == ["000"]
    whole_node = ["--partition", "high", "--ntasks", str(slurm.CPUS), "--time", "1", "--output", "/dev/null"]
    cluster.call("sbatch", *whole_node, "--wrap", "true")
    assert cluster.end(job) == "COMPLETED", output.read_text()
    said = output.read_text()
    assert cluster.field(job, "Restarts") == "1"
    stopped = re.search(r"(?:SIGTERM|another rank was asked to stop): stopping after (\d+) updates", said)
    assert stopped, said
    assert 6 <= int(stopped[1]) < 40
    for line in ("start 1, 2 ranks", "preempted: requeued", "start 2, 2 ranks", "ended with status 0: finished"):
        assert f"job {job}: {line}" in said
    assert f"after {stopped[1]} steps" in said  # resumed from
    assert_same(everything(run_dir), straight)
    assert (run_dir / "launch.sh").read_text().endswith(f"\nsbatch {run_dir}/submissions/000/job.sbatch\n")


STUB = """#!/usr/bin/env bash
# Stands for python -m megaopus train behaviour=... run_dir=...: the same signals and exit statuses, at once.
for argument; do
  case $argument in behaviour=*) behaviour=${argument#*=} ;; run_dir=*) run_dir=${argument#*=} ;; esac
done
[[ $1 != -c && $3 != check ]] || exit 0 # what is asked before it
[[ $behaviour != fails ]] || exit 2
[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || exit 0
save() {
  [[ $behaviour != stalls ]] || exit 143
  mkdir -p "$run_dir/checkpoints/step_1"
  exit 143
}
trap save USR1 TERM
touch "$run_dir/ready"
for _ in {1..1200}; do sleep 0.1; done
"""
ENDS = {
    # name: (behaviour, signal, state in the end, starts, what the job says)
    "time limit": ("saves", ["--batch", "--signal=USR1"], "COMPLETED", 2, "stopped before its time limit: requeued"),
    "no progress": ("stalls", ["--batch", "--signal=USR1"], "FAILED", 1, "without a new checkpoint: not requeued"),
    "failure": ("fails", None, "FAILED", 1, "ended with status 2: failed, not requeued"),
    "cancelled": ("saves", [], "CANCELLED", 1, "not requeued"),
    "tasks alone": ("saves", ["--signal=TERM"], "FAILED", 1, "stopped by a signal to its tasks: not requeued"),
}


def test_which_ends_are_requeued(cluster: Cluster, tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    jobs = {}
    for name, (behaviour, *_) in ENDS.items():
        settings = [f"run_dir={tmp_path / name.replace(' ', '_')}", f"behaviour={behaviour}"]
        jobs[name] = cluster.job(cluster.submit(settings, "--tasks-per-node", "1", "--python", str(stub)))
    for name, (_, how, *_) in ENDS.items():
        if how is not None:
            ready = tmp_path / name.replace(" ", "_") / "ready"
            until(ready.exists, PATIENCE_S, f"{name}: no start")
            cluster.call("scancel", *how, jobs[name])
    for name, (_, _, state, starts, line) in ENDS.items():
        run_dir = tmp_path / name.replace(" ", "_")
        assert cluster.end(jobs[name]) == state, name
        said = (run_dir / "submissions" / "000" / "output.txt").read_text()
        assert line in said, said
        assert said.count(": start ") == starts, said
