"""Measures what a checkpoint costs a training run: written while it waits, and written in the background.

One process, a GPT of 4 layers and width 512 (13.8M parameters) with AdamW, a checkpoint every few updates. Rows
{mode, checkpoint_mb, step_s, stall_s, in_flight_step_s, in_flight_steps, lost_s, write_s}:

step_s: median update with no save in progress. stall_s: median time that training waits for the save to return.
in_flight_step_s: median update while one is being written, and how many there are for each. lost_s: what one save
costs in all, stall and slower updates. write_s: from the call until the checkpoint is complete. verify_s: reading it
for its digests.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, parser, progress, single_engine, start, write_results
from megaopus.checkpoint.checkpointer import Checkpointer, complete_checkpoints
from megaopus.checkpoint.config import CheckpointConfig
from megaopus.checkpoint.manifest import verify
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig

MODEL = ModelConfig(num_layers=4, hidden_size=512, num_heads=8)
VOCAB, SEQ_LEN, BATCH = 2048, 128, 4
EVERY, SAVES, QUICK_SAVES = 12, 8, 2
STATE: dict[str, Any] = {"time_s": 0.0, "selector": {}, "guard": {}, "identity": {}, "config": {}}


@dataclass(frozen=True)
class Batch:
    """Random tokens."""

    tokens: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        return torch.arange(len(self))

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: torch.Tensor) -> Batch:
        return Batch(self.tokens[indices])

    def batch(self, length: int | None = None) -> torch.Tensor:
        return self.tokens if length is None else self.tokens[:, : length + 1]


@dataclass
class Times:
    """Seconds of one mode."""

    quiet: list[float] = field(default_factory=list)
    in_flight: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)


def measure(engine: MegatronEngine, folder: Path, background: bool, saves: int, advance: Any) -> dict[str, Any]:
    """One mode: ``saves`` checkpoints, EVERY updates apart."""
    saver = Checkpointer(CheckpointConfig(every=EVERY, background=background), folder, engine.mesh)
    batch = Batch(torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1)))
    times, began = Times(), 0.0
    for step in range(1, EVERY * (saves + 1) + 1):
        flying = saver.writing
        started = time.perf_counter()
        engine.train_step(batch)
        saver.poll()
        now = time.perf_counter()
        (times.in_flight if flying else times.quiet).append(now - started)
        if flying and not saver.writing:
            times.write.append(now - began)
        if step % EVERY == 0 and step <= EVERY * saves:
            began = time.perf_counter()
            saver.save(step, engine, {}, STATE, wait=False)
            times.stall.append(time.perf_counter() - began)
        advance()
    saver.finish()
    return row(times, "background" if background else "waiting", saves, engine, complete_checkpoints(folder)[-1])


def row(times: Times, mode: str, saves: int, engine: MegatronEngine, checkpoint: Path) -> dict[str, Any]:
    """Return what one mode's times come to."""
    quiet = statistics.median(times.quiet)
    slower = sum(each - quiet for each in times.in_flight) / saves
    stall = statistics.median(times.stall)
    started = time.perf_counter()
    assert verify(checkpoint, engine.mesh) is None
    return {
        "mode": mode,
        "checkpoint_mb": round(sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e6, 1),
        "step_s": round(quiet, 4),
        "stall_s": round(stall, 4),
        "in_flight_step_s": round(statistics.median(times.in_flight), 4) if times.in_flight else None,
        "in_flight_steps": round(len(times.in_flight) / saves, 1),
        "lost_s": round(stall + slower, 4),
        "write_s": round(statistics.median(times.write or times.stall), 4),
        "verify_s": round(time.perf_counter() - started, 4),
    }


def main() -> None:
    args = arguments()
    console = Console()
    start(args, console)
    saves = QUICK_SAVES if args.quick else SAVES
    rows = []
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        progress(console) as bar,
        single_engine(
            MODEL, OptimConfig(), vocab_size=VOCAB, seq_len=SEQ_LEN, micro_batch_size=BATCH, total_steps=10_000
        ) as engine,
    ):
        for background in (False, True):
            task = bar.add_task("background" if background else "waiting", total=EVERY * (saves + 1))
            place = Path(folder) / str(background)
            rows.append(measure(engine, place, background, saves, lambda task=task: bar.advance(task)))
    table = Table(*rows[0])
    for each in rows:
        table.add_row(*(str(value) for value in each.values()))
    console.print(table)
    if args.json:
        write_results(args.json, rows, machine(args))


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--folder", type=Path, metavar="FOLDER", help="write the checkpoints here (a temporary folder)")
    return made.parse_args()


if __name__ == "__main__":
    main()
