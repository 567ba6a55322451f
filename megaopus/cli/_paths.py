"""Takes paths from the command line by the rule of path settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaopus.settings import address_refusal


def local_path(text: str) -> Path:
    """Read an argument that names a file or folder of this machine; refused if it is an address such as s3://."""
    return Path(local_name(text))


def local_name(text: str) -> str:
    """Read an argument that names a file or folder, or by a plain name something else; refused as by local_path."""
    if found := address_refusal(text):
        raise argparse.ArgumentTypeError(f"{text} {found[0]}: {found[1]}")
    return text
