"""Gives verbs about a run their arguments: its settings, and folders of more choices."""

from __future__ import annotations

import argparse
from pathlib import Path

OVERRIDES = "settings in Hydra's syntax: GROUP=NAME picks a file of configs/GROUP/, SECTION.KEY=VALUE sets one value"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a run to the arguments of a verb, as ``overrides`` and ``config_dir``."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
    parser.add_argument("--config-dir", type=Path, metavar="FOLDER", help="more choices, beside the shipped configs")
