"""Times what a selection does on the host beside scoring: N = 8,192 candidates, K = 2,048 picks, one thread.

    python benchmarks/selection_host.py --results benchmarks/results/selection_host.jsonl

A full window of 1,000 steps, the guards as they are by default, a proxy of 32. Utilities, tokens and the Gram matrix
are drawn; nothing is scored or read from disk. "By log-odds" is what ``selection=opus`` does: of 4 N candidates the N
most important are scored. Redundancy is apart: its picks follow one from another, and it needs an N x N matrix, which
is there already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import CLOCKS, commit, parser, start
from megaopus.data.candidates import CandidateBuffer
from megaopus.record.parquet import ChoiceSink
from megaopus.selection import SelectionConfig, TensorCandidates, guards, odds
from megaopus.selection.choice import Choice
from megaopus.selection.config import GuardConfig, PrescreenConfig
from megaopus.selection.decide import Evidence, Key, decide
from megaopus.selection.scoring import Scores
from megaopus.training.records import selection_record

MULTIPLE = 4
"""Candidates that selection by log-odds looks through, for each that it scores."""
BY_ODDS = (
    *("signatures", "exposures of all, by log-odds", "exposures of the picks"),
    *("choice by log-odds", "log-odds fitted", "rows of the record, by log-odds"),
)
"""Stages of a selection by log-odds."""
BUDGET = ("signatures", "exposures of all", "exposures of the picks", "choice", "rows of the record")
"""Stages of a selection that are to take 50 ms together; a floor's choice stands in the place of the other."""


@dataclass(frozen=True)
class Plan:
    """Says how much is selected from how much."""

    candidates: int = 8192
    picks: int = 2048
    seq_len: int = 256
    window: int = 1000
    proxy: int = 32
    domains: int = 5
    repeats: int = 7


class Pool:
    """Stands in for ``data.Sequences``: drawn tokens (n, L + 1) in memory, of so many domains."""

    def __init__(self, tokens: np.ndarray, domains: int):
        self._tokens, self.seq_len = tokens, tokens.shape[1] - 1
        self.domains = [f"domain{number}" for number in range(domains)]

    def domain_of(self, ids: np.ndarray) -> np.ndarray:
        """Index into ``domains`` of each sequence."""
        return np.asarray(ids) % len(self.domains)

    def read(self, ids: np.ndarray, length: int | None = None) -> np.ndarray:
        """Copy sequences."""
        return self._tokens[ids, : (self.seq_len if length is None else length) + 1]


class Work:
    """Holds one selection's material; its methods are the stages."""

    def __init__(self, plan: Plan, folder: Path):
        self.plan, size = plan, plan.candidates
        draw = self._draw = torch.Generator().manual_seed(0)
        # Zipf's law, so that pairs repeat as in text
        tokens = torch.rand(size, plan.seq_len + 1, generator=draw).mul(10.8).exp().int().numpy()
        pool: Any = Pool(tokens, plan.domains)
        ids = torch.randperm(size, generator=draw).numpy()
        self.unsigned = CandidateBuffer(pool, ids, ids)
        signed = guards.token_signatures(torch.from_numpy(tokens)).numpy()
        self.buffer = CandidateBuffer(pool, ids, ids, signatures=signed)
        self.proxy = TensorCandidates(torch.from_numpy(tokens[: plan.proxy]).long())
        self.utilities = torch.randn(size, generator=draw, dtype=torch.float64)
        self.known, self.odds = torch.randn(3, size, generator=draw, dtype=torch.float64), odds.Odds()
        for _ in range(odds.WINDOW):
            self.fit()
        self.exposure, self.step = guards.Exposure(plan.window), 0
        for _ in range(plan.window):
            self.record(torch.randint(-(2**62), 2**62, (plan.picks,), generator=draw))
        self.sink = ChoiceSink(folder)
        config = SelectionConfig(method="opus", sampler="top_k")
        self.choice = decide(self.evidence(), config, Key(0, 0), plan.picks)

    def signatures(self) -> torch.Tensor:
        """Look up what preparation left."""
        found = self.buffer.signatures
        assert found is not None
        return found

    def hashed(self) -> torch.Tensor:
        """Hash all candidates, as one rank does where preparation left nothing."""
        return guards.token_signatures(self.unsigned.batch())

    def times(self) -> torch.Tensor:
        """Count the exposures of all candidates."""
        return self.exposure.times(self.signatures(), self.buffer.ids)

    def record(self, signatures: torch.Tensor) -> None:
        """Count those of a step's picks, and forget the oldest."""
        self.exposure.record(self.step, signatures)
        self.step += 1

    def evidence(self, gram: torch.Tensor | None = None) -> Evidence:
        """Say what is known of the buffer."""
        return Evidence(
            ids=self.buffer.ids,
            score=lambda rows: Scores(utilities=self.utilities[rows], gram=gram),
            exposures=torch.ones(len(self.buffer), dtype=torch.int64),
            domains=torch.from_numpy(self.buffer.domains),
            token_pair_alarm=guards.token_pair_check(self.buffer, lambda step: self.proxy, 0.5, 0, 0, 0),
        )

    def decide(self, gram: torch.Tensor | None = None, floor: float = 0.0, **settings: Any) -> None:
        """Choose, alarms included."""
        config = SelectionConfig(method="opus", guards=GuardConfig(domain_floor=floor), **settings)
        choice = decide(self.evidence(gram), config, Key(0, 0), self.plan.picks)
        assert choice.method == "opus", choice.events

    def by_odds(self) -> Choice:
        """Choose by log-odds among the quarter that is most important, alarms included."""
        config = SelectionConfig(
            method="opus",
            sampler="top_k",
            utilities="odds",
            prescreen=PrescreenConfig(mode="importance", multiple=MULTIPLE),
        )
        importance, utilities, losses = self.known
        evidence = replace(
            self.evidence(),
            score=lambda rows: Scores(utilities=utilities[rows], losses=losses[rows]),
            prescreen_score=importance,
            prior=importance,
            parts=lambda rows, scores: odds.parts_of(odds.Signals(*self.known[:, rows]), self.odds.weights),
        )
        choice = decide(evidence, config, Key(0, 0), self.plan.picks)
        assert choice.method == "opus", choice.events
        return choice

    def fit(self) -> None:
        """Take in a scoring, and fit the log-odds to the full window."""
        scored, judges = self.known[:, : self.plan.candidates // MULTIPLE], self.known[:, -self.plan.proxy // 4 :] + 1
        self.odds.learn(odds.Signals(*scored), odds.Signals(*judges))

    def pairs(self) -> None:
        """Compare the pairs of tokens of all picks with a draw's, as where a method has no proxy."""
        guards.token_pair_check(self.buffer, None, 0.5, 0, 0, 0)(self.choice.positions)

    def rows(self, choice: Choice | None = None) -> None:
        """Make the rows of the record; files are written once in 16 such steps."""
        selection = (choice or self.choice).at(0, 0, self.buffer.ids, self.plan.picks)
        picked = self.buffer.take(selection.indices)
        record = selection_record(self.buffer, picked, selection, None)
        assert record.choices is not None
        self.sink.add(0, record.choices)


def stages(work: Work, wide: Work, gram: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Name every stage, in the order of a selection; ``wide``: of all that log-odds choose from."""
    chosen = wide.by_odds()
    picks = torch.randint(-(2**62), 2**62, (work.plan.picks,), generator=torch.Generator().manual_seed(1))
    return {
        "signatures": work.signatures,
        "exposures of all": work.times,
        "exposures of the picks": lambda: work.record(picks + work.step),
        "choice": lambda: work.decide(sampler="top_k"),
        "choice, drawn (boltzmann)": lambda: work.decide(sampler="boltzmann"),
        "choice with a domain floor": lambda: work.decide(sampler="top_k", floor=0.5),
        "rows of the record": work.rows,
        "exposures of all, by log-odds": wide.times,
        "choice by log-odds": wide.by_odds,
        "log-odds fitted": wide.fit,
        "rows of the record, by log-odds": lambda: wide.rows(chosen),
        "signatures hashed by one rank": work.hashed,
        "token pairs compared without a proxy": work.pairs,
        "choice with redundancy": lambda: work.decide(gram, sampler="top_k", redundancy=1.0),
        "choice with redundancy, drawn": lambda: work.decide(gram, sampler="boltzmann", redundancy=1.0),
    }


def measure(plan: Plan, clock: str, console: Console) -> dict[str, float]:
    """Milliseconds of each stage: medians, fewer repeats where one takes seconds; the mean where files are written."""
    now, found = CLOCKS[clock], {}
    vectors = torch.randn(plan.candidates, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gram = vectors @ vectors.t()
    with tempfile.TemporaryDirectory() as folder:
        work = Work(plan, Path(folder, "one"))
        wide = Work(replace(plan, candidates=MULTIPLE * plan.candidates), Path(folder, "wide"))
        for name, stage in stages(work, wide, gram).items():
            seconds: list[float] = []
            files = name.startswith("rows of the record")
            repeats, warm_up = (32, 16) if files else (plan.repeats, 1)
            while len(seconds) < warm_up + repeats and sum(seconds) < 20:
                before = now()
                stage()
                seconds.append(now() - before)
            kept = seconds[warm_up:] or seconds
            middle = statistics.mean(kept) if files else statistics.median(kept)
            found[name] = 1000 * middle
            console.print(f"{name}: {found[name]:.2f} ms", highlight=False)
    for name, choice in (("sum", "choice"), ("sum with a domain floor", "choice with a domain floor")):
        found[name] = sum(found[choice if stage == "choice" else stage] for stage in BUDGET)
    found["sum, by log-odds"] = sum(found[stage] for stage in BY_ODDS)
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    made.add_argument("--results", type=Path, metavar="FILE", help="add the row to this file")
    made.add_argument("--seq-len", type=int, default=Plan.seq_len, help="%(default)s")
    made.set_defaults(threads=1, clock="cpu")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Measure, print and keep a row."""
    args, console = arguments(argv), Console()
    start(args, console)
    plan = plan or Plan(seq_len=args.seq_len, repeats=3 if args.quick else Plan.repeats)
    found = measure(plan, args.clock, console)
    table = Table("stage", "ms")
    for name, milliseconds in found.items():
        table.add_row(name, f"{milliseconds:.2f}")
    console.print(table)
    shape = {"candidates": plan.candidates, "picks": plan.picks, "seq_len": plan.seq_len, "window": plan.window}
    row = {**shape, "threads": args.threads, "clock": args.clock, "ms": found, "commit": commit()}
    for path in filter(None, (args.results, args.json)):
        with path.open("a" if path == args.results else "w") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
