"""Command line: python -m megaopus VERB. Each verb imports what it needs only when it runs, so help comes at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megaopus import __version__
from megaopus.errors import ConfigError, MegaopusError, Problem

if TYPE_CHECKING:
    from megaopus.config.run_config import RunConfig

GRACE_SECONDS = 5.0
"""How long a silent rank outlives an error: torchrun kills the others as soon as one exits, even amid its message."""
OVERRIDES = (
    "settings in Hydra's syntax: GROUP=NAME picks a file of configs/GROUP/, SECTION.KEY=VALUE sets one value; "
    "'python -m megaopus settings' lists them all"
)


def _parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m megaopus {verb}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _composed(args: argparse.Namespace, world_size: int | None) -> RunConfig:
    """The settings that a command line gives; who uses an old name is told the new one."""
    from megaopus.config.aliases import notes
    from megaopus.config.compose import compose

    _tell(notes(args.overrides))
    config = compose(args.overrides, args.config_dir, world_size)
    _tell(notes([], config.resume_allow))
    return config


def _tell(notes: list[str]) -> None:
    for note in notes if _speaks() else []:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
    parser.add_argument("--config-dir", type=Path, metavar="FOLDER", help="more choices, beside the shipped configs")


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        reason, remedy = "is not a number of processes", "unset it, or start with torchrun"
        raise ConfigError([Problem(f"environment {name}", text, reason, remedy)])
    return int(text)


def train(arguments: list[str]) -> int:
    """Train a model; under torchrun on many ranks."""
    parser = _parser(
        "train",
        "Pre-train a GPT, choosing each batch as selection= says. The same command goes on where a killed run stopped.",
        "  python -m megaopus train experiment=small_opus data.path=corpus 'data.target_domains=[docs]'\n"
        "  torchrun --nproc-per-node 4 -m megaopus train data.path=corpus parallel=tp2_pp2\n"
        "  python -m megaopus train --config-dir my_configs experiment=mine run_dir=runs/mine",
    )
    _add_settings(parser)
    args = parser.parse_intermixed_args(arguments)
    config = _composed(args, _environment("WORLD_SIZE", 1))
    from megaopus import build

    return build.train(config)


def check(arguments: list[str]) -> int:
    """Show what a run would be, without training."""
    parser = _parser(
        "check",
        "Compose and validate the settings of a run, open its data, and print layout, parameters, FLOPs, memory and\n"
        "the launch command. Needs no GPU and writes nothing.",
        "  python -m megaopus check experiment=small_opus data.path=corpus\n"
        "  python -m megaopus check model=gpt2_xl parallel=tp2 data.path=corpus --world-size 8",
    )
    _add_settings(parser)
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks to lay the run out on (default: tp x cp x pp)"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.world_size is not None and args.world_size < 1:
        parser.error("--world-size must be at least 1")
    config = _composed(args, args.world_size)
    from megaopus import check as checker

    checker.run(config, args.world_size, args.overrides, args.config_dir)
    return 0


def settings(arguments: list[str]) -> int:
    """List every setting: type, default, range, meaning."""
    parser = _parser(
        "settings",
        "List settings with type, default, range or choices, whether they may change on resume, and what they mean.",
        "  python -m megaopus settings\n"
        "  python -m megaopus settings selection.guards\n"
        "  python -m megaopus settings schedule",
    )
    from megaopus.cli import settings as lister

    lister.add_arguments(parser)
    lister.run(parser.parse_args(arguments))
    return 0


def prepare(arguments: list[str]) -> int:
    """Turn text into a corpus that runs can read."""
    parser = _parser(
        "prepare",
        "Make a corpus folder: tokenizer, tokens, a table of documents and a manifest.",
        "  python -m megaopus prepare --source docs=docs.jsonl.gz --source code=sources.jsonl --out corpus\n"
        "  python -m megaopus prepare --data tinystories --out corpus\n"
        "  python -m megaopus prepare --demo --out corpus",
    )
    from megaopus.corpus_tools import prepare as preparer

    preparer.add_arguments(parser)
    parser.add_argument("--config-dir", type=Path, metavar="FOLDER", help="more choices for --data, beside the shipped")
    args = parser.parse_args(arguments)
    settings = None
    if args.data:
        from megaopus.config.compose import data_settings

        settings = data_settings(args.data, args.config_dir).prepare
    preparer.run(args, settings)
    return 0


def proxy(arguments: list[str]) -> int:
    """Make the documents nearest to benchmark items a corpus's proxy."""
    parser = _parser(
        "proxy",
        "Write a corpus anew with another proxy: the documents nearest to benchmark items, which leave its pool.",
        "  python -m megaopus proxy --corpus corpus --items arc_easy.jsonl --tokens 300000 --out corpus_arc",
    )
    from megaopus.corpus_tools import benchmark_proxy

    benchmark_proxy.add_arguments(parser)
    benchmark_proxy.run(parser.parse_args(arguments))
    return 0


def score(arguments: list[str]) -> int:
    """Give every document of a corpus a score to filter by."""
    parser = _parser(
        "score",
        "Write one score for each document of a corpus into a column beside it; data.filter keeps documents by it.",
        "  python -m megaopus score --corpus corpus --method dsir\n"
        "  python -m megaopus score --corpus corpus --method utility --checkpoint runs/first --name useful\n"
        "  python -m megaopus score --corpus corpus --method classifier --model HuggingFaceFW/fineweb-edu-classifier",
    )
    from megaopus.score import verb as scorer

    scorer.add_arguments(parser)
    scorer.run(parser.parse_args(arguments))
    return 0


def report(arguments: list[str]) -> int:
    """Show runs on one page, or make their picks again from the record."""
    parser = _parser(
        "report",
        "Write a self-contained HTML page from run folders: losses, what was picked, and what it cost.",
        "  python -m megaopus report runs/uniform runs/opus --out report.html\n"
        "  python -m megaopus report runs/opus --replay 120,480",
    )
    from megaopus.report import page as reporter

    reporter.add_arguments(parser)
    args = parser.parse_args(arguments)
    from megaopus.report import replay

    if args.replay is not None:
        if args.out or args.start_step is not None:
            parser.error("--replay writes no page: leave --out and --start-step out")
        return replay.run(args.runs, args.replay)
    reporter.run(args, replay.texts_of)
    return 0


def demo(arguments: list[str]) -> int:
    """Uniform against selected batches on real text, in minutes."""
    parser = _parser(
        "demo",
        "Train a small GPT twice on text found in this Python installation, with and without selection, and compare.",
        "  python -m megaopus demo",
    )
    from megaopus import demo as demonstration

    demonstration.add_arguments(parser)
    demonstration.run(parser.parse_args(arguments))
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    verb.__name__: verb for verb in (train, check, settings, prepare, proxy, score, report, demo)
}


def _verb(arguments: list[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    verbs = "\n".join(f"  {name:<10}{(verb.__doc__ or '').strip()}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m megaopus",
        description="Distributed GPT pre-training with online data selection.",
        epilog=f"verbs:\n{verbs}\n\n'python -m megaopus VERB --help' explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megaopus {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the verb")
    args = parser.parse_args(arguments)
    return VERBS[args.verb], args.arguments


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns its exit code, or 2 for an error the user can act on."""
    verb, rest = _verb(sys.argv[1:] if arguments is None else arguments)
    try:
        return verb(rest)
    except MegaopusError as error:
        if os.environ.get("MEGAOPUS_TRACEBACK") == "1":
            raise
        if isinstance(error, ConfigError) and not _speaks():
            time.sleep(GRACE_SECONDS)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _speaks() -> bool:
    """Whether this rank reports what every rank of its node has found: once per node, for a file may lack on one."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


if __name__ == "__main__":
    sys.exit(main())
