"""How fast are text features made by one process and by two workers, how large are they, what does a sample change?

Pools of text (pools.py): mixed, hard and clean. Row {tokens_per_s: {recipe: of one process}, bytes_per_sequence:
{recipe}, workers: {seconds, one_worker_seconds, ratio, identical}, overlap: {pool: {share in the sample: ...}}, ...}.

tokens_per_s: the tokens of a pool, made 8 times as large, over the seconds of ``ensure_text_features`` in this process:
of what ``opus`` reads, and of what ``screened`` reads, which has the n-grams' block. workers: seconds of the command
``features --executor local`` for a pool --copies times as large, with one task at a time and with two, in turns, start
of the processes included, medians; whether all files are equal, those of the command without an executor as well.
overlap: which part of the picks by importance, the best quarter of each buffer of 256 sequences of the candidates,
stays where n-grams are counted, and importance is fitted, in a sample of the pool's sequences.

    python benchmarks/features.py --data FOLDER --work FOLDER [--part speed|workers|overlap] [--quick] [--json FILE]

OMP_NUM_THREADS=1, as the tasks have it: then one process is one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

from benchmarks.common import CLOCKS, ROOT, machine, parser, start, write_results
from benchmarks.pools import ensure_pool
from megaopus.config.compose import compose
from megaopus.corpus_tools.adopt import adopt
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import TOKENIZER, TOKENS, Corpus
from megaopus.data.run_data import RunData
from megaopus.data.text_features import SequenceTextFeatures, ensure_text_features
from megaopus.selection.sampler import pick_top_k

POOLS = ("mixed", "hard", "clean")
PARTS = ("speed", "workers", "overlap")
RECIPES = ("opus", "screened")
COPIES, QUICK_COPIES = 64, 4
_SPEED_COPIES = 8
ROUNDS, QUICK_ROUNDS = 3, 1
SHARES = (0.5, 0.25, 0.125, 0.0625)
SEQ_LEN, LARGE_SEQ_LEN = 128, 512
BUFFER, PICKED = 256, 64


def enlarged(corpus: Path, out: Path, copies: int) -> Path:
    """A corpus whose domains are so many copies of all of ``corpus``, read where it lies."""
    if not out.is_dir():
        opened = Corpus.open(corpus)
        names = [out.parent / "copies" / f"c{number:02d}.bin" for number in range(copies)]
        names[0].parent.mkdir(exist_ok=True)
        for name in names:
            name.unlink(missing_ok=True)
            name.symlink_to((corpus / TOKENS).absolute())
        rule = SplitRule(0.0, 0.02)  # no copy of a text in the pool is a proxy's: that is the pool's own
        adopt([str(name) for name in names], out, tokenizer=corpus / TOKENIZER, eod=opened.eod_id, rule=rule)
    return out


def settings(corpus: Path, recipe: str, features: Path) -> list[str]:
    """Give the settings of a run of this recipe."""
    where = [f"data.path={corpus}", f"data.proxy_path={corpus.parent / 'pools' / 'mixed'}"]
    return [*where, f"data.text_features_path={features}", f"data.seq_len={LARGE_SEQ_LEN}", f"selection={recipe}"]


def speed(corpus: Path, work: Path, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Tokens a second and bytes a sequence, by recipe."""
    found: dict[str, Any] = {"tokens_per_s": {}, "bytes_per_sequence": {}}
    for recipe in RECIPES:
        folder = work / f"speed-{recipe}"
        shutil.rmtree(folder, ignore_errors=True)
        config = compose(settings(corpus, recipe, folder))
        data = RunData.open(config.data, config.data_needs())
        began = CLOCKS[args.clock]()
        data.ensure_text_features(console)
        seconds = CLOCKS[args.clock]() - began
        size = sum(path.stat().st_size for path in folder.rglob("*.npy") if path.name != "proxy.npy")
        found["tokens_per_s"][recipe] = len(data.pool) * LARGE_SEQ_LEN / seconds
        found["bytes_per_sequence"][recipe] = size / len(data.pool)
    return found | {"sequences": len(data.pool), "seq_len": LARGE_SEQ_LEN}


def command(corpus: Path, features: Path, more: Sequence[str]) -> tuple[float, str]:
    """Seconds of the command, and a digest of what it makes."""
    shutil.rmtree(features, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-m", "megaopus", "features", *settings(corpus, "screened", features), *more]
    began = time.perf_counter()
    done = subprocess.run(given, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    digest = hashlib.sha256()
    for path in sorted(features.rglob("*.npy")):
        digest.update(path.name.encode() + path.read_bytes())
    return seconds, digest.hexdigest()


def workers(corpus: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Seconds with one worker and with two, and whether they make the same."""
    by_tasks = ["--executor", "local", "--tasks", "4", "--workers"]
    ways = {"alone": [], "one": [*by_tasks, "1"], "two": [*by_tasks, "2"]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    digests = set()
    for turn in range(rounds):
        for name in sorted(ways, reverse=bool(turn % 2)):
            took, digest = command(corpus, work / "by-workers", ways[name])
            seconds[name].append(took)
            digests.add(digest)
    return {
        "seconds": statistics.median(seconds["two"]),
        "one_worker_seconds": statistics.median(seconds["one"]),
        "without_executor_seconds": statistics.median(seconds["alone"]),
        "ratio": statistics.median(one / two for one, two in zip(seconds["one"], seconds["two"], strict=True)),
        "identical": len(digests) == 1,
    }


def overlap(overrides: Sequence[str], work: Path, console: Console) -> dict[str, float]:
    """Share of the picks that a sample leaves as they are, by its size."""
    config = compose([*overrides, f"data.seq_len={SEQ_LEN}", "selection=opus"])
    data = RunData.open(config.data, config.data_needs())
    stream = CandidateStream(data.pool, BUFFER, seed=0)

    def picks(sample: int) -> list[set[int]]:
        with tempfile.TemporaryDirectory(dir=work) as folder:  # features of the whole pool would be taken for all
            place = ensure_text_features(data.pool, data.proxy, folder, console, ngrams=False, sample=sample)
            features = SequenceTextFeatures(data.pool, place)
            buffers = (torch.as_tensor(stream.at(step).ids) for step in range(len(data.pool) // BUFFER))
            return [set(ids[pick_top_k(features.importance(ids), ids, PICKED)].tolist()) for ids in buffers]

    whole = picks(len(data.pool) + len(data.proxy))
    found = {"sequences": float(len(data.pool))}
    for share in SHARES:
        some = picks(int(share * len(data.pool)))
        found[str(share)] = sum(len(a & b) for a, b in zip(whole, some, strict=True)) / sum(map(len, whole))
    return found


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The row."""
    args.work.mkdir(parents=True, exist_ok=True)
    asked = {name: ensure_pool(name, args.data, args.work / "pools", console) for name in POOLS}
    copies = args.copies or (QUICK_COPIES if args.quick else COPIES)
    parts, row = args.part or PARTS, {}
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = Path(temporary)
        if "overlap" in parts:
            row["overlap"] = {name: overlap(overrides, work, console) for name, overrides in asked.items()}
        larger = partial(enlarged, args.work / "pools" / "mixed")
        if "speed" in parts:
            several = min(copies, _SPEED_COPIES)
            row |= speed(larger(args.work / f"mixed_{several}", several), work, args, console)
        if "workers" in parts:
            rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
            row["workers"] = workers(larger(args.work / f"mixed_{copies}", copies), work, rounds)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="text, as pools.py takes it")
    options.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="the pools are kept here")
    options.add_argument("--part", action="append", choices=PARTS, help="repeatable (default: all)")
    options.add_argument("--copies", type=int, help=f"of the pool that workers share (default: {COPIES})")
    options.add_argument("--rounds", type=int, help=f"of workers (default: {ROUNDS}, with --quick {QUICK_ROUNDS})")
    args, console = options.parse_args(arguments), Console(width=120)
    start(args, console)
    row = measure(args, console)
    for name, value in row.items():
        console.print(f"{name}: {value}", highlight=False)
    if args.json:
        write_results(args.json, {"features": row}, machine(args))
        console.print(f"row: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
