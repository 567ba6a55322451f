"""Measures how fast ``prepare`` makes a corpus, against the tokenizer alone on the same cores, and in how much memory?

Text of the demo corpus, over and over under other document ids, in one JSON-lines file; a small one and one ten times
as large. Tokenizer given (trained beforehand, as for the demo). Every measurement is a process of its own, in turns.
Row {tokens_per_s, tokenizer_only_tokens_per_s, ratio, peak_mb_small, peak_mb_large, ...}.

With --executor the command works by tasks of datatrove, one for each worker (row: also executor, tasks), and its corpus
must have the fingerprint of the command without. --clock cpu counts processor seconds of all processes of a command.

tokens_per_s: of the whole command, from reading to the finished folder. tokenizer_only: ``encode_batch_fast`` with as
many threads, on texts that are in memory. ratio: median over rounds. peak_mb: resident memory of the command at its
highest, its workers' with it (sampled). index: the row of index_memory.py, of 10^8 documents (--quick:
10^6); not with --executor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from rich.console import Console

from benchmarks import index_memory
from benchmarks.common import ROOT, machine, parser, progress, start, write_results
from megaopus.corpus_tools.demo_corpus import DEMO_LIMITS, build_demo_sources
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.data.corpus import Corpus
from megaopus.data.tokenizer import load_tokenizer, train_tokenizer

SMALL_MB, LARGE_MB, ROUNDS = 12, 120, 3
QUICK_SMALL_MB, QUICK_LARGE_MB, QUICK_ROUNDS = 6, 20, 1
VOCAB_SIZE = 16384
BATCH = 1 << 20


def write_texts(texts: Sequence[str], path: Path, megabytes: float) -> None:
    """JSON lines of about so many MB."""
    size, copy = 0, 0
    with path.open("w", encoding="utf-8") as stream:
        while size < megabytes * 1e6:
            for number, text in enumerate(texts):
                line = json.dumps({"id": f"{copy}.{number}", "text": f"{copy} {text}"}, ensure_ascii=False) + "\n"
                stream.write(line)
                size += len(line.encode())
                if size >= megabytes * 1e6:
                    break
            copy += 1


def run_prepare(source: Path, tokenizer: Path, workers: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds, tokens, fingerprint and peak MB of the command ``prepare``, with ``more`` options, and its workers."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        out = Path(folder) / "corpus"
        command = [sys.executable, "-m", "megaopus", "prepare", "--source", str(source), "--tokenizer", str(tokenizer)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        began, used, peak = time.perf_counter(), children_seconds(), 0
        with (Path(folder) / "log").open("w") as log:
            more = [*more, "--out", str(out), "--workers", str(workers)]
            process = subprocess.Popen([*command, *more], env=environment, stdout=log, stderr=log)
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(0.05)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit((Path(folder) / "log").read_text())
        made = Corpus.open(out)
        return {
            "seconds": seconds,
            "cpu_seconds": children_seconds() - used,
            "tokens": made.manifest["tokens"],
            "peak_mb": peak / 1e6,
            "fingerprint": made.fingerprint,
        }


def children_seconds() -> float:
    """Processor seconds of the processes that this one has waited for, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def resident(pid: int) -> int:
    """Bytes of memory that a process and its children hold now."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += each.memory_info().rss
    return total


def only_tokenize(source: Path, tokenizer: Path) -> dict[str, float]:
    """Seconds and tokens of the tokenizer on texts in memory."""
    texts = [document.text for document in SourceReader(Source(source))]
    batches: list[list[str]] = [[]]
    for text in texts:
        if sum(map(len, batches[-1])) >= BATCH:
            batches.append([])
        batches[-1].append(text)
    loaded = load_tokenizer(tokenizer)
    began, used = time.perf_counter(), time.process_time()
    tokens = sum(len(e) for batch in batches for e in loaded.encode_batch_fast(batch, add_special_tokens=False))
    seconds, used = time.perf_counter() - began, time.process_time() - used
    return {"seconds": seconds, "cpu_seconds": used, "tokens": tokens + len(texts)}


def run_tokenizer(source: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """``only_tokenize`` in a process of its own, with so many threads."""
    command = [sys.executable, __file__, "--tokenizer-only", str(source), str(tokenizer)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The row."""
    sizes = (QUICK_SMALL_MB, QUICK_LARGE_MB) if args.quick else (SMALL_MB, LARGE_MB)
    options = ["--executor", args.executor, "--tasks", str(args.tasks or args.threads)] if args.executor else []
    by_tasks = partial(run_prepare, more=options)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    clock = "cpu_seconds" if args.clock == "cpu" else "seconds"
    with tempfile.TemporaryDirectory() as temporary, progress(console) as bar:
        folder = Path(temporary)
        sources = build_demo_sources(folder, DEMO_LIMITS)
        texts = [document.text for source in sources for document in SourceReader(source)]
        tokenizer = folder / "tokenizer.json"
        train_tokenizer(iter(texts), VOCAB_SIZE).save(str(tokenizer))
        files = [folder / "small.jsonl", folder / "large.jsonl"]
        for path, size in zip(files, sizes, strict=True):
            write_texts(texts, path, size)
        task = bar.add_task("preparing", total=2 * rounds + 1)
        small = by_tasks(files[0], tokenizer, args.threads)
        if options:
            assert small["fingerprint"] == run_prepare(files[0], tokenizer, args.threads)["fingerprint"]
        bar.advance(task)
        pairs = []
        for round_ in range(rounds):
            turns: dict[str, Callable[..., dict[str, Any]]] = {"prepare": by_tasks, "tokenize": run_tokenizer}
            found = {}
            for what in sorted(turns, reverse=bool(round_ % 2)):
                found[what] = turns[what](files[1], tokenizer, args.threads)
                bar.advance(task)
            assert found["prepare"]["tokens"] == found["tokenize"]["tokens"]
            pairs.append(found)
    speed = {what: [pair[what]["tokens"] / pair[what][clock] for pair in pairs] for what in ("prepare", "tokenize")}
    return {
        "tokens_per_s": statistics.median(speed["prepare"]),
        "tokenizer_only_tokens_per_s": statistics.median(speed["tokenize"]),
        "ratio": statistics.median(p / t for p, t in zip(speed["prepare"], speed["tokenize"], strict=True)),
        "peak_mb_small": small["peak_mb"],
        "peak_mb_large": max(pair["prepare"]["peak_mb"] for pair in pairs),
        "small_mb": sizes[0],
        "large_mb": sizes[1],
        "workers": args.threads,
        **({"executor": args.executor, "tasks": args.tasks or args.threads} if options else {}),
        "tokens": pairs[0]["prepare"]["tokens"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--tokenizer-only"]:
        print(json.dumps(only_tokenize(*map(Path, given[1:]))))
        return 0
    options = parser(__doc__)
    options.add_argument("--executor", choices=("local", "ray"), help="prepare by tasks (default: without)")
    options.add_argument("--rounds", type=int, help="(default: 3, with --quick 1)")
    options.add_argument("--tasks", type=int, help="tasks of --executor (default: one for each worker)")
    args = options.parse_args(given)
    console = Console()
    start(args, console)
    row = measure(args, console)
    ours, alone = row["tokens_per_s"] / 1e6, row["tokenizer_only_tokens_per_s"] / 1e6
    console.print(f"{ours:.2f} M tokens/s, the tokenizer alone {alone:.2f}: ratio {row['ratio']:.2f}", highlight=False)
    for size in ("small", "large"):
        line = f"peak memory {row[f'peak_mb_{size}']:.0f} MB for {row[f'{size}_mb']} MB of text"
        console.print(line, highlight=False)
    if not args.executor:
        row["index"] = index_memory.measure(index_memory.QUICK_DOCUMENTS if args.quick else index_memory.DOCUMENTS)
        console.print(index_memory.told(row["index"]), highlight=False)
    if args.json:
        write_results(args.json, row, machine(args))
        console.print(f"row: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
