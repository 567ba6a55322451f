"""How much memory does a process of a run have of its own for each document of a large corpus, and how long to open it?

A corpus of --documents documents of random lengths in five domains is made up: its index and table are as ``prepare``
writes them, its tokens a file with nothing in it. One process lays the pool out (as the first rank of the first run
does); then each of two processes opens it, cuts sequences and reads 64 of them. Row {documents,
private_bytes_per_document, peak_bytes_per_document, open_seconds, lay_out_seconds, lay_out_bytes_per_document,
file_bytes_per_document}: memory is what /proc says is of no file (RssAnon), at the end and at its highest, less that of
a process that opens nothing.

    python benchmarks/index_memory.py [--documents N] [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.console import Console

from benchmarks.common import machine, parser, start, write_results
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    ROWS,
    TOKENIZER,
    TOKENS,
    Corpus,
    fingerprint_of,
)
from megaopus.data.index import write_index
from megaopus.data.sequences import Sequences

DOCUMENTS, QUICK_DOCUMENTS = 100_000_000, 1_000_000
SEQ_LEN, READ = 2048, 64
_DOMAINS = 5
_SHORTEST, _LONGEST = 20, 400
"""Tokens of a document: short, so that the file's length fits a laptop's file system."""


def made_up(folder: Path, documents: int) -> None:
    """Write a corpus of so many documents, 98 % of them in the pool."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(_SHORTEST, _LONGEST, documents, dtype=np.int32)
    codes = np.zeros(documents, CODE_DTYPE)
    codes["domain"] = draw.integers(0, _DOMAINS, documents, dtype=np.uint8)
    codes["split"] = np.maximum(0, draw.integers(0, 200, documents, dtype=np.uint8).astype(np.int16) - 197)
    folder.mkdir()
    np.save(folder / CODES, codes)
    write_index(folder / INDEX, lengths, np.dtype("<u2"))
    total = int(lengths.sum(dtype=np.int64))
    with (folder / TOKENS).open("wb") as stream:
        stream.truncate(2 * total)
    for name in (ROWS, TOKENIZER):
        (folder / name).write_text("{}\n")
    names = (TOKENS, INDEX, ROWS, CODES, TOKENIZER)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "domains": [f"domain{n}" for n in range(_DOMAINS)],
        "documents": documents,
        "tokens": total,
        "vocab_size": 1000,
        "eod_id": 0,
        "token_dtype": "uint16",
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": "made up"} for name in names},
    }
    manifest["fingerprint"] = fingerprint_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def own_memory() -> int:
    """Bytes of this process that are of no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def opened(folder: Path | None) -> dict[str, float]:
    """Open a corpus as a rank does; seconds, and bytes of its own at the end and at their highest."""
    highest, done = own_memory(), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    kept = []
    if folder is not None:
        pool = Sequences(Corpus.open(folder), "pool", SEQ_LEN)
        kept = [pool, pool.read(np.random.default_rng(1).integers(0, len(pool), READ))]
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    found = {"seconds": seconds, "own": own_memory(), "highest": max(highest, own_memory())}
    del kept
    return found


def in_a_process(folder: Path | None) -> dict[str, float]:
    """``opened`` in a process of its own."""
    command = [sys.executable, __file__, "--open", str(folder or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(documents: int) -> dict[str, Any]:
    """The row."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "corpus"
        made_up(folder, documents)
        nothing, laid_out = in_a_process(None), in_a_process(folder)
        ranks = [in_a_process(folder) for _ in range(2)]
        laid = sum(path.stat().st_size for path in folder.glob("layout-*/*"))
        of_files = laid + sum((folder / name).stat().st_size for name in (INDEX, CODES))
    return {
        "documents": documents,
        "private_bytes_per_document": max(0, max(each["own"] for each in ranks) - nothing["own"]) / documents,
        "peak_bytes_per_document": max(0, max(each["highest"] for each in ranks) - nothing["highest"]) / documents,
        "open_seconds": max(each["seconds"] for each in ranks),
        "lay_out_seconds": laid_out["seconds"],
        "lay_out_bytes_per_document": max(0, laid_out["highest"] - nothing["highest"]) / documents,
        "file_bytes_per_document": of_files / documents,
    }


def told(row: dict[str, Any]) -> str:
    """The row in words."""
    return (
        f"{row['documents']:,} documents: {row['private_bytes_per_document']:.3f} bytes each of a process's own memory"
        f" (at most {row['peak_bytes_per_document']:.3f} while opening), {row['open_seconds']:.2f} s to open; laid out"
        f" once in {row['lay_out_seconds']:.1f} s, {row['file_bytes_per_document']:.1f} bytes each in files"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--open"]:
        print(json.dumps(opened(Path(given[1]) if given[1] else None)))
        return 0
    options = parser(__doc__)
    options.add_argument("--documents", type=int, help=f"of the corpus (default: {DOCUMENTS:,})")
    args = options.parse_args(given)
    console = Console()
    start(args, console)
    row = measure(args.documents or (QUICK_DOCUMENTS if args.quick else DOCUMENTS))
    console.print(told(row), highlight=False)
    if args.json:
        write_results(args.json, {"index": row}, machine(args))
        console.print(f"row: {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
