"""One job at a time in a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megaopus.errors import CheckpointError

LOCK = "lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, made if it is missing and removed again if it is left empty.

    The lock belongs to the process: however that ends, it is free. The file stays and says who had it last.

    Raises:
        CheckpointError: another job holds it (host and process are named), or the folder cannot be written.
    """
    path = run_dir / LOCK
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: the run folder cannot be written ({error}); set another run_dir") from error
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
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if job := os.environ.get("SLURM_JOB_ID"):
            holder["slurm_job"] = job
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
        try:
            yield
        finally:
            if {each.name for each in run_dir.iterdir()} == {LOCK}:  # a start that failed before it wrote anything
                path.unlink()
                with suppress(OSError):
                    run_dir.rmdir()
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return ", ".join(f"{key} {value}" for key, value in found.items())
    except (ValueError, AttributeError):
        return "it does not say which"
