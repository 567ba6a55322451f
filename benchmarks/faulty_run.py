"""A short run in forked ranks, and the faults that can happen to it; ``benchmarks/faults.py`` draws them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaopus.__main__ import main as megaopus
from megaopus.checkpoint.manifest import COMPLETE, MANIFEST, digest_of, entry, manifest_text, read_manifest
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.record.recorder import Recorder
from megaopus.training.timers import Timers

STEPS, SAVE_EVERY, EVAL_EVERY = 20, 4, 6
PHASES = ("select", "train", "evaluate", "save")
NAN_STEP, LOSS_STEP, SPIKE_STEP = 5, 9, 14
TIMEOUT_MINUTES = 0.5
PATIENCE_SECONDS = 180.0
DAMAGES = ("flipped bit", "truncated file", "deleted file", "malicious index")


@dataclass(frozen=True)
class Fault:
    """``kind`` befalls ``rank`` ``delay`` seconds after it enters ``phase`` of update ``step``."""

    kind: str
    phase: str
    step: int
    rank: int
    delay: float


@dataclass(frozen=True)
class Ran:
    """Says what became of a start."""

    codes: list[int]
    """Exit status of each rank; minus the signal for one that was killed."""
    fired: bool
    """The fault has happened."""
    ended: bool
    """Every rank ended by itself, or by the fault."""
    first: int
    last: int
    """Updates of this start, counted from 0; -1 if there was none."""
    seconds: float
    output: str
    log: Path

    @property
    def done(self) -> bool:
        return set(self.codes) == {0}


def settings(corpus: Path, run_dir: Path, more: list[str]) -> list[str]:
    """Overrides of the run: a checkpoint every SAVE_EVERY updates, a validation every EVAL_EVERY."""
    return [
        f"data.path={corpus}",
        f"run_dir={run_dir}",
        "data.target_domains=[docs]",
        "data.seq_len=32",
        "engine=cpu",
        f"engine.timeout_minutes={TIMEOUT_MINUTES}",
        "model.num_layers=2",
        "model.hidden_size=32",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        f"train.eval_every={EVAL_EVERY}",
        "train.eval_sequences=4",
        "train.spike_factor=10",
        "train.spike_window=8",
        "selection=opus",
        "selection.estimator=directional",
        "selection.proxy_batch_size=4",
        f"checkpoint.every={SAVE_EVERY}",
        *more,
    ]


def launch(overrides: list[str], ranks: int, fault: Fault | None, run_dir: Path) -> Ran:
    """Start the run as ``torchrun`` would: when a rank fails, the others have a moment to end, then they are killed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / "output"
    for name in ("output", "fired", "refused"):
        (run_dir / name).unlink(missing_ok=True)
    path = run_dir / "batches"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    began = time.monotonic()
    pids = fork(overrides, ranks, fault, run_dir)

    def second_job() -> None:
        due = fault is not None and fault.kind == "second job" and (run_dir / "fired").exists()
        if due and not (run_dir / "refused").exists():
            ends = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in fork(overrides, ranks, None, run_dir)}
            (run_dir / "refused").write_text(" ".join(map(str, sorted(ends))))

    codes, ended = wait_for(pids, second_job)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()[before:]] if path.exists() else []
    return Ran(
        codes=codes,
        fired=(run_dir / "fired").exists(),
        ended=ended,
        first=min(steps, default=-1),
        last=max(steps, default=-1),
        seconds=time.monotonic() - began,
        output=log.read_text(errors="replace") if log.exists() else "",
        log=log,
    )


def fork(overrides: list[str], ranks: int, fault: Fault | None, run_dir: Path) -> list[int]:
    """Start the ranks, in a process group of their own; their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _rank(rank, ranks, port, pids, overrides, fault, run_dir)
        pids.append(pid)
        with suppress(OSError):  # the child does it too, whoever comes first
            os.setpgid(pid, pids[0])
    return pids


def wait_for(pids: list[int], meanwhile: Callable[[], None]) -> tuple[list[int], bool]:
    """Exit status of each rank, and whether all but stopped ones ended by themselves; calls ``meanwhile`` often."""
    codes: dict[int, int] = {}
    deadline, ended = time.monotonic() + PATIENCE_SECONDS, True
    while left := [pid for pid in pids if pid not in codes]:
        for pid in left:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + 60 * TIMEOUT_MINUTES + 30)
        left = [pid for pid in left if pid not in codes]
        stopped = any(codes.values()) and all(map(_is_stopped, left))
        if left and (stopped or time.monotonic() > deadline):
            ended = ended and stopped
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            deadline = math.inf
        meanwhile()
        time.sleep(0.01)
    return [codes[pid] for pid in pids], ended


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def _rank(
    rank: int, ranks: int, port: int, pids: list[int], overrides: list[str], fault: Fault | None, run_dir: Path
) -> None:
    """One rank, in a forked process that ends here."""
    code = 1
    try:
        os.setpgid(0, pids[0] if pids else 0)
        output = os.open(run_dir / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        torch.set_num_threads(1)
        with _recorded(run_dir / "batches"), _weather(rank == ranks - 1), _struck(fault, rank, overrides, run_dir):
            code = megaopus(["train", *overrides])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _recorded(path: Path) -> Iterator[None]:
    """Each update's candidates, utilities, picks and loss as a line of ``path``, of one start after the other."""
    original = Recorder.step

    def step(self: Recorder, record: Any, selection: Any, events: Any = ()) -> None:
        if os.environ["RANK"] == "0":
            kept = {key: value for key, value in selection.facts().items() if key != "events"}
            arrays = {name: np.asarray(selection.choices.values(name)) for name in selection.choices}
            digests = {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in arrays.items()}
            line = json.dumps({**kept, **digests, "loss": record.loss, "skipped": record.skipped, "lr": record.lr})
            with path.open("a") as stream:
                stream.write(line + "\n")
            with path.with_name("times").open("a") as stream:
                stream.write(f"{time.monotonic()}\n")
        original(self, record, selection, events)

    with _replaced(Recorder, "step", step):
        yield


@contextmanager
def _weather(here: bool) -> Iterator[None]:
    """NaN and a spike in the gradient of one rank alone, before it is reduced, and an infinite loss."""
    finalize, run, train_step = MegatronEngine._finalize_gradients, MegatronEngine.run_local, MegatronEngine.train_step
    training: list[bool] = []

    def finalize_gradients(self: MegatronEngine, *args: Any, **kwargs: Any) -> None:
        if here and training and self.step in (NAN_STEP, SPIKE_STEP):
            for _, parameter in self.named_parameters():
                parameter.main_grad.mul_(math.nan if self.step == NAN_STEP else 1e4)
        finalize(self, *args, **kwargs)

    def losses(self: MegatronEngine, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = run(self, *args, **kwargs)
        return found.fill_(math.inf) if training and self.step == LOSS_STEP else found

    def step(self: MegatronEngine, *args: Any, **kwargs: Any) -> Any:
        training.append(True)
        try:
            return train_step(self, *args, **kwargs)
        finally:
            training.clear()

    with (
        _replaced(MegatronEngine, "_finalize_gradients", finalize_gradients),
        _replaced(MegatronEngine, "run_local", losses),
        _replaced(MegatronEngine, "train_step", step),
    ):
        yield


@contextmanager
def _struck(fault: Fault | None, rank: int, overrides: list[str], run_dir: Path) -> Iterator[None]:
    """The fault happens to this rank when it comes to its place."""
    original = Timers.__call__
    struck: list[threading.Thread] = []

    def strike() -> None:
        assert fault is not None
        time.sleep(fault.delay)
        (run_dir / "fired").touch()
        ACTIONS[fault.kind](overrides, run_dir)

    @contextmanager
    def phase(self: Timers, name: str) -> Iterator[None]:
        at_place = fault is not None and fault.rank == rank and (name, self.step) == (fault.phase, fault.step)
        if at_place and not struck:
            struck.append(threading.Thread(target=strike, daemon=True))
            struck[0].start()
            if fault is not None and not fault.delay:
                struck[0].join()
        with original(self, name):
            yield

    with _replaced(Timers, "__call__", phase):
        yield


def _signal(number: signal.Signals, times: int = 1) -> Callable[[list[str], Path], None]:
    def send(overrides: list[str], run_dir: Path) -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return send


def _kill_all(overrides: list[str], run_dir: Path) -> None:
    os.killpg(0, signal.SIGKILL)


def _fill_disk(overrides: list[str], run_dir: Path) -> None:
    """Files may not grow beyond 40 kB from now on: a shard is cut off in the middle."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def _second_job(overrides: list[str], run_dir: Path) -> None:
    """Stay until the launcher has started another job in this folder, and that has ended."""
    while not (run_dir / "refused").exists():
        time.sleep(0.01)


ACTIONS: dict[str, Callable[[list[str], Path], None]] = {
    "SIGKILL of one rank": _signal(signal.SIGKILL),
    "SIGKILL of all ranks": _kill_all,
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGUSR1": _signal(signal.SIGUSR1),
    "SIGTERM twice": _signal(signal.SIGTERM, 2),
    "SIGSTOP": _signal(signal.SIGSTOP),
    "disk full": _fill_disk,
    "second job": _second_job,
}


class _Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def damage(checkpoint: Path, kind: str, draw: random.Random, owned: Path) -> tuple[str, dict[str, bytes]]:
    """Do something to a file of a checkpoint; its name, and what ``undo`` needs. A payload would make ``owned``."""
    kept = {name: (checkpoint / name).read_bytes() for name in (MANIFEST, COMPLETE)}
    files = sorted(read_manifest(checkpoint))
    name = "weights/.metadata" if kind == "malicious index" else draw.choice(files)
    path = checkpoint / name
    content = path.read_bytes()
    kept[name] = content
    if kind == "flipped bit":
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
    elif kind == "truncated file":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "deleted file":
        path.unlink()
    else:
        path.write_bytes(pickle.dumps(_Payload(owned)))
        text = manifest_text({each: entry(checkpoint / each) for each in files})
        (checkpoint / MANIFEST).write_text(text)
        (checkpoint / COMPLETE).write_text(digest_of(text) + "\n")
    return name, kept


def undo(checkpoint: Path, kept: dict[str, bytes]) -> None:
    """Put the files back."""
    for name, content in kept.items():
        (checkpoint / name).write_bytes(content)
