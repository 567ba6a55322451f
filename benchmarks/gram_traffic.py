"""Counts what a Gram matrix sends between ranks, by sketches of each layer and by their sum, without a GPU.

One rank of each job scores a buffer by selection=greats on fake CUDA tensors (benchmarks/fake_cuda; it needs g++), in
the real engine. Messages of the same scoring without a redundancy term are taken off.

    python benchmarks/gram_traffic.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.fake_cuda.device import install, missing
from benchmarks.gpu_shapes import CASES, Case, selection_of

WITHOUT = "no redundancy"
WAYS = ("per_layer", "summed")
JOBS: Mapping[str, Case] = {
    "gpt2_xl": replace(CASES["gpt2_xl"], parallel={"distributed_optimizer": True}, ranks=32),
    "llama_8b": replace(CASES["llama_8b"], ranks=64),
}
"""Models as benchmarks/gpu.py has them, on enough ranks that some are data-parallel."""


def sent(name: str) -> dict[str, dict[str, tuple[int, int]]]:
    """``gram_sketch`` -> kind and group of messages -> (how many, bytes that a rank sends by a ring) for the matrix."""
    from benchmarks.fake_cuda.measure import fake_job, measure

    warnings.simplefilter("ignore")
    case = JOBS[name]
    config, greats = case.config(), selection_of("greats")
    greats.score_micro_batch_size = config.selection.score_micro_batch_size
    selections = {WITHOUT: replace(greats, redundancy=0.0)}
    selections |= {way: replace(greats, gram_sketch=way) for way in WAYS}
    with fake_job(config, 0, case.ranks) as (mesh, meter):
        works = measure(config, case.vocab_size, mesh, meter, selections).score_work
    before = works[WITHOUT]
    return {
        way: {
            str(key): (count - before.messages[key], works[way].sent[key] - before.sent[key])
            for key, count in works[way].messages.items()
            if count != before.messages[key]
        }
        for way in WAYS
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS), metavar="SHAPE", help=", ".join(JOBS))
    args = parser.parse_args(arguments)
    console = Console(width=160)
    if why := missing():
        console.print(f"cannot run here: {why}", style="red", highlight=False)
        return 2
    install()  # compiled once, before two processes do
    table = Table(title="sent for the Gram matrix of one scoring, a rank", title_justify="left")
    for column in ("shape", "layout", "gram_sketch", "messages", "number", "MB"):
        table.add_column(column, justify="right" if column in ("number", "MB") else "left")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found: Mapping[str, Any] = dict(zip(args.only, pool.map(sent, args.only), strict=True))
    for name, ways in found.items():
        for way, messages in ways.items():
            for key, (count, size) in messages.items():
                table.add_row(name, JOBS[name].layout, way, key, f"{count:,}", f"{size / 1e6:,.1f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
