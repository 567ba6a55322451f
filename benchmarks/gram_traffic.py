"""Counts what a Gram matrix sends between ranks, by sketches of each layer and by their sum, without a GPU.

A rank of GPT-2 XL on 32 data-parallel ranks with the distributed optimizer scores a buffer by selection=greats on fake
CUDA tensors (benchmarks/fake_cuda; it needs g++), in the real engine. Messages of the same scoring without a redundancy
term are taken off. About nine minutes of one core.

    python benchmarks/gram_traffic.py
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.fake_cuda.device import install, missing
from benchmarks.gpu_shapes import CASES, Case, selection_of

WITHOUT = "no redundancy"
WAYS = ("per_layer", "summed")
GPT2_XL = replace(CASES["gpt2_xl"], parallel={"distributed_optimizer": True}, ranks=32)


def sent(case: Case) -> dict[str, Mapping[str, tuple[int, int]]]:
    """``gram_sketch`` -> kind and group of messages -> (how many more, bytes more that a rank sends by a ring)."""
    from benchmarks.fake_cuda.measure import fake_job, measure

    warnings.simplefilter("ignore")
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
    parser.parse_args(arguments)
    console = Console(width=120)
    if why := missing():
        console.print(f"cannot run here: {why}", style="red", highlight=False)
        return 2
    install()
    table = Table(title=f"sent by a rank for the Gram matrix of a scoring, {GPT2_XL.layout}", title_justify="left")
    for column in ("gram_sketch", "messages", "number", "MB"):
        table.add_column(column, justify="right" if column in ("number", "MB") else "left")
    for way, messages in sent(GPT2_XL).items():
        for key, (count, size) in messages.items():
            table.add_row(way, key, f"{count:,}", f"{size / 1e6:,.1f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
