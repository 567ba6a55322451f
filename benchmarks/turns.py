"""Trains a shape for throughput.py, as often as it is told: a line comes in, seconds and a loss go out.

Run with PYTHONPATH as a checkout and without this file's folder (python -P), so that package and helpers are that
checkout's own, of whatever commit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.common import CLOCKS, single_engine
from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig


def main() -> None:
    """Make ``--steps`` updates for each line of the standard input."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", type=int, nargs=5, required=True, metavar="N", help="as throughput.Shape has them")
    made.add_argument("--steps", type=int, required=True, help="updates for a line")
    made.add_argument("--most", type=int, required=True, help="lines that may come")
    made.add_argument("--corpus", type=Path, required=True, metavar="FOLDER")
    made.add_argument("--clock", choices=CLOCKS, required=True)
    made.add_argument("--threads", type=int, required=True)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    layers, width, heads, seq_len, micro = args.shape
    corpus, now = Corpus.open(args.corpus), CLOCKS[args.clock]
    stream = CandidateStream(Sequences(corpus, "pool", seq_len), micro, seed=1234)
    sizes = {"seq_len": seq_len, "micro_batch_size": micro, "total_steps": args.steps * args.most}
    model = ModelConfig(num_layers=layers, hidden_size=width, num_heads=heads)
    optim = OptimConfig(name="adamw", lr=1e-3, schedule="constant")
    with single_engine(model, optim, vocab_size=corpus.vocab_size, **sizes) as engine:
        for _ in sys.stdin:
            started = now()
            for _ in range(args.steps):
                loss = engine.train_step(stream.at(engine.step)).loss
            print(now() - started, loss, flush=True)


if __name__ == "__main__":
    main()
