"""Draws who works when while a buffer is scored: a picture with one line per rank, for dp=2, tp=2 and pp=2.

Each bar is one pass of a micro-batch through a rank's part of the model: of the proxy gradient, then of the candidates
under the weights moved forwards and backwards. Writes FILE (png).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from matplotlib import pyplot as plt

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.models.config import ModelConfig
from megaopus.selection import SelectionConfig, Selector
from tests.harness import random_batch, tiny_engine
from tests.pool import Pool

LAYOUTS = {
    "dp=2: each rank scores its half": ParallelConfig(),
    "tp=2: both ranks score every candidate, half of each matrix": ParallelConfig(tp=2),
    "pp=2: micro-batches follow each other through the stages": ParallelConfig(pp=2),
}
COLOURS = {"proxy gradient": "#666666", "candidates, weights moved": "#0072b2"}
SEQ_LEN, VOCAB = 128, 2048

Passes = list[tuple[str, float, float]]  # phase, begin, end (seconds from the start of the selection)


def trace(parallel: ParallelConfig) -> tuple[Passes, float]:
    """Forward passes of this rank during one selection, and how long the selection took; the fourth, so all is warm."""
    mesh = Mesh(parallel, "cpu")
    try:
        shape = ModelConfig(num_layers=4, hidden_size=256, num_heads=4)
        size = {"seq_len": SEQ_LEN, "vocab_size": VOCAB}
        engine = tiny_engine(mesh, model=shape, parallel=parallel, micro_batch_size=2, **size)
        engine.train_step(random_batch(8, 0, **size))
        backend = engine.scoring_backend()
        passes: Passes = []
        phase = [""]

        def during(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                phase[0] = name
                return function(*args, **kwargs)

            return call

        proxy, moved = COLOURS
        backend.gradient = during(proxy, backend.gradient)
        backend.losses = during(moved, backend.losses)
        began: list[float] = []
        for chunk in engine.chunks:
            chunk.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
            chunk.register_forward_hook(lambda *_: passes.append((phase[0], began.pop(), time.perf_counter())))
        config = SelectionConfig(method="opus", score_micro_batch_size=4, proxy_batch_size=8)
        selector = Selector(config, backend, num_selected=16, proxy=lambda step: random_batch(8, step, **size), seed=0)
        for step in range(4):
            passes.clear()
            dist.barrier()
            started = time.perf_counter()
            selector.select(random_batch(32, step, **size), step)
        seconds = time.perf_counter() - started
        return [(name, begin - started, end - started) for name, begin, end in passes], seconds
    finally:
        mesh.close()


def draw(found: dict[str, list[tuple[Passes, float]]], path: Path) -> None:
    """One panel per layout, one line per rank."""
    figure, axes = plt.subplots(len(found), 1, figsize=(9, 1.7 * len(found)), layout="constrained")
    for axis, (title, ranks) in zip(axes, found.items(), strict=True):
        for rank, (passes, _) in enumerate(ranks):
            for phase, begin, end in passes:
                axis.barh(
                    rank, 1e3 * (end - begin), left=1e3 * begin, color=COLOURS[phase], edgecolor="white", height=0.7
                )
        busy = [sum(end - begin for _, begin, end in passes) / seconds for passes, seconds in ranks]
        axis.set_title(f"{title} (forward passes fill {min(busy):.0%} and {max(busy):.0%})", loc="left", fontsize=9)
        axis.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
        axis.invert_yaxis()
        axis.set_xlabel("ms", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture (png)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with Pool(pinned=False) as pool:
        found = {title: pool.run(2, trace, parallel) for title, parallel in LAYOUTS.items()}
    draw(found, args.file)
    print(args.file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
