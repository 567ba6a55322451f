"""Says what a checkpoint consists of: the size and sha256 of each file, themselves vouched for by the mark COMPLETE.

They find damage, not malice: who can write a checkpoint can write its digests. What a file of somebody else's can do
when it is read is the matter of ``engine.saving``.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from pathlib import Path, PurePosixPath

from megaopus.distributed.mesh import Mesh
from megaopus.errors import CheckpointError

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
_PIECE = 1 << 22
_TELL_SECONDS = 5.0

Entry = tuple[int, str]
"""Bytes and sha256 (hexadecimal) of a file."""


def entry(path: Path) -> Entry:
    """Size and digest of a file that was just written; when this returns, it outlives a power failure."""
    with path.open("rb") as stream:
        found = hashlib.sha256()
        while piece := stream.read(_PIECE):
            found.update(piece)
        os.fsync(stream.fileno())
        return stream.tell(), found.hexdigest()


def manifest_text(files: dict[str, Entry]) -> str:
    """The content of manifest.json; names are relative to the checkpoint's folder."""
    rows = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    return json.dumps({"files": rows}, indent=1) + "\n"


def digest_of(text: str) -> str:
    """sha256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def verify(folder: Path, mesh: Mesh) -> str | None:
    """Return what is wrong with a complete checkpoint, naming each bad file; None: every byte is as it was written.

    Collective, the same answer on every rank: each reads its share of the files.
    """
    names: dict[str, Entry] | None = None
    problem = None
    if mesh.rank == 0:
        try:
            names = read_manifest(folder)
        except CheckpointError as error:
            problem = str(error)
    names, problem = mesh.broadcast_object((names, problem))
    if names is None:
        return problem
    ranks = mesh.gather_objects(_damaged(folder, names, mesh.rank, mesh.shape.world_size))
    return "; ".join(line for lines in ranks for line in lines) or None


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a checkpoint by name.

    Raises CheckpointError if the manifest is not the one that COMPLETE vouches for, or names a file outside.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        vouched = (folder / COMPLETE).read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        why = "missing (deleted, or written by a version without digests)"
        raise CheckpointError(f"{error.filename}: {why}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if hashlib.sha256(text).hexdigest() != vouched:
        raise CheckpointError(f"{path}: damaged, its sha256 is not the one in {COMPLETE}")
    try:
        files = {name: (int(row["bytes"]), str(row["sha256"])) for name, row in json.loads(text)["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a list of files ({error})") from error
    for name in files:
        if not _is_inside(name):
            raise CheckpointError(f"{path}: names {name!r}, which does not lie in the checkpoint")
    return files


def _is_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and str(pure) == name


def _damaged(folder: Path, files: dict[str, Entry], rank: int, ranks: int) -> list[str]:
    """A line for each bad file of this rank's share, the first in order of name of every ``ranks``."""
    names = sorted(files)[rank::ranks]
    total = sum(files[name][0] for name in names)
    lines, done, told = [], 0, time.monotonic()
    for name in names:
        if line := _file_problem(folder / name, *files[name]):
            lines.append(line)
        done += files[name][0]
        if rank == 0 and time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            print(f"checking {folder}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)
    return lines


def _file_problem(path: Path, size: int, digest: str) -> str | None:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path}: a link or device, not a file"
        if found.st_size != size:
            return f"{path}: has {found.st_size} bytes, {size} were written"
        if entry(path)[1] != digest:
            return f"{path}: damaged, its sha256 is not the one written"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None
