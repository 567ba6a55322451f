"""Gives verbs about a run their arguments, and composes the settings that these name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megaopus.cli._notes import tell
from megaopus.cli._paths import local_path

if TYPE_CHECKING:
    from megaopus.config.run_config import RunConfig

OVERRIDES = (
    "settings in Hydra's syntax: GROUP=NAME picks a file of configs/GROUP/, SECTION.KEY=VALUE sets one value; "
    "'python -m megaopus settings' lists them all"
)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a run to the arguments of a verb, as ``overrides`` and ``config_dir``."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
    parser.add_argument("--config-dir", type=local_path, metavar="FOLDER", help="more choices, beside the shipped")


def composed(args: argparse.Namespace, world_size: int | None, *, corpora: bool = True) -> RunConfig:
    """Compose the settings that a command line names, for ``world_size`` ranks; tells who uses an old name the new one.

    ``corpora``: as of ``compose``. Raises ConfigError.
    """
    from megaopus.config.aliases import notes
    from megaopus.config.compose import compose

    tell(notes(args.overrides))
    config = compose(args.overrides, args.config_dir, world_size, corpora=corpora)
    tell(notes([], config.resume_allow))
    return config
