"""Files that outlive a power failure, the room that there is for them, and where the shipped ones are."""

from __future__ import annotations

import errno
import os
import shutil
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


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name first, so that it is there whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where ``path`` is, or would be if it were made."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def disk_full(error: BaseException | None, path: Path, needed: int | None, there: int = 0) -> str:
    """Say what was needed and what is free, for a message, where an error means that the disk of ``path`` is full.

    Empty for other errors. Some libraries have an error without a number for it, and what does not fit is taken for it.
    ``needed`` None: not known. ``there``: bytes that a try to write left, and that another would remove.
    """
    numbers, free = set(), free_bytes(path) + there
    while error is not None:
        numbers.add(getattr(error, "errno", None))
        error = error.__cause__ or error.__context__
    if numbers & {errno.ENOSPC, errno.EDQUOT} or (numbers == {None} and free < (needed or 0)):
        wanted = "" if needed is None else f"{needed:,} bytes are needed, "
        return f"; the disk is full: {wanted}{free:,} bytes are free"
    return ""
