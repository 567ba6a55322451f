"""Runs one verb of the command line: each file beside this one without an underscore before its name is one.

A verb's file has a docstring, whose first line the list of verbs shows, ``DESCRIPTION``, ``EXAMPLES``,
``add_arguments(parser)`` and ``run(args)``, which returns the exit code (None: 0); where it has ``closing(args)``, that
is its last line: where the result lies, and what comes next. What takes time to import it imports
in ``run``, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from megaopus import __version__, cli
from megaopus.cli._notes import speaks
from megaopus.errors import ConfigError, MegaopusError
from megaopus.record.formatting import format_duration
from megaopus.record.quiet import quiet, quiet_output
from megaopus.training.signals import INTERRUPT_EXIT_CODE

GRACE_SECONDS = 5.0
"""How long a silent rank outlives an error: torchrun kills the others as soon as one exits, even amid its message."""


def verbs() -> list[str]:
    """List the names of all verbs."""
    names = (module.name for module in pkgutil.iter_modules(cli.__path__))
    return sorted(name for name in names if name != "main" and not name.startswith("_"))


def verb_module(name: str) -> ModuleType:
    """Import the file of a verb."""
    return importlib.import_module(f"{cli.__name__}.{name}")


def verb_parser(name: str) -> argparse.ArgumentParser:
    """Make the parser of a verb's arguments."""
    verb = verb_module(name)
    parser = argparse.ArgumentParser(
        prog=f"python -m megaopus {name}",
        description=verb.DESCRIPTION,
        epilog=f"examples:\n{verb.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code, 2 for an error the user can act on, 130 after Ctrl-C."""
    name, rest = _verb(sys.argv[1:] if arguments is None else arguments)
    parser = verb_parser(name)
    args = parser.parse_intermixed_args(rest)
    try:
        with quiet_output():
            return _run(verb_module(name), args)
    except KeyboardInterrupt:
        if speaks():
            print(f"\n{name}: stopped by Ctrl-C", file=quiet(sys.stderr), flush=True)
        return INTERRUPT_EXIT_CODE
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except MegaopusError as error:
        if os.environ.get("MEGAOPUS_TRACEBACK") == "1":
            raise
        if isinstance(error, ConfigError) and not speaks():
            time.sleep(GRACE_SECONDS)
        else:
            print(f"error: {error}", file=quiet(sys.stderr), flush=True)
        return 2


def _run(verb: ModuleType, args: argparse.Namespace) -> int:
    """Run a verb; where it has ``closing(args)`` its last line is that, after how long it took."""
    began = time.monotonic()
    status = verb.run(args) or 0
    if not status and hasattr(verb, "closing") and (last := verb.closing(args)) and speaks():
        print(f"done in {format_duration(time.monotonic() - began)} | {last}", flush=True)
    return status


def _verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the verb from its arguments; ends the process for help, the version, or an unknown verb."""
    names = verbs()
    parser = argparse.ArgumentParser(
        prog="python -m megaopus",
        description="Distributed GPT pre-training with online data selection.",
        epilog="'python -m megaopus VERB --help' explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megaopus {__version__}")
    parser.add_argument("verb", choices=names, metavar="VERB", help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the verb")
    if arguments and arguments[0].startswith("-"):  # every file is imported for the list alone
        summaries = {name: (verb_module(name).__doc__ or "").splitlines()[0] for name in names}
        listed = "\n".join(f"  {name:<9}{text}" for name, text in summaries.items())
        parser.epilog = f"verbs:\n{listed}\n\n{parser.epilog}"
    args = parser.parse_args(arguments)
    return args.verb, args.arguments
