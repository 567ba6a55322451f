"""Train a model; under torchrun on many ranks."""

from __future__ import annotations

import argparse

from megaopus.cli._settings import add_settings, composed
from megaopus.distributed.launcher import place

DESCRIPTION = (
    "Pre-train a GPT, choosing each batch as selection= says. The same command goes on where a killed run stopped."
)
EXAMPLES = (
    "  python -m megaopus train experiment=small_opus data.path=corpus 'data.target_domains=[docs]'\n"
    "  torchrun --nproc-per-node 4 -m megaopus train data.path=corpus parallel=tp2_pp2\n"
    "  python -m megaopus train --config-dir my_configs experiment=mine run_dir=runs/mine"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the run."""
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Train as the settings say; returns 0, or 143 after a request to stop."""
    config = composed(args, place().world_size)
    from megaopus import build  # which takes seconds, and mistakes are told at once

    return build.train(config)
