"""Compares utilities with what training on the text for a while then does.

Trains from random weights, uniformly and on one kind of text only (the picks of DSIR), and halts at a few steps. There
every domain of the pool is asked two things. How useful is it, by the mean utility of its sequences: of the proxy
gradient, and of the proxy gradient less the pool's (selection.contrast). And how much does the proxy loss fall over the
next 1, 4 and 12 updates, all of them on this domain? Weights and optimizer are put back after each.
Prints a table and writes rows {run, step, domain, utility, contrast, fall_1, fall_4, fall_12}, in standard deviations
of the candidates and in nats.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, parser, progress, start, write_results
from benchmarks.pools import ensure_pool
from benchmarks.quality import COMMON, OPTIMIZERS
from megaopus.build import build_trainer
from megaopus.config.compose import compose
from megaopus.data.candidates import CandidateBuffer, CandidateStream
from megaopus.data.run_data import RunData
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.selection import Selector
from megaopus.side_by_side import silent_recorder
from megaopus.training.signals import StopSignal
from megaopus.training.trainer import Trainer

RUNS = {"uniform": "selection=uniform", "books only": "selection=dsir"}
UPDATES = (1, 4, 12)
CANDIDATES = 256
PROXY = 64
REPEATS = 3


class State:
    """Weights, optimizer and step of a trainer's engine, to come back to."""

    def __init__(self, trainer: Trainer):
        engine: Any = trainer.engine
        self._engine, self._step = engine, engine.step
        self._weights = [(p, p.detach().clone()) for _, p in engine.named_parameters()]
        self._states = [
            (state, {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)})
            for optimizer in engine.optimizer.torch_optimizers
            for state in optimizer.state.values()
        ]

    def restore(self) -> None:
        self._engine.step = self._step
        for parameter, value in self._weights:
            parameter.data.copy_(value)
        for state, values in self._states:
            for name, value in values.items():
                state[name].copy_(value)


def utilities(trainer: Trainer, data: RunData, overrides: Sequence[str], contrast: bool) -> dict[str, float]:
    """Mean utility of each domain among ``CANDIDATES`` of the pool, z-scored."""
    more = (f"selection.contrast={str(contrast).lower()}", f"selection.proxy_batch_size={PROXY}")
    once = ("selection.proxy_half_life=0", "selection.warmup_steps=0", "selection.guards.exposure_cap=0")
    config = compose([*overrides, "selection=opus_exact", *more, *once]).selection
    proxy, others = (
        CandidateStream(sequences, PROXY, 1, f"horizon {name}").at
        for name, sequences in (("proxy", data.proxy), ("pool", data.pool))
    )
    engine: Any = trainer.engine
    selector = Selector(config, engine.scoring_backend(), num_selected=8, proxy=proxy, pool=others, seed=1)
    buffer = CandidateStream(data.pool, CANDIDATES, 1, "horizon").at(engine.step)
    found = selector.select(buffer, engine.step).utilities
    assert found is not None
    z = (found - found.mean()) / found.std()
    codes = torch.from_numpy(data.pool.domain_of(buffer.sequence_ids))
    return {name: float(z[codes == code].mean()) for code, name in enumerate(data.pool.domains)}


def falls(trainer: Trainer, data: RunData) -> dict[str, list[float]]:
    """Fall of the proxy loss after each of ``UPDATES`` on each domain alone, mean of ``REPEATS`` draws."""
    engine: Any = trainer.engine
    pool, state = data.pool, State(trainer)
    proxy = CandidateStream(data.proxy, PROXY, 1, "horizon loss").at(0)
    before = float(engine.evaluate(proxy).mean())
    codes, size = pool.domain_of(np.arange(len(pool))), 8
    found = {}
    for code, name in enumerate(pool.domains):
        draws: list[list[float]] = []
        for repeat in range(REPEATS):
            ids = np.random.default_rng(repeat).permutation(np.flatnonzero(codes == code))
            draws.append([])
            for update in range(max(UPDATES)):
                some = ids[size * update : size * (update + 1)]
                engine.train_step(CandidateBuffer(pool, some, some))
                if update + 1 in UPDATES:
                    draws[-1].append(before - float(engine.evaluate(proxy).mean()))
            state.restore()
        found[name] = [statistics.fmean(each) for each in zip(*draws, strict=True)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    command = parser(__doc__)
    command.add_argument("--data", type=Path, metavar="FOLDER", required=True, help="with books.jsonl.gz and the rest")
    command.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of the pools (%(default)s)")
    args = command.parse_args(arguments)
    console = Console()
    start(args, console)
    halts = (30,) if args.quick else (30, 90)
    place = ensure_pool("mixed", args.data, args.folder / "pools", console)
    rows = []
    with progress(console) as bar:
        for name, choice in RUNS.items():
            overrides = [*COMMON, *OPTIMIZERS["adamw"], "train.steps=600", "seed=1", *place]
            config = compose([*overrides, choice, f"run_dir={args.folder / 'horizon'}"])
            mesh, data = Mesh(ParallelConfig()), RunData.open(config.data, config.data_needs())
            try:
                trainer = build_trainer(config, mesh, data, StopSignal())
                task = bar.add_task(name, total=max(halts))
                for step in range(max(halts) + 1):
                    if step in halts:
                        known = [utilities(trainer, data, overrides, contrast) for contrast in (False, True)]
                        for domain, fall in falls(trainer, data).items():
                            row = {"run": name, "step": step, "domain": domain}
                            row |= {"utility": known[0][domain], "contrast": known[1][domain]}
                            rows.append(row | {f"fall_{n}": value for n, value in zip(UPDATES, fall, strict=True)})
                    if step < max(halts):
                        trainer.update(silent_recorder())
                        bar.advance(task)
            finally:
                mesh.close()
    table = Table(title="mean utility (z), and fall of the proxy loss after updates on that domain alone (nats)")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column in ("run", "domain") else "right")
    for row in rows:
        table.add_row(*(f"{value:+.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if args.json:
        write_results(args.json, rows, machine(args))
        console.print(f"rows: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
