"""Trains two small models for one target, and asks the report's question: did it get better, by how much, how surely.

The target is a benchmark of single words (LAMBADA): the proxy is made of half of its passages, the other half is the
test, and of the first a tenth is held out once more as the slice whose loss is the headline. Arms: batches drawn
uniformly, and ``selection=opus``; equal update tokens, one seed, so that training noise is that between checkpoints.

    python benchmarks/target.py --items lambada_test.jsonl.gz --pool books=books.jsonl.gz --pool code=code.jsonl.gz \\
        --out runs/target --results rows.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from megaopus.evaluation.differences import compare_scores, read_scores
from megaopus.report.compare import load_run

ARMS = {"uniform": "selection=uniform", "opus": "selection=opus"}
SEQ_LEN, VOCAB, PROXY_TOKENS = 128, 4096, 300_000


def verb(*arguments: object) -> None:
    """Run one verb of the command line, its output shown."""
    subprocess.run([sys.executable, "-m", "megaopus", *map(str, arguments)], check=True)


def halves(items: Path, folder: Path) -> tuple[Path, Path]:
    """Write every other passage as items for the proxy; the others as the test, a folder for ``tasks.data``."""
    with gzip.open(items, "rt", encoding="utf-8") as lines:
        rows = [line for line in lines if line.strip()]
    searched, tests = folder / "searched.jsonl", folder / "items"
    tests.mkdir(parents=True, exist_ok=True)
    searched.write_text("".join(rows[::2]), encoding="utf-8")
    (tests / "lambada_openai_test.jsonl").write_text("".join(rows[1::2]), encoding="utf-8")
    return searched, tests


def data(args: argparse.Namespace) -> tuple[Path, Path]:
    """Make the corpus with its proxy, if it is not there yet; returns it, and the folder of the test's items."""
    searched, tests = halves(args.items, args.out)
    plain, corpus = args.out / "plain", args.out / "corpus"
    if not corpus.is_dir():
        sources = [word for source in args.pool for word in ("--source", source)]
        verb("prepare", *sources, "--vocab-size", VOCAB, "--seq-len", SEQ_LEN, "--out", plain, "--overwrite")
        given = ("--items", searched, "--item-fields", "text", "--tokens", PROXY_TOKENS)
        verb("proxy", "--corpus", plain, *given, "--drop-overlap", "--out", corpus)
    return corpus, tests


def main() -> None:
    """Train, report, and add the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--items", type=Path, required=True, metavar="FILE", help="passages, JSON lines with text, gzip"
    )
    parser.add_argument("--pool", action="append", required=True, metavar="DOMAIN=FILE", help="text, as prepare has it")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--limit", type=int, default=500, help="passages of a test (%(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="add the row to this file")
    args = parser.parse_args()
    corpus, tests = data(args)
    usual = ["experiment=small_opus", f"data.path={corpus}", f"train.steps={args.steps}", "tasks.suite=[lambada]"]
    usual += [f"tasks.data={tests}", f"tasks.limit={args.limit}", f"tasks.every={args.steps // 12}"]
    runs = {}
    for arm, selection in ARMS.items():
        runs[arm] = args.out / arm
        verb("train", *usual, selection, f"run_dir={runs[arm]}")
    verb("report", *runs.values(), "--out", args.out / "report.html")
    row = found(runs) | {"steps": args.steps, "test_passages": args.limit}
    Console().print_json(data=row)
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def found(runs: dict[str, Path]) -> dict[str, Any]:
    """Headline losses of both arms, and how the test's scores differ."""
    scores = {arm: read_scores(folder) for arm, folder in runs.items()}
    assert scores["uniform"] is not None
    assert scores["opus"] is not None
    differences, _ = compare_scores([scores["uniform"]], [scores["opus"]])
    last = {arm: load_run(folder).validations[-1] for arm, folder in runs.items()}
    return {
        "target_loss": {arm: each.loss for arm, each in last.items()},
        "target": {arm: dict(each.target) for arm, each in last.items()},
        "opus_less_uniform": {
            f"{each.task} {each.metric}": {
                "value": each.value,
                "items_stderr": each.items_stderr,
                "training_noise": None if each.noise is None else each.noise.std,
                "verdict": each.verdict(len(differences)).value,
            }
            for each in differences
        },
    }


if __name__ == "__main__":
    main()
