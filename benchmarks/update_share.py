"""Estimates which part of a training step the optimizer's update is, on a GPU, by fake CUDA tensors.

Rows {shape, optimizer, ranks, micro_batches, update_ms, step_ms, share, update_launches, update_peak_gib, messages}: by
an H100's data sheet (``fake_cuda``), nothing hidden behind other work; ``update_peak_gib`` is beyond what is held
between steps. A minute of one core for GPT-2 small, some for the large ones; needs g++.

    python benchmarks/update_share.py [--shapes gpt2_xl] [--optimizers muon] [--ranks 8] [--micro-batches 16]
        [--results FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import commit
from benchmarks.fake_cuda.measure import Zeros, fake_job
from benchmarks.fake_cuda.work import Work
from benchmarks.gpu_shapes import CASES
from megaopus.build import build_engine
from megaopus.optim.registry import OPTIMIZERS

GIB = 2**30


def measure(shape: str, optimizer: str, ranks: int, micro_batches: int) -> dict[str, Any]:
    """Make two steps of a rank of such a job, and tell the second one's update from the rest."""
    case = replace(CASES[shape], optimizer=optimizer, ranks=ranks, micro_batches=micro_batches)
    config = case.config()
    with fake_job(config, 0, ranks) as (mesh, meter):
        engine = build_engine(config, mesh, case.vocab_size)
        batch = Zeros(config.train.global_batch_size, case.seq_len)
        engine.train_step(batch)
        gc.collect()
        held, made, update = meter.bytes, engine.optimizer.step, Work()
        peak = 0

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal peak
            whole, meter.work = meter.work, update
            meter.reset_peak()
            try:
                return made(*args, **kwargs)
            finally:
                peak, meter.work = meter.peak, whole

        engine.optimizer.step = step
        meter.work = Work()
        engine.train_step(batch)
        update_s = sum(update.seconds.values())
        step_s = update_s + sum(meter.work.seconds.values())
    return {
        "shape": shape,
        "optimizer": optimizer,
        "layout": case.layout,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "update_ms": round(1000 * update_s, 2),
        "step_ms": round(1000 * step_s, 1),
        "share": round(update_s / step_s, 4),
        "update_launches": update.kernels(),
        "update_peak_gib": round((peak - held) / GIB, 2),
        "messages": {str(key): count for key, count in update.messages.items()},
        "estimate": True,
        "commit": commit(),
    }


def main() -> None:
    """Print a row for each shape and optimizer, and keep it."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", nargs="+", choices=CASES, default=["gpt2_xl"], help="(%(default)s)")
    made.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["muon"], help="(%(default)s)")
    made.add_argument("--ranks", type=int, default=8, help="(%(default)s)")
    made.add_argument("--micro-batches", type=int, default=16, help="of a step, on each rank (%(default)s)")
    made.add_argument("--results", type=Path, metavar="FILE", help="rows are added to it")
    args = made.parse_args()
    warnings.simplefilter("ignore")
    for shape in args.shapes:
        for optimizer in args.optimizers:
            row = measure(shape, optimizer, args.ranks, args.micro_batches)
            print(json.dumps(row), flush=True)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
