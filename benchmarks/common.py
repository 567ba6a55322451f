"""Holds what the benchmarks share: command line, one engine on one process, fair timing, memory peaks, files."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig

K = TypeVar("K")
ROOT = Path(__file__).resolve().parent.parent
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every timed benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, the machine to FILE.machine.json")
    made.add_argument("--quick", action="store_true", help="under 5 minutes: same rows, less precise")
    made.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="(%(default)s)")
    made.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU seconds of this process; with --threads 1 they stay meaningful on a busy machine (%(default)s)",
    )
    made.add_argument(
        "--corpus", type=Path, default=Path("runs/bench/demo_corpus"), metavar="FOLDER", help="%(default)s"
    )
    return made


@contextmanager
def single_engine(
    model: ModelConfig, optim: OptimConfig, *, vocab_size: int, seq_len: int, micro_batch_size: int, total_steps: int
) -> Iterator[MegatronEngine]:
    """The megatron engine on one process, CPU and fp32; its process groups end with the block."""
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        yield MegatronEngine(
            mesh,
            model=model,
            optim=optim,
            engine=EngineConfig(device="cpu", precision="fp32"),
            parallel=ParallelConfig(),
            vocab_size=vocab_size,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            total_steps=total_steps,
            seed=1234,
        )
    finally:
        mesh.close()


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A progress bar per stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        yield bar


def interleaved(
    passes: Mapping[K, Callable[[], Any]], repeats: int, clock: str, bar: Progress, title: str
) -> dict[K, list[float]]:
    """Seconds of each pass in each of ``repeats`` rounds.

    A round runs every pass once, in an order that turns by one from round to round, so that a change in the machine's
    load meets all of them alike. One more round before the first warms up and is not counted.
    """
    names, now = list(passes), CLOCKS[clock]
    seconds: dict[K, list[float]] = {name: [] for name in names}
    task = bar.add_task(title, total=(repeats + 1) * len(names))
    for round_ in range(repeats + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            started = now()
            passes[name]()
            if round_:
                seconds[name].append(now() - started)
            bar.advance(task)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """A ratio of two timings taken round by round: median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerator: list[float], denominator: list[float], scale: float = 1.0) -> Ratio:
        """Quartiles of scale * numerator / denominator; at least two rounds."""
        rounds = [scale * n / d for n, d in zip(numerator, denominator, strict=True)]
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(median, low, high)


def peak_mb(function: Callable[[], Any]) -> float | None:
    """Largest growth of the process's resident memory (MB, 10^6 bytes) while ``function`` runs, over what it had.

    From the kernel's own high-water mark, set back first; memory that malloc kept from earlier work is handed back
    before. None where the system has no such mark (it is Linux's).
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water_bytes()
    except OSError:
        return None
    function()
    return (_high_water_bytes() - before) / 1e6


def _high_water_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Return where and with what the numbers were taken."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "quick": args.quick,
        "load_average": list(os.getloadavg()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("megaopus", "torch", "megatron-core")},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit(root: Path = ROOT) -> str | None:
    """Name the commit that is checked out, with a + where tracked files differ from it; None outside a checkout."""
    found = _git("rev-parse", "HEAD", root=root)
    return found and found + "+" * bool(_git("status", "--porcelain", "--untracked-files=no", root=root))


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _git(*arguments: str, root: Path = ROOT) -> str | None:
    """Output of a git command in a checkout; None outside one."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def start(args: argparse.Namespace, console: Console) -> None:
    """Set the threads, make the folder of the output, and say how busy the machine is."""
    torch.set_num_threads(args.threads)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    console.print(
        f"{_cpu_model()}, {args.threads} thread(s), {args.clock} time, load average {load:.1f}", highlight=False
    )
    if args.clock == "wall" and load + args.threads > (os.cpu_count() or 1) + 0.5:
        console.print("other processes keep this machine busy: times will vary (see --clock cpu)", style="yellow")


def write_results(path: Path, rows: Any, about: dict[str, Any]) -> None:
    """``path``: the rows; beside it, with the suffix .machine.json: what ``machine`` and the benchmark say."""
    for target, value in ((path, rows), (path.with_suffix(".machine.json"), about)):
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.replace(target)
