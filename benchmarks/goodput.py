"""Is goodput on paper that of jobs which are killed? Short runs, killed at exponential times, beside the simulation.

Each job is benchmarks/faulty_run.py's, but longer: 100 updates with selection, a checkpoint every 4, saves that are
waited for, one rank that is forked with its imports done. It is killed (SIGKILL) a random time after the first update
of each start, until it is done. `planning.goodput.replay` is told when it was killed, and what its starts, steps and
saves took on average: what it must find is the work that was done again. The row: {jobs, kills,
step_s, save_s, start_s, goodput, replayed, of_jobs}. goodput: seconds of work over those of the clock, measured;
replayed: the same by the simulation.

With --llama no job is run: what the published run of Llama 3 (arXiv 2407.21783, section 3.3.4: 419 unexpected
interruptions in 54 days on 16,384 GPUs, more than 90 % effective) would take, by Daly's formula. An illustration.

    python benchmarks/goodput.py --json FILE
"""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.common import machine, parser, progress, start, write_results
from benchmarks.faulty_run import SAVE_EVERY, fork, settings, wait_for
from megaopus.corpus_tools.demo_corpus import DEMO_LIMITS, build_demo_corpus
from megaopus.planning.goodput import Faults, best_interval, expected_goodput, replay

STEPS = 100
"""Updates of a job: several times what a start takes, or else whether the last kill hit decides everything."""
KILLS = 0.7
"""Mean time to a kill from a start's first update, over that which an undisturbed job takes from there."""
MOST_STARTS = 40
LLAMA_HOURS = 54 * 24 / 419
"""Between interruptions of the published run."""


class Parts(NamedTuple):
    """Tells what the parts of a job take, in seconds: means over starts."""

    step_s: float
    """Of an update, its share of validations in it."""
    save_s: float
    start_s: float
    """Until the first update begins."""

    @classmethod
    def of(cls, starts: Sequence[Sequence[float]]) -> Parts:
        """Take them from the seconds between each start and its updates; every start is at a checkpoint."""
        saving: list[float] = []
        others: list[float] = []
        for times in starts:
            for number, (before, after) in enumerate(itertools.pairwise(times), start=1):
                (others if number % SAVE_EVERY else saving).append(after - before)
        step_s = statistics.fmean(others)
        first = statistics.fmean(times[0] for times in starts if times)
        return cls(step_s, max(1e-3, statistics.fmean(saving) - step_s), max(0.0, first - step_s))


def ran(corpus: Path, run_dir: Path, kill_after: float) -> tuple[bool, float, list[float]]:
    """Start a job and kill it so many seconds after its first update: (done, seconds, seconds to each update)."""
    run_dir.mkdir(parents=True, exist_ok=True)
    times = run_dir / "times"
    times.unlink(missing_ok=True)
    began, due = time.monotonic(), [math.inf]
    (pid,) = fork(settings(corpus, run_dir, [f"train.steps={STEPS}"]), 1, None, run_dir)

    def kill() -> None:
        if due[0] == math.inf and times.exists():
            due[0] = time.monotonic() + kill_after
        if time.monotonic() >= due[0]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    codes, _ = wait_for([pid], kill)
    seconds = time.monotonic() - began
    return codes == [0], seconds, [float(line) - began for line in times.read_text().split()] if times.exists() else []


def undisturbed(corpus: Path, folder: Path) -> list[float]:
    """Run a job that nothing happens to: seconds to each update. RuntimeError if it fails."""
    done, _, times = ran(corpus, folder / "whole", math.inf)
    if not done or len(times) != STEPS:
        raise RuntimeError(f"the undisturbed run failed, see {folder / 'whole' / 'output'}")
    return times


def measure(corpus: Path, folder: Path, jobs: int, seed: int, bar: Any) -> dict[str, Any]:
    """Run the jobs and make the row; each is replayed by what its own parts take, for other work may run beside."""
    draw, times = random.Random(seed), undisturbed(corpus, folder)
    mean = KILLS * (times[-1] - times[0])
    found: list[Parts] = []
    walls: list[float] = []
    replayed: list[float] = []
    kills = 0
    task = bar.add_task("jobs that are killed", total=jobs)
    for number in range(jobs):
        lives: list[float] = []
        starts: list[list[float]] = []
        wall, done, name = 0.0, False, folder / f"job{number}"
        while not done and len(lives) < MOST_STARTS:
            done, seconds, times = ran(corpus, name, draw.expovariate(1 / mean))
            wall += times[-1] if done else seconds
            lives += [] if done else [seconds - times[0]]
            starts.append(times)
        parts = Parts.of(starts)
        faults = Faults(mtbf=math.inf, save=parts.save_s, restart=parts.start_s)
        gaps = [parts.start_s + parts.step_s + life for life in lives]
        found.append(parts)
        walls.append(wall)
        replayed.append(replay(STEPS * parts.step_s, SAVE_EVERY * parts.step_s, faults, gaps))
        kills += len(lives)
        bar.advance(task)
    work = STEPS * sum(parts.step_s for parts in found)
    return {
        "jobs": jobs,
        "kills": kills,
        **{name: round(statistics.fmean(getattr(parts, name) for parts in found), 4) for name in Parts._fields},
        "goodput": work / sum(walls),
        "replayed": work / sum(replayed),
        "of_jobs": [[round(wall, 3), round(again, 3)] for wall, again in zip(walls, replayed, strict=True)],
    }


def llama() -> list[dict[str, Any]]:
    """Find, for some seconds of saving, the longest restart at which Daly's formula still gives 90 %."""
    rows = []
    for save in (1, 5, 15, 30, 60):
        interval = best_interval(save, 3600 * LLAMA_HOURS)[1]
        low, high = 0.0, 3600.0
        for _ in range(40):
            restart = (low + high) / 2
            good = expected_goodput(interval, Faults(mtbf=3600 * LLAMA_HOURS, save=save, restart=restart)) >= 0.9
            low, high = (restart, high) if good else (low, restart)
        rows.append({"save_s": save, "interval_s": interval, "restart_s": low})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    made = parser(__doc__)
    made.set_defaults(corpus=Path("runs/bench/faults_corpus"), threads=1)
    made.add_argument("--jobs", type=int, default=10, metavar="N", help="(%(default)s; --quick: 3)")
    made.add_argument("--seed", type=int, default=1, metavar="N", help="of the kills' times (%(default)s)")
    made.add_argument("--llama", action="store_true", help="the illustration, without a run")
    args = made.parse_args(arguments)
    console = Console()
    if args.llama:
        for row in llama():
            console.print(
                f"a save of {row['save_s']} s every {row['interval_s']:.0f} s: restarts of {row['restart_s']:.0f} s",
                highlight=False,
            )
        return 0
    start(args, console)
    if not (args.corpus / "manifest.json").is_file():
        args.corpus.parent.mkdir(parents=True, exist_ok=True)
        build_demo_corpus(args.corpus, limits={name: size // 20 for name, size in DEMO_LIMITS.items()}, console=console)
    with tempfile.TemporaryDirectory() as folder, progress(console) as bar:
        row = measure(args.corpus, Path(folder), 3 if args.quick else args.jobs, args.seed, bar)
    console.print(
        f"{row['kills']} kills of {row['jobs']} jobs (start {row['start_s']:.2f} s, step {row['step_s']:.3f} s, save"
        f" {row['save_s']:.3f} s): goodput {row['goodput']:.3f}, replayed {row['replayed']:.3f}",
        soft_wrap=True,
        highlight=False,
    )
    if args.json:
        write_results(args.json, [row], machine(args))
        console.print(f"row: {args.json}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
