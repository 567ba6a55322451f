"""Holds what studies of many training runs share: rows of finished runs, training in processes, seconds of a step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.common import CLOCKS, ROOT, interleaved
from megaopus.cli.demo import picked_share
from megaopus.cli.main import main
from megaopus.config.aliases import former_settings
from megaopus.config.compose import compose
from megaopus.config.run_config import differences
from megaopus.data.corpus import Corpus
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.record.parquet import pick_counts
from megaopus.record.sinks import read_rows
from megaopus.record.types import StepRecord, ValidationRecord
from megaopus.report.compare import Run, compare, load_run, paired_t_test
from megaopus.selection import decide
from megaopus.selection.prescreen import Prescreen
from megaopus.side_by_side import SETTLED, TURN, settled_steps

SCORED = "selection.score_length=64"
"""A quarter of a sequence."""
MODEL = ("model=tiny", "model.hidden_size=192", "model.num_heads=6")
COMMON = (
    *MODEL,
    "data.seq_len=256",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "optim.schedule=cosine",
    "optim.warmup_steps=50",
    "logging.every=50",
)


class Results:
    """Rows of finished runs and timings, one JSON line each, added as they come."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = Lock()
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.rows = {row["key"]: row for _, _, row in read_rows(path)}

    def add(self, key: str, row: dict[str, Any]) -> None:
        with self._lock:
            self.rows[key] = {"key": key, **row}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(json.dumps(self.rows[key]) + "\n")


@dataclass(frozen=True)
class Task:
    """One training run: its name, what a row is found by, its settings, and what else its row says."""

    title: str
    key: str
    overrides: tuple[str, ...]
    fields: Mapping[str, Any]

    @property
    def corpora(self) -> str:
        """Digest of the texts that it trains on, aims at and is validated on, as tokenised."""
        data = compose(list(self.overrides)).data
        paths = [data.path, data.proxy_path or data.path, data.validation_path or data.path]
        return "-".join(_content(path)[:8] for path in dict.fromkeys(map(Path, paths)))


def task(title: str, path: str, overrides: Sequence[str], fields: Mapping[str, Any]) -> Task:
    """A run named by its settings as composed, and so by the files of configs/ too; paths are left out."""
    return Task(title, f"{path}/{_digest(tuple(overrides))}", tuple(overrides), fields)


_PLACES = (
    *("run_dir", "model.hf", "init.path"),
    *(f"data.{path}" for path in ("path", "proxy_path", "validation_path", "traits_path")),
)


@cache
def _digest(overrides: tuple[str, ...]) -> str:
    """Of the settings that differ from their defaults: a new one, or a new name, leaves older runs' rows valid."""
    composed = compose(list(overrides))
    config = former_settings({name: value for name, (value, _) in differences(composed).items()}, composed)
    for name in _PLACES:
        config.pop(name, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _content(corpus: Path) -> str:
    """Of what a corpus holds, whatever made it."""
    digests = {name: each["sha256"] for name, each in Corpus.open(corpus).manifest["files"].items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def refuse_other_corpora(tasks: Iterable[Task], results: Results) -> None:
    """Rows are compared with one another, so that a study goes on with the corpora that it began with.

    Raises:
        SystemExit: the row of one of ``tasks`` is of other corpora than lie here.
    """
    for each in tasks:
        row = results.rows.get(each.key)
        if row is not None and row.get("corpora") != each.corpora:
            raise SystemExit(
                f"{each.title}: its row in {results.path} is of other corpora ({row.get('corpora')}) than lie here "
                f"({each.corpora}), and new rows could not be compared with it: bring those corpora, or name another "
                "file with --results"
            )


def train_all(tasks: Sequence[Task], results: Results, folder: Path, workers: int, console: Console) -> None:
    """Every one of ``tasks`` that has no row yet; ``workers`` at a time, the cores shared evenly."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    left = [each for each in tasks if each.key not in results.rows]
    console.print(f"{len(tasks)} runs, {len(tasks) - len(left)} of them done before", highlight=False)
    began, done = time.monotonic(), 0

    def run(each: Task) -> None:
        nonlocal done
        started = time.monotonic()
        row = _trained(each, folder, threads)
        results.add(each.key, row)
        done += 1
        now = time.monotonic()
        eta = (now - began) / done * (len(left) - done) / 60
        line = f"[{done}/{len(left)}] {each.title}:"
        line += f" {row['validations'][-1]['loss']:.3f} after {now - started:.0f} s; eta {eta:.0f} min"
        console.print(line, highlight=False, markup=False)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(run, each) for each in left]:
            future.result()


def _trained(each: Task, folder: Path, threads: int) -> dict[str, Any]:
    """Train in a process of its own and sum the run folder up, which is deleted then; a killed run goes on."""
    run_dir = folder / each.key.replace("/", "_")
    run = trained(each.overrides, run_dir, threads)
    row = {**each.fields, **summary_of(run), "corpora": each.corpora, "commit": run.environment.get("git")}
    shutil.rmtree(run_dir)
    return row


def trained(overrides: Sequence[str], run_dir: Path, threads: int, run: Verb | None = None) -> Run:
    """Train by ``run``, in a process of its own unless given; a killed run goes on. Raises SystemExit as ``verb``."""
    log = run_dir.with_name(run_dir.name + ".log")
    (run or verb)("train", [*overrides, f"run_dir={run_dir}"], log, threads)
    return load_run(run_dir)


def verb(name: str, arguments: Sequence[str], log: Path, threads: int) -> None:
    """Run ``python -m megaopus NAME``; what it says is in ``log``, which is gone if all went well.

    Raises SystemExit if it did not.
    """
    command = [sys.executable, "-m", "megaopus", name, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        status = subprocess.run(command, env=environment, stdout=output, stderr=output).returncode
    if status:
        raise SystemExit(f"python -m megaopus {name} ended with exit status {status}; see {log}")
    log.unlink()


def verb_here(name: str, arguments: Sequence[str], log: Path, threads: int) -> None:
    """Do the same in this process, without a start of Python; for small runs, one at a time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    with log.open("a") as output, redirect_stdout(output), redirect_stderr(output):
        status = main([name, *arguments])
    if status:
        raise SystemExit(f"python -m megaopus {name} ended with exit status {status}; see {log}")
    log.unlink()


Verb = Callable[[str, Sequence[str], Path, int], None]
"""(name, arguments, log, threads): ``verb`` or ``verb_here``."""


def summary_of(run: Run) -> dict[str, Any]:
    """Return what the study keeps of a run: its validations, and what selection did."""
    picked = pick_counts(run.path)
    return {
        "tokens_per_step": run.steps[0].tokens // (run.steps[0].step + 1),
        "step_s": statistics.median(row.step_s for row in run.steps),
        "share": picked_share(run),
        "unique_share": len(picked) / int(picked.sum()),
        "uniform_steps": sum(row.method == "uniform" for row in run.selections),
        "events": sum(bool(row.events) for row in run.selections),
        "validations": [asdict(each) for each in run.validations],
    }


@dataclass(frozen=True)
class StepCost:
    """Median seconds of one step."""

    step: float
    prescreen: float
    """Of them, in the prescreen: features looked up, scores, screening, learning."""


def step_costs(
    runs: Mapping[str, Sequence[str]], folder: Path, repeats: int, clock: str, bar: Progress, title: str
) -> dict[str, StepCost]:
    """Return what a step of each of ``runs`` (name -> settings) costs; they take turns in this process."""
    mesh = Mesh(ParallelConfig())
    spent: dict[str, list[float]] = {name: [] for name in runs}

    def watched(name: str, several: Callable[[], None], watch: _PrescreenWatch) -> Callable[[], None]:
        def run() -> None:
            before = watch.seconds
            several()
            spent[name].append(watch.seconds - before)

        return run

    try:
        steps = {
            name: settled_steps([*overrides, f"run_dir={folder / 'timing'}"], mesh, SETTLED, TURN)
            for name, overrides in runs.items()
        }
        with _PrescreenWatch(CLOCKS[clock]) as watch:
            passes = {name: watched(name, several, watch) for name, several in steps.items()}
            seconds = interleaved(passes, repeats, clock, bar, title)
    finally:
        mesh.close()
    return {
        name: StepCost(statistics.median(values) / TURN, statistics.median(spent[name][1:]) / TURN)
        for name, values in seconds.items()
    }


class _PrescreenWatch:
    """Adds up the time spent in the prescreen while it is entered."""

    _WATCHED = (
        (Prescreen, "distrust_reason"),
        (Prescreen, "prescreen_score"),
        (Prescreen, "learn"),
        (decide, "screen"),
    )

    def __init__(self, now: Callable[[], float]):
        self.seconds = 0.0
        self._now = now
        self._depth = 0
        self._functions = {(owner, name): getattr(owner, name) for owner, name in self._WATCHED}

    def __enter__(self) -> _PrescreenWatch:
        for (owner, name), function in self._functions.items():
            setattr(owner, name, self._timed(function))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), function in self._functions.items():
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = self._now()
            self._depth += 1
            try:
                return function(*arguments)
            finally:
                self._depth -= 1
                if not self._depth:  # they call one another
                    self.seconds += self._now() - began

        return timed


def run_of(row: dict[str, Any]) -> Run:
    """A row as ``compare`` takes it: its validations, and of its steps what their clock says."""
    validations = [ValidationRecord(**each) for each in row["validations"]]
    last, tokens = validations[-1], row["tokens_per_step"]
    steps = [
        StepRecord(
            step=step,
            tokens=(step + 1) * tokens,
            loss=0.0,
            grad_norm=0.0,
            lr=0.0,
            time_s=last.time_s * (step + 1) / last.step,
            step_s=last.time_s / last.step,
            select_s=0.0,
        )
        for step in (0, last.step - 1)
    ]
    key = row["key"]
    return Run(name=key, path=Path(key), steps=steps, validations=validations, selections=[], config={}, environment={})


def p_value(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> float | None:
    """Of final losses, paired by seed; None for fewer than two pairs."""
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return None
    finals = [[compare(run_of(arm[s]), run_of(arm[s])).final_loss for s in seeds] for arm in (first, second)]
    return paired_t_test(*finals)


def mean_share(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of each domain among the picks, over runs."""
    return {name: statistics.fmean(row["share"][name] for row in rows) for name in rows[0]["share"]}


def spread(mean: float | None, std: float | None, digits: int) -> str:
    """As a table's cell; - for what there is not."""
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
