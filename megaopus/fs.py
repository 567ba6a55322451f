"""Files that outlive a power failure, and where the shipped ones are."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_configs() -> Path | None:
    """Find the shipped configs: beside the package in a checkout, inside it when installed; None if neither."""
    folders = (PACKAGE.parent / "configs", PACKAGE / "configs")
    return next((folder for folder in folders if (folder / "run.yaml").is_file()), None)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
