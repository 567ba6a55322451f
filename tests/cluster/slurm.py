"""A Slurm of this machine alone, from Debian's packages slurm-wlm and munge, in a folder of its own; needs root.

``python -m tests.cluster.slurm COMMAND...`` runs one in it: one node, and two partitions: ``high`` preempts ``low``.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.pool import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CPUS = 8
"""What the node claims, so that several small jobs run at a time."""
GRACE_SECONDS = 60
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdParameters=config_overrides
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
FirstJobId={first_job}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Return why no Slurm can run here, or None."""
    if os.geteuid() != 0:
        return "a Slurm for the test needs root: its daemons start processes for users"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=_path())]:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)"
    return None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@contextmanager
def running() -> Iterator[dict[str, str]]:
    """Daemons up; yields the environment in which sbatch and the others find them. OSError if one does not start."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    daemons: list[subprocess.Popen] = []
    try:
        environment = _start(folder, daemons)
        try:
            yield environment
        finally:
            _end_jobs(environment)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, daemons: list[subprocess.Popen]) -> dict[str, str]:
    munge = folder / "munge"
    munge.mkdir(mode=0o755)
    key = munge / "key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(128))
    for path in (munge, key):
        shutil.chown(path, "munge", "munge")
    controller_port, node_port = free_ports(2)
    settings = {
        "host": socket.gethostname().split(".")[0],
        "controller_port": controller_port,
        "node_port": node_port,
        "folder": folder,
        "cpus": CPUS,
        "first_job": random.randrange(1, 10_000),  # a job's rendezvous port follows from its id
        "grace": GRACE_SECONDS,
    }
    (folder / "slurm.conf").write_text(CONF.format(**settings).lstrip())
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def last_words() -> str:
        logs = sorted(folder.glob("*.out"))
        return "; ".join(f"{log.stem}: {(log.read_text().splitlines() or ['nothing'])[-1]}" for log in logs)

    def up(condition: Callable[[], bool], seconds: float) -> None:
        def there() -> bool:
            if any(daemon.poll() is not None for daemon in daemons):
                raise OSError("a daemon ended")
            return condition()

        try:
            until(there, seconds, "not up in time")
        except OSError as error:
            raise OSError(f"{error} ({last_words()})") from None

    def start(*command: str, user: str | None = None) -> None:
        log = (folder / f"{command[0]}.out").open("wb")
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, user=user, group=user))

    files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed")]
    start("munged", "--foreground", *files, f"--log-file={munge}/log", f"--socket={munge}/socket", user="munge")
    up((munge / "socket").exists, 20)
    start("slurmctld", "-D")
    start("slurmd", "-D")

    def idle() -> bool:
        state = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
        return "idle" in state.stdout

    up(idle, 60)
    return environment


def _end_jobs(environment: dict[str, str]) -> None:
    """Jobs outlive the daemons."""
    subprocess.run(["scancel", "--user=root"], env=environment)
    queue = ["squeue", "-h"]
    until(lambda: not subprocess.run(queue, env=environment, capture_output=True).stdout, 30, "jobs do not end")


def until(condition: Callable[[], Any], seconds: float, problem: str) -> Any:
    """Wait for ``condition`` and return what it gives; OSError with ``problem`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise OSError(problem)
        time.sleep(0.1)
    return value


if __name__ == "__main__":
    with running() as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)
