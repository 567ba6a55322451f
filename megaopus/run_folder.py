"""Keeps a run's folder: config.yaml, environment.json, launch.sh, one of each a launch, and the lock of its job."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megaopus import __version__
from megaopus.errors import CheckpointError
from megaopus.fs import disk_full, write_whole

LOCK = "lock"
LAUNCHES = "launches"
OLD_RECORDS = "old_records"
_SMALL_BYTES = 1 << 16
"""More than the files of a launch take."""
_OF_A_LAUNCH = ("config.yaml", "environment.json", "launch.sh", LAUNCHES)
PACKAGES = ("torch", "tokenizers", "numpy")
"""Whose versions a run's environment.json tells beside our own and the engines'."""


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, made if it is missing, and removed again, with its parents, if it is left empty.

    The lock belongs to the process: however that ends, it is free. The file stays and says who had it last.

    Raises:
        CheckpointError: another job holds it (host and process are named), or the folder cannot be written.
    """
    path = run_dir / LOCK
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointError(_unwritable(run_dir, error)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{run_dir}: another job works in this folder ({_holder(descriptor)}): "
                "wait for it, stop it, or set another run_dir (nothing was written)"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"WARNING {path}: cannot be locked ({error}): never start two jobs in {run_dir}", flush=True)
        try:
            _sign(descriptor, run_dir)
            yield
        finally:
            if {each.name for each in run_dir.iterdir()} == {LOCK}:  # a start that failed before it wrote anything
                path.unlink()
                with suppress(OSError):
                    for folder in made:
                        folder.rmdir()
    finally:
        os.close(descriptor)


def _sign(descriptor: int, run_dir: Path) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if job := os.environ.get("SLURM_JOB_ID"):
        holder["slurm_job"] = job
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
    except OSError as error:
        raise CheckpointError(_unwritable(run_dir, error)) from error


def set_record_aside(run_dir: Path, record: Iterable[str]) -> Path | None:
    """Move what an earlier run left into ``old_records/TIME`` of its folder, every file under the name that it has.

    ``record``: names in the folder; the files of its launches go with them, so that it is still the record of a run.

    Returns:
        where it is now; None: nothing of that name is there.

    Raises:
        CheckpointError: it cannot be moved.
    """
    found = [name for name in record if (run_dir / name).exists()]
    if not found:
        return None
    stem = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    place = run_dir / OLD_RECORDS / stem
    try:
        for again in itertools.count(1):
            try:
                place.mkdir(parents=True)
                break
            except FileExistsError:
                place = run_dir / OLD_RECORDS / f"{stem}_{again}"
        for name in (*found, *_OF_A_LAUNCH):
            with suppress(FileNotFoundError):
                (run_dir / name).rename(place / name)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: holds the record of a run without checkpoints, which cannot be moved to {place} ({error}); "
            "move it away, or set another run_dir"
        ) from error
    return place


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return ", ".join(f"{key} {value}" for key, value in found.items())
    except (ValueError, AttributeError):
        return "it does not say which"


def write_run_folder(
    run_dir: Path,
    config_yaml: str,
    *,
    device: str,
    world_size: int,
    first_step: int,
    facts: Mapping[str, Any],
    packages: Iterable[str] = (),
) -> None:
    """Write config.yaml, environment.json and launch.sh: what a launch runs with, where, and how it was started.

    Each launch also keeps them under ``launches/NNN``, so that a resumed run still tells how it began.

    Args:
        run_dir: the folder, made if it is missing.
        config_yaml: every setting.
        device: cpu or cuda.
        world_size: ranks of the launch.
        first_step: the first that it takes.
        facts: what else environment.json tells: name -> plain value.
        packages: further ones whose versions are told.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "world_size": world_size,
        "packages": {"megaopus": __version__, **{name: _version(name) for name in (*PACKAGES, *packages)}},
        "git": _git_revision(),
        "arguments": sys.argv[1:],
        "first_step": first_step,
        **facts,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    contents = {
        "config.yaml": config_yaml,
        "environment.json": json.dumps(environment, indent=1) + "\n",
        "launch.sh": _launch_script(world_size),
    }
    try:
        launches = run_dir / LAUNCHES
        launches.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name) for path in launches.iterdir() if path.name.isdecimal()), default=-1)
        partial = launches / "partial"
        partial.mkdir(exist_ok=True)
        for name, text in contents.items():
            write_whole(partial / name, text)
        partial.rename(launches / f"{number:03d}")
        for name, text in contents.items():
            write_whole(run_dir / name, text)
    except OSError as error:
        raise CheckpointError(_unwritable(run_dir, error)) from error


def _unwritable(run_dir: Path, error: OSError) -> str:
    room = disk_full(error, run_dir, _SMALL_BYTES)
    return f"{run_dir}: the run folder cannot be written ({error}){room}; set another run_dir"


def _launch_script(world_size: int) -> str:
    """Write a script that gives the command of this launch again, in the folder it was given in.

    Who starts the ranks without torchrun says how in the environment: MEGAOPUS_LAUNCHER, a whole command.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    program = "python"
    if world_size > 1:
        nodes = f"--nnodes {world_size // per_node} " if world_size > per_node else ""
        program = f"torchrun {nodes}--nproc-per-node {per_node}"
    command = os.environ.get("MEGAOPUS_LAUNCHER") or f"{program} -m megaopus {shlex.join(sys.argv[1:])}"
    return f"#!/usr/bin/env bash\nset -euo pipefail\ncd {shlex.quote(os.getcwd())}\n{command}\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str | None:
    """Ask git for the commit of these sources, with "+" if they have changes; None outside a checkout.

    An installed copy may lie in another project's checkout, which does not track it.
    """
    here = Path(__file__).parent
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
