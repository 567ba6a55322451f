"""Does plan choose the fastest layout, and are its seconds right? Every layout is timed, as `plan --measure` times few.

All layouts of a small GPT on --ranks CPU ranks are timed, three steps each. Then `plan --measure` is played on these
timings: it sees those alone that it asks for. The row: {ranks, layouts, timed, choice, choice_s, best, best_s, ratio,
place, error_median, error_max, ...}. ratio: seconds of its first choice over those of the fastest layout; place: where
the fastest stands in its list; errors: of the predicted seconds of all layouts that it did not time.

    python benchmarks/plan.py --ranks 2 --json FILE

--clock cpu adds up the CPU seconds of all ranks: what one quiet core would take, also where other work runs beside.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.common import machine, parser, progress, start, write_results
from megaopus.cli.demo import ensure_corpus
from megaopus.config.compose import compose
from megaopus.data.corpus import Corpus
from megaopus.planning.calibration import Measured
from megaopus.planning.layouts import KEYS, Candidate, Job, Layout, allowed
from megaopus.planning.machine import cpu
from megaopus.planning.search import Search
from megaopus.timed_layouts import time_layouts

SETTINGS = (
    *("model=tiny", "data.seq_len=128", "train.global_batch_size=8", "engine=cpu"),
    *("selection=uniform", "train.steps=100"),
)


def job(corpus: Path, ranks: int, fixed: Sequence[str]) -> Job:
    """Describe what is planned; ``fixed``: overrides of settings that plan then leaves as they are."""
    config = compose([*SETTINGS, f"data.path={corpus}", "train.micro_batch_size=1", *fixed])
    kept = {name for name, key in KEYS.items() if any(text.startswith(f"{key}=") for text in fixed)}
    vocab_size = Corpus.open(corpus).vocab_size
    return Job(config, vocab_size, ranks, ranks, "fp32", "cpu", None, frozenset(kept))


def played(job: Job, candidates: Sequence[Candidate], timings: Mapping[Layout, Measured], cores: int) -> dict[str, Any]:
    """Make the row: what ``plan --measure`` says, given these timings in the place of the machine."""
    search = Search(job, list(candidates), cpu(cores))
    search.measure(lambda chosen: {each.layout: timings[each.layout] for each in chosen})
    listed = [choice.candidate.layout for choice in search.best(len(candidates))[0]]
    best = min(timings, key=lambda each: timings[each].step_s)
    others = [each for each in candidates if each.layout not in search.measured]
    errors = [abs(each.work.seconds(search.machine) / timings[each.layout].step_s - 1) for each in others]
    return {
        "ranks": job.world_size,
        "cores": cores,
        "layouts": len(candidates),
        "timed": len(search.measured),
        "choice": listed[0].told(job.world_size),
        "choice_s": timings[listed[0]].step_s,
        "best": best.told(job.world_size),
        "best_s": timings[best].step_s,
        "slowest_s": max(each.step_s for each in timings.values()),
        "ratio": timings[listed[0]].step_s / timings[best].step_s,
        "place": 1 + listed.index(best),
        "error_median": statistics.median(errors),
        "error_max": max(errors),
        "seconds": {each.told(job.world_size): measured.step_s for each, measured in timings.items()},
    }


def measure(corpus: Path, ranks: int, fixed: Sequence[str], clock: str, bar: Any) -> dict[str, Any]:
    """Time every layout, and play the plan on that."""
    planned = job(corpus, ranks, fixed)
    candidates = allowed(planned, Counter())
    runs = []
    for each in candidates:
        layout = [f"{key}={str(value).lower()}" for key, value in each.layout.settings().items()]
        runs.append([*SETTINGS, f"data.path={corpus}", *layout])
    task = bar.add_task(f"layouts of {ranks} ranks", total=len(runs))
    timings = time_layouts(runs, None, ranks, lambda count: bar.advance(task, count), clock)
    for timing in timings:
        if timing.failed:
            bar.console.print(f"a layout failed and is left out: {timing.failed}", highlight=False, markup=False)
    rows = {
        each.layout: Measured(
            layout=each.layout.told(ranks),
            training_s=timing.step_s - timing.selection_s,
            selection_s=timing.selection_s,
        )
        for each, timing in zip(candidates, timings, strict=True)
        if not timing.failed
    }
    return played(
        planned,
        [each for each in candidates if each.layout in rows],
        rows,
        1 if clock == "cpu" else len(os.sched_getaffinity(0)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    made = parser(__doc__)
    made.add_argument("--ranks", type=int, default=2, metavar="N", help="(%(default)s)")
    made.add_argument("fixed", nargs="*", metavar="OVERRIDE", help="what all layouts have, as parallel.vpp=1")
    args = made.parse_args(arguments)
    fixed = [*args.fixed, *(["engine.recompute=false"] if args.quick else [])]
    console = Console()
    start(args, console)
    corpus = ensure_corpus(args.corpus, console)
    with progress(console) as bar:
        row = measure(corpus, args.ranks, fixed, args.clock, bar)
    console.print(
        f"{row['layouts']} layouts, {row['timed']} of them timed by the plan: its choice {row['choice']} takes"
        f" {row['ratio']:.3f} of the fastest, {row['best']} ({row['best_s']:.3f} s; slowest {row['slowest_s']:.3f} s),"
        f" which is number {row['place']} of its list; errors of the others {row['error_median']:.1%} (median),"
        f" {row['error_max']:.1%} (largest)",
        soft_wrap=True,
        highlight=False,
    )
    if args.json:
        write_results(args.json, [row], machine(args))
        console.print(f"row: {args.json}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
