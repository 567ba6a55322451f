"""Training tokens per second of the megatron engine over those of a plain PyTorch loop of the same shape.

Both train the same GPT from the same weights on the same sequences in one process, taking turns: forward, backward,
clipping, fused AdamW, one micro-batch per update. Prints a table and writes rows {shape, parameters,
engine_tokens_per_s, reference_tokens_per_s, ratio, ...}.

With --against FOLDER the yardstick is the engine of another checkout, each in a process of its own. They take turns all
the same, of which the first is not counted.

    python benchmarks/throughput.py --against FOLDER --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import (
    ROOT,
    Ratio,
    commit,
    interleaved,
    machine,
    parser,
    progress,
    single_engine,
    start,
    write_results,
)
from benchmarks.reference_gpt import ReferenceGPT
from megaopus.cli.demo import ensure_corpus
from megaopus.data.candidates import CandidateBuffer, CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig
from megaopus.models.flops import count_parameters
from megaopus.optim.config import OptimConfig

TARGET = 0.95
OPTIM = OptimConfig(name="adamw", lr=1e-3, schedule="constant")


@dataclass(frozen=True)
class Shape:
    """One model (layers x hidden size) and the micro-batch it trains on."""

    num_layers: int
    hidden_size: int
    num_heads: int
    seq_len: int
    micro_batch_size: int

    def __str__(self) -> str:
        return f"{self.num_layers} x {self.hidden_size}"


@dataclass(frozen=True)
class Plan:
    """Says what is measured, how often; ``steps`` updates make one timing."""

    shapes: tuple[Shape, ...] = (Shape(4, 128, 4, 128, 16), Shape(4, 256, 4, 256, 8), Shape(4, 512, 8, 256, 8))
    repeats: int = 15
    steps: int = 2


FULL = Plan()
QUICK = Plan(repeats=7, steps=1)


class PlainLoop:
    """The yardstick: what a careful person writes without a framework."""

    def __init__(self, shape: Shape, vocab_size: int):
        self.model = ReferenceGPT(shape.num_layers, shape.hidden_size, shape.num_heads, vocab_size, shape.seq_len)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        beta1, beta2 = OPTIM.betas
        self.optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(beta1, beta2), eps=OPTIM.eps, fused=True)

    def train_step(self, batch: CandidateBuffer) -> float:
        """One update; the mean token loss before it."""
        loss = self.model(batch.batch()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def measure(shape: Shape, plan: Plan, corpus: Corpus, clock: str, bar: Progress) -> dict[str, Any]:
    """The row of one shape. Raises EngineError if the two loops do not compute the same losses."""
    model = ModelConfig(num_layers=shape.num_layers, hidden_size=shape.hidden_size, num_heads=shape.num_heads)
    stream = CandidateStream(Sequences(corpus, "pool", shape.seq_len), shape.micro_batch_size, seed=1234)
    losses: dict[str, list[float]] = {"engine": [], "reference": []}
    with single_engine(
        model,
        OPTIM,
        vocab_size=corpus.vocab_size,
        seq_len=shape.seq_len,
        micro_batch_size=shape.micro_batch_size,
        total_steps=plan.steps * (plan.repeats + 1),
    ) as engine:
        plain = PlainLoop(shape, corpus.vocab_size)
        plain.model.copy_weights(engine.module.named_parameters())
        updates = {"engine": lambda batch: engine.train_step(batch).loss, "reference": plain.train_step}

        def train(name: str) -> None:
            for _ in range(plan.steps):
                losses[name].append(updates[name](stream.at(len(losses[name]))))

        passes = {name: partial(train, name) for name in updates}
        seconds = interleaved(passes, plan.repeats, clock, bar, str(shape))
    _check_same(shape, losses, "in plain PyTorch")
    tokens = plan.steps * shape.micro_batch_size * shape.seq_len
    ratio = Ratio.of(seconds["reference"], seconds["engine"])
    return {
        "shape": str(shape),
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "seq_len": shape.seq_len,
        "micro_batch_size": shape.micro_batch_size,
        "parameters": count_parameters(model, corpus.vocab_size, shape.seq_len),
        "engine_tokens_per_s": tokens / statistics.median(seconds["engine"]),
        "reference_tokens_per_s": tokens / statistics.median(seconds["reference"]),
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "repeats": plan.repeats,
        "loss": losses["engine"][-1],
    }


def compared(shape: Shape, plan: Plan, corpus: Path, other: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the row of one shape beside the checkout ``other``. Raises EngineError if their losses differ."""
    folders, losses = {"engine": ROOT, "reference": other.resolve()}, dict[str, list[float]](engine=[], reference=[])
    seconds = dict[str, list[float]](engine=[], reference=[])
    given = [*("--shape", *map(str, astuple(shape))), "--steps", str(plan.steps), "--most", str(plan.repeats + 1)]
    given += ["--corpus", str(corpus.resolve()), "--clock", args.clock, "--threads", str(args.threads)]
    with ExitStack() as stack:
        workers: dict[str, Any] = {}
        for name, folder in folders.items():
            command = [sys.executable, "-P", str(ROOT / "benchmarks" / "turns.py"), *given]
            environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(args.threads)}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
            workers[name] = stack.enter_context(subprocess.Popen(command, env=environment, cwd=folder, **pipes))
        for turn in range(plan.repeats + 1):
            for name in sorted(folders, reverse=turn % 2 == 1):
                print(file=workers[name].stdin)
                told = workers[name].stdout.readline().split()
                if len(told) != 2:
                    raise EngineError(f"{folders[name]}: its engine ended, as is said above")
                losses[name].append(float(told[1]))
                seconds[name] += [float(told[0])] if turn else []
    _check_same(shape, losses, f"in {other}")
    tokens = plan.steps * shape.micro_batch_size * shape.seq_len
    ratio = Ratio.of(seconds["reference"], seconds["engine"])
    return {
        "shape": str(shape),
        "seq_len": shape.seq_len,
        "micro_batch_size": shape.micro_batch_size,
        "against": commit(other),
        "engine_tokens_per_s": tokens / statistics.median(seconds["engine"]),
        "reference_tokens_per_s": tokens / statistics.median(seconds["reference"]),
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "repeats": plan.repeats,
        "loss": losses["engine"][-1],
    }


def _check_same(shape: Shape, losses: dict[str, list[float]], where: str) -> None:
    """A comparison of speeds means nothing if the work differs."""
    for step, (engine, reference) in enumerate(zip(losses["engine"], losses["reference"], strict=True)):
        if not math.isclose(engine, reference, rel_tol=1e-3):
            raise EngineError(f"{shape}: loss {engine:.6f} at step {step}, but {reference:.6f} {where}")


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """The table a person reads."""
    beside = "that of another checkout" if "against" in rows[0] else f"target ratio >= {TARGET}"
    table = Table(title=f"training throughput, {beside}", box=SIMPLE, padding=0)
    other = "other tok/s" if "against" in rows[0] else "plain tok/s"
    for name in ("shape", "batch", "parameters", "engine tok/s", other, "ratio", "quartiles"):
        table.add_column(name, justify="left" if name == "shape" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["shape"],
            f"{row['micro_batch_size']} x {row['seq_len']}",
            f"{row['parameters']:,}" if "parameters" in row else "-",
            f"{row['engine_tokens_per_s']:,.0f}",
            f"{row['reference_tokens_per_s']:,.0f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
        )
    console.print(table)


def main(arguments: list[str] | None = None, plan: Plan | None = None) -> int:
    """Measure, print, write; ``plan`` replaces what --quick chooses from."""
    made = parser(__doc__)
    made.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout of another commit: the yardstick")
    made.add_argument("--repeats", type=int, metavar="N", help="timings of each")
    args = made.parse_args(arguments)
    plan = plan or (QUICK if args.quick else FULL)
    plan = plan if args.repeats is None else replace(plan, repeats=args.repeats)
    console = Console()
    start(args, console)
    corpus = ensure_corpus(args.corpus, console)
    if args.against:
        rows = [compared(shape, plan, corpus, args.against, args) for shape in plan.shapes]
    else:
        with progress(console) as bar:
            rows = [measure(shape, plan, Corpus.open(corpus), args.clock, bar) for shape in plan.shapes]
    print_rows(rows, console)
    if args.json:
        write_results(args.json, rows, machine(args))
        console.print(f"rows: {args.json}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
