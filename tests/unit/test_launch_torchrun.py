"""launch/torchrun.sh: what it starts, what it refuses, and what it does with signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megaopus.distributed import mesh
from megaopus.errors import EngineError
from tests.cluster.slurm import until
from tests.forks import TIMEOUT_S
from tests.pool import free_ports

ROOT = Path(__file__).parents[2]


def launcher(*arguments, **environment):
    environment = {"PATH": os.environ["PATH"], "PYTHON": "py", "DRY_RUN": "1", **environment}
    script = ROOT / "launch" / "torchrun.sh"
    return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_launcher_on_one_node_and_on_many():
    one = launcher("4", "model=tiny", "data.target_domains=[docs]")
    start = "py -m torch.distributed.run"
    assert one.stdout.startswith(
        f"{start} --standalone --nproc-per-node 4 -m megaopus train model=tiny data.target_domains="
    )
    many = launcher("8", NNODES="2", NODE_RANK="1", MASTER_ADDR="node0", MASTER_PORT="29500")
    where = "--nnodes 2 --node-rank 1 --master-addr node0 --master-port 29500 --rdzv-conf timeout=600"
    assert many.stdout.strip() == f"{start} {where} --nproc-per-node 8 -m megaopus train"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "NPROC is missing"),
        (["model=tiny"], {}, "NPROC must be a number of processes, not 'model=tiny'"),
        (["0"], {}, "NPROC must be a number"),
        (["2"], {"NNODES": "two"}, "NNODES must be a number"),
        (["2"], {"NNODES": "2"}, "NODE_RANK is not set"),
        (["2"], {"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        (["2"], {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "must lie in 0..1, not '2'"),
        (["2"], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT must be"),
        (["2"], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "MASTER_PORT must be"),
        (["2"], {"STOP_SECONDS": "10m"}, "STOP_SECONDS must be a number of seconds, not '10m'"),
    ],
)
def test_launcher_refuses_what_is_missing(arguments, environment, message):
    done = launcher(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("ignored", [True, False])
def test_sighup_stays_ignored_under_nohup(ignored, tmp_path):
    """torchrun would take it, and end the run with the terminal."""
    stub = tmp_path / "py"
    stub.write_text("#!/bin/sh\necho $PET_SIGNALS_TO_HANDLE\n")
    stub.chmod(0o755)
    how = "trap '' HUP; " if ignored else ""
    command = ["bash", "-c", f'{how}exec "$0" 1', ROOT / "launch" / "torchrun.sh"]
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1" + ("" if ignored else ",SIGHUP")


def test_cuda_is_set_up_unless_the_user_did(tmp_path):
    stub = tmp_path / "py"
    stub.write_text("#!/bin/sh\necho $CUDA_DEVICE_MAX_CONNECTIONS $PYTORCH_ALLOC_CONF $PYTORCH_CUDA_ALLOC_CONF\n")
    stub.chmod(0o755)
    given = {"DRY_RUN": "0", "PYTHON": str(stub)}
    assert launcher("1", **given).stdout == "1 expandable_segments:True\n"
    assert launcher("1", **given, CUDA_DEVICE_MAX_CONNECTIONS="8", PYTORCH_ALLOC_CONF="a:1").stdout == "8 a:1\n"
    assert launcher("1", **given, PYTORCH_CUDA_ALLOC_CONF="b:1").stdout == "1 b:1\n"
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    exports = re.findall(r"^.*export (?:CUDA_DEVICE|PYTORCH_).*$", script, re.MULTILINE)
    assert exports
    assert all(line in (ROOT / "launch" / "torchrun.sh").read_text() for line in exports)


@pytest.mark.parametrize(("local_rank", "visible", "expected"), [(0, 8, 0), (7, 8, 7), (3, 1, 0)])
def test_a_rank_takes_its_own_gpu(local_rank, visible, expected):
    assert mesh._gpu_of(local_rank, visible) == expected
    with pytest.raises(EngineError, match="rank 4 of this node sees 2 GPUs: launch as many processes a node as GPUs"):
        mesh._gpu_of(4, 2)


def two_nodes(rank, **more):
    (port,) = free_ports(1)
    return {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def test_a_rendezvous_host_must_resolve():
    done = launcher("1", DRY_RUN="0", **two_nodes(1, MASTER_ADDR="no-such-host.invalid"))
    assert done.returncode == 2
    assert "MASTER_ADDR=no-such-host.invalid does not resolve on" in done.stderr


def test_a_python_without_megaopus_is_named():
    done = launcher("1", DRY_RUN="0", PYTHON="false")
    assert done.returncode == 2
    assert "false cannot import megaopus here: set PYTHON to one that can" in done.stderr


STUB = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[2]), os.environ["RANK"]
def save(number, frame):
    time.sleep(float(sys.argv[3]))
    (folder / f"saved{rank}").write_text(signal.Signals(number).name)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
(folder / f"ready{rank}").touch()
time.sleep(3600)
"""


def start(folder, seconds, **environment):
    """torchrun.sh with two ranks that stand for the trainer and take ``seconds`` to save."""
    (folder / "megaopus").mkdir(parents=True)
    (folder / "megaopus" / "__init__.py").touch()
    (folder / "megaopus" / "__main__.py").write_text(STUB)
    variables = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(folder), **environment}
    command = [ROOT / "launch" / "torchrun.sh", "2", str(folder), str(seconds)]
    return subprocess.Popen(command, env=variables, cwd=folder, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_signal_reaches_every_rank_which_has_stop_seconds_to_save(tmp_path):
    runs = {
        "TERM": start(tmp_path / "TERM", 1),
        "USR1": start(tmp_path / "USR1", 1),
        "slow": start(tmp_path / "slow", 100, STOP_SECONDS="1"),
    }
    try:
        for name, run in runs.items():
            until(
                lambda name=name: len(list((tmp_path / name).glob("ready*"))) == 2, TIMEOUT_S, f"{name} does not start"
            )
            run.send_signal(signal.SIGUSR1 if name == "USR1" else signal.SIGTERM)
        assert all(run.wait(TIMEOUT_S) == 1 for run in runs.values())
    finally:
        for run in runs.values():
            run.kill()
    saved = {path.parent.name + path.name[-1]: path.read_text() for path in tmp_path.glob("*/saved*")}
    assert saved == {"TERM0": "SIGTERM", "TERM1": "SIGTERM", "USR10": "SIGUSR1", "USR11": "SIGUSR1"}


@pytest.mark.slow
def test_a_node_that_does_not_come_ends_the_others_and_none_trains_alone(tmp_path):
    done = launcher(
        "1", f"run_dir={tmp_path}/run", DRY_RUN="0", PYTHON=sys.executable, **two_nodes(0, JOIN_SECONDS="1")
    )
    assert done.returncode == 1
    assert "1/2 clients joined" in done.stderr
    assert list(tmp_path.iterdir()) == []
