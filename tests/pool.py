"""Runs jobs on gloo ranks that are forked with their imports done, one job at a time on each core."""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import random
import socket
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

from tests import forks

K = TypeVar("K", bound=Hashable)
_candidates = iter(random.Random(os.getpid()).sample(range(12_000, 30_000), 10_000))
"""Ports below those that outgoing connections are given: nobody takes one before it is used."""


class Pool:
    """Run functions on gloo ranks. A rank lives as long as its job, so that no job finds anything of one before it.

    The ranks of a job share a core, and there are as many jobs at a time as cores: small ranks talk more than they
    compute, and a message to another core takes twice as long. A worker of xdist has one core for its jobs. Without
    ``pinned`` a job has all cores, alone.
    """

    def __init__(self, pinned: bool = True):
        known = hasattr(os, "sched_getaffinity")  # not on macOS
        cores = sorted(os.sched_getaffinity(0)) if known else []
        if pinned and cores and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
            cores = [cores[int(worker.removeprefix("gw")) % len(cores)]]
        places = [{core} for core in cores] or [set()]
        self._free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for place in places if pinned else [set(cores)]:
            self._free.put(place)
        self._threads = ThreadPoolExecutor(len(places) if pinned else 1)
        self._closed = False

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = forks.TIMEOUT_S
    ) -> list[Any]:
        """``function(*args)`` on each of ``world_size`` ranks with torchrun's environment; results by rank.

        ``function`` must be importable (a module-level function). What a rank raises is raised with that rank's
        traceback; so is a rank that died, or is silent for ``timeout_s``.
        """
        return self.submit(world_size, function, *args, timeout_s=timeout_s).result()

    def submit(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = forks.TIMEOUT_S
    ) -> Future[list[Any]]:
        """The same without waiting: it starts when there is a core for it."""
        environment = dict(os.environ)
        return self._threads.submit(self._job, world_size, environment, function, args, timeout_s)

    def jobs(self, world_sizes: Mapping[K, int], function: Callable[..., Any], *args: Any) -> Jobs[K]:
        """``function(name, *args)`` on each rank of every name's world size, started when its name is asked for."""
        return Jobs(lambda name: self.submit(world_sizes[name], function, name, *args))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        """Start nothing more, and end what runs."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)

    def _job(
        self,
        world_size: int,
        environment: dict[str, str],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout_s: float,
    ) -> list[Any]:
        with self._place() as cores:
            (port,) = free_ports(1)
            pipes, processes = {}, []
            try:
                for rank in range(world_size):
                    receiver, sender = Pipe(duplex=False)
                    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
                    rank_s = {**environment, **place}
                    processes.append(forks.start(_rank, sender, cores, timeout_s, function, args, environment=rank_s))
                    sender.close()
                    pipes[receiver] = rank
                return self._results(pipes, time.monotonic() + timeout_s)
            finally:
                for process in processes:
                    process.kill()
                    process.join()

    @contextmanager
    def _place(self) -> Iterator[set[int]]:
        place = self._free.get()
        try:
            yield place
        finally:
            self._free.put(place)

    def _results(self, pipes: dict[Connection, int], deadline: float) -> list[Any]:
        """Of each rank; the first error that arrives is the cause of the others."""
        found: dict[int, Any] = {}
        while waiting := [pipe for pipe, rank in pipes.items() if rank not in found]:
            ready = wait(waiting, timeout=1.0)
            if not ready and (self._closed or time.monotonic() > deadline):
                silent = ", ".join(str(pipes[pipe]) for pipe in waiting)
                raise AssertionError(f"no answer in time: rank {silent} (its stacks are in the captured stderr)")
            for pipe in ready:
                found[pipes[pipe]] = _receive(pipes[pipe], pipe)
        return [found[rank] for rank in sorted(found)]


class Jobs(Generic[K]):
    """Results of jobs by name, a list with one of each rank; ``begin`` starts some that will be asked for."""

    def __init__(self, start: Callable[[K], Future[list[Any]]]):
        self._start = start
        self._begun: dict[K, Future[list[Any]]] = {}

    def begin(self, names: Iterable[K]) -> Jobs[K]:
        for name in names:
            if name not in self._begun:
                self._begun[name] = self._start(name)
        return self

    def __getitem__(self, name: K) -> list[Any]:
        self.begin([name])
        return self._begun[name].result()


def _receive(rank: int, pipe: Any) -> Any:
    try:
        error, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died without a word") from None
    if error is not None:
        raise AssertionError(f"rank {rank} failed:\n{error}")
    return value


def _rank(pipe: Any, cores: set[int], timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
    faulthandler.dump_traceback_later(0.9 * timeout_s)
    torch.set_num_threads(1)
    try:
        answer = (None, function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(answer))  # plain pickle: no shared memory with a dying process


def free_ports(count: int) -> list[int]:
    """Free ports, other ones at each call."""
    found: list[int] = []
    for port in _candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"fewer than {count} free ports")
