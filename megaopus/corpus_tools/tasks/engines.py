"""Runs units as tasks of datatrove: its executors, task logs, statistics and marks of what is completed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from megaopus.corpus_tools.readers.stored import needed
from megaopus.corpus_tools.tasks.executors import LOCAL, SLURM, Executor
from megaopus.corpus_tools.tasks.units import Place, Units, attempt
from megaopus.corpus_tools.tasks.workers import Workers
from megaopus.data.folder import StoppedError
from megaopus.errors import DataError

_TRIES = 3
"""Of a task in a local process, the first counted in."""
POLL_SECONDS = 2.0
"""Between two looks at a Slurm array."""
_GONE = 3
"""Looks in a row at which an array that is not through is in no queue: it has ended. A job that was submitted just now
may be missing from the first, and files of the last tasks may come late over a network."""


class UnitsStep(PipelineStep):
    """Does a task's share of the units, as one step of a pipeline."""

    type = "megaopus"

    def __init__(self, units: Units, place: Place):
        self.name = units.name
        super().__init__()
        self.units, self.place = units, place

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Do the units of task ``rank`` of ``world_size``."""
        self.place.enter()
        for number in list(self.units.numbers())[rank::world_size]:
            if self.units.done(number):
                self.stat_update("found done", unit="piece")
                continue
            with self.track_time("piece"):
                counts = attempt(self.units, number, self.place)
            if counts is None:
                return
            for name, value in counts.items():
                self.stat_update(name, value=value, unit="piece")


class LocalTasks(LocalPipelineExecutor):
    """Runs tasks in processes whose death is seen: datatrove's own pool waits for ever for a task that was killed."""

    def run_with(self, workers: Workers) -> None:
        """Run what is not completed; a task whose process died is begun again, and finds what it had finished."""
        self.save_executor_as_json()
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                _run_rank(deepcopy(self), rank)
            return
        for _ in range(_TRIES):
            try:
                workers.run([partial(_run_rank, self, rank) for rank in ranks], self.workers)
            except BrokenProcessPool:
                ranks = self.get_incomplete_ranks(skip_completed=True)
            else:
                return
        raise StoppedError(
            f"{self.pipeline[0].name}: a worker process died {_TRIES} times, for want of memory perhaps; start again"
            " with fewer --workers: what is finished is kept"
        )


def _run_rank(executor: LocalTasks, rank: int) -> None:
    """Run one task. Of local rank 1: of 0 the log would come to this terminal too."""
    executor._run_for_rank(rank, local_rank=1)


class SlurmTasks(SlurmPipelineExecutor):
    """Submits an array and waits for it, as ``sbatch --wait`` does."""

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        """Leave out what nobody asked for: the cluster has defaults of its own."""
        return {key: value for key, value in super().get_sbatch_args(max_array).items() if value is not None}

    def launch_merge_stats(self) -> None:
        """Do nothing: who waits for the array adds the statistics up."""

    def wait(self) -> None:
        """Wait until all tasks are completed, or none is left in the queue."""
        gone = 0
        while self.get_incomplete_ranks(skip_completed=True) and gone < _GONE:
            time.sleep(POLL_SECONDS)
            gone = gone + 1 if queued(self.job_name) is False else 0


def queued(name: str) -> bool | None:
    """Tell whether a job of this name waits or runs; None: Slurm does not answer."""
    done = subprocess.run(["squeue", "--noheader", f"--name={name}"], capture_output=True, text=True)
    return bool(done.stdout.strip()) if done.returncode == 0 else None


def run_tasks(units: Units, place: Place, executor: Executor, tasks: int, workers: Workers) -> None:
    """Run ``tasks`` tasks over the units; returns when they have ended, some of them perhaps undone.

    Raises:
        StoppedError: a task failed, or its process died.
    """
    logs = str(place.folder / f"{tasks}-tasks")
    pipeline = [UnitsStep(units, place)]
    logger.remove()  # the driver's own lines would run through the progress; the tasks' logs are files
    try:
        if executor.kind == LOCAL:
            made: PipelineExecutor = (local := LocalTasks(pipeline, tasks, min(executor.at_a_time, tasks), logs))
            local.run_with(workers)
        elif executor.kind == SLURM:
            made = _run_slurm(pipeline, tasks, logs, executor)
        else:
            made = _run_ray(pipeline, tasks, logs, executor)
    except (DataError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a task met
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise StoppedError(f"{units.name}: a task failed ({said}); its log is in {logs}/logs") from error
    _merge_statistics(made)


def _run_slurm(pipeline: list[PipelineStep], tasks: int, logs: str, executor: Executor) -> PipelineExecutor:
    """Submit an array and wait; one that an earlier, killed command has submitted is waited for."""
    digest = sha256(logs.encode()).hexdigest()[:8]
    made = SlurmTasks(
        pipeline,
        tasks,
        time=None,
        partition=None,
        qos=None,
        workers=executor.workers or -1,
        job_name=f"megaopus-{digest}",
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        sbatch_args=dict(executor.slurm_options),
        logging_dir=logs,
    )
    try:
        if not queued(made.job_name):
            made.run()
        made.wait()
    except subprocess.CalledProcessError as error:
        raise StoppedError(
            f"sbatch refuses the array (it says why above); its script is {logs}/launch_script.slurm"
        ) from error
    except KeyboardInterrupt:
        subprocess.run(["scancel", f"--name={made.job_name}"], check=False)
        raise
    return made


def _run_ray(pipeline: list[PipelineStep], tasks: int, logs: str, executor: Executor) -> PipelineExecutor:
    """Run on the Ray cluster of RAY_ADDRESS, or on one of this machine that ends with the work."""
    ray = needed("ray", "--executor ray", "scale")
    from datatrove.executor.ray import RayPipelineExecutor

    ours = not ray.is_initialized()
    if ours:
        own = {} if executor.on_a_cluster else {"num_cpus": executor.at_a_time, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="error", **own)
    try:
        made = RayPipelineExecutor(pipeline, tasks, min(executor.at_a_time, tasks), logging_dir=logs)
        made.run()
    finally:
        if ours:
            ray.shutdown()
    return made


def _merge_statistics(made: PipelineExecutor) -> None:
    """Add up the tasks' statistics in ``stats.json``, where all of them are there."""
    if made.get_incomplete_ranks(skip_completed=True):
        return
    total = PipelineStats()
    for rank in range(made.world_size):
        with made.logging_dir.open(f"stats/{rank:05d}.json", "r") as stream:
            total += PipelineStats.from_json(json.load(stream))
    with made.logging_dir.open("stats.json", "wt") as stream:
        total.save_to_disk(stream)
