"""Show runs on one page, or make their picks again from the record."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaopus.cli._paths import local_path
from megaopus.errors import DataError
from megaopus.plugins import notes_on_missing

if TYPE_CHECKING:
    from megaopus.report.sections import Texts

DESCRIPTION = "Write a self-contained HTML page from run folders: losses, what was picked, and what it cost."
EXAMPLES = (
    "  python -m megaopus report runs/uniform runs/opus --out report.html\n"
    "  python -m megaopus report runs/opus --replay 120,480"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folders, and what to make of them."""
    parser.add_argument(
        "runs", nargs="+", type=local_path, metavar="RUN_DIR", help="run folders; the uniform one is the baseline"
    )
    parser.add_argument(
        "--out", type=local_path, metavar="FILE.html", help="page to write (default: report.html beside the runs)"
    )
    parser.add_argument(
        "--start-step",
        type=int,
        metavar="N",
        help="compare after N updates, the warm-up that all runs share (default: where the last of them begins)",
    )
    parser.add_argument(
        "--replay",
        metavar="STEP[,STEP...]",
        help="instead of a page: make the picks of these steps (or all) again from the record of one run, and say "
        "whether they are the same; exit status 1 if not, 3 if some step's record is not enough",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, or replay steps; returns 0, or what the replay found."""
    from megaopus.report import replay

    if args.replay is not None:
        if args.out or args.start_step is not None:
            raise argparse.ArgumentError(None, "--replay writes no page: leave --out and --start-step out")
        return replay.run(args.runs, args.replay)
    return write_page(args, replay.texts_of)


def closing(args: argparse.Namespace) -> str:
    """Say what to do with the page; a replay has told its own result."""
    return "" if args.replay is not None else "next: open the page in a browser; it needs no network"


def write_page(args: argparse.Namespace, texts: Texts | None = None) -> int:
    """Write the page. Raises DataError before anything is written if a run folder cannot be read."""
    from megaopus.report.compare import load_run
    from megaopus.report.page import write_report
    from megaopus.report.target import headline_of

    paths = [Path(path) for path in args.runs]
    if args.start_step is not None and args.start_step < 0:
        raise DataError(f"--start-step {args.start_step}: must not be negative")
    runs = {name: load_run(path, name) for name, path in zip(_names(paths), paths, strict=True)}
    for each in runs.values():
        for note in notes_on_missing(map(str, each.config.get("plugins") or ()), each.path):
            print(f"note: {note}")
    resolved = [path.resolve() for path in paths]
    out = Path(args.out) if args.out else Path(os.path.commonpath(resolved)) / "report.html"
    print(f"target: {headline_of(runs).target.told}")
    print(f"wrote {write_report(runs, out, start_step=args.start_step, texts=texts)}")
    return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """Find the shortest path endings that tell the folders apart. Raises DataError for a folder named twice."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise DataError("a run folder is named twice; name each once")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
