"""A folder that appears under its name only when it is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from megaopus.errors import DataError, StoreDownError
from megaopus.fs import disk_full, sync

_REFUSED = "cannot be written"


class StoppedError(DataError):
    """Work ended by what is no fault of its input; what is finished is kept for another try."""


def refuse_existing(out: Path, overwrite: bool, marker: str, kind: str = "corpus") -> None:
    """Raise unless ``out`` is free: missing, an empty folder, or a finished one (it has ``marker``) to overwrite.

    A folder that a kill in the middle of an overwrite left under its other name gets its name back first. ``kind``:
    what it is called in messages.

    Raises:
        DataError: ``out`` holds something that must not be replaced.
    """
    _, old = _siblings(out)
    if old.exists() and not out.exists():
        old.rename(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / marker).is_file():
        raise DataError(f"{out}: exists and is not a {kind} (no {marker}); choose another folder, nothing was written")
    if not overwrite:
        raise DataError(f"{out}: already holds a {kind}; use it as it is, choose another folder, or give --overwrite")


@contextmanager
def new_folder(out: Path, console: Console) -> Iterator[Path]:
    """Yield a temporary sibling of ``out``; renamed to ``out`` at the end, removed when anything fails.

    What a killed run left behind is removed with a line. The folder is locked, so two runs cannot share it.

    Raises:
        DataError: another run is writing ``out``, or the file system refuses.
    """
    partial, old = _siblings(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (partial, old):
            if leftover.exists():
                os.close(_locked(leftover, out))
                shutil.rmtree(leftover)
                line = f"removed {leftover}, left by a run that was killed"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        partial.mkdir()
        lock = _locked(partial, out)
        try:
            yield partial
            for path in partial.rglob("*"):
                sync(path)
            if out.exists():
                out.rename(old)
            partial.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    except OSError as error:
        raise _unwritable(out, error) from error


@contextmanager
def work_folder(out: Path, plan: str, console: Console) -> Iterator[Path]:
    """Yield a hidden sibling of ``out`` for what a killed run should find again; it is locked, and removed in the end.

    What is there from a run of another ``plan`` is removed first; from one of the same plan it is kept, with a line. It
    stays if this process is killed or interrupted, or the work raises StoppedError or StoreDownError.

    Raises:
        DataError: another run is writing ``out``, or the file system refuses.
    """
    work = out.with_name(f".{out.name}.work")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        lock = _locked(work, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        known = work / "plan.json"
        if known.is_file() and known.read_text(encoding="utf-8") == plan:
            line = f"going on from what a run that was stopped left in {work}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            known.write_text(plan, encoding="utf-8")
        for partial in work.glob("*.partial"):
            partial.unlink()
        yield work
        shutil.rmtree(work)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise _unwritable(out, error) from error
    except (StoppedError, StoreDownError):
        raise
    except Exception:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def where_else(out: Path, remedy: str) -> Iterator[None]:
    """Add where else ``out`` may lie to the error that the file system refuses it."""
    try:
        yield
    except DataError as error:
        if str(error).startswith(f"{out}: {_REFUSED}"):
            raise DataError(f"{error}; {remedy}") from error.__cause__
        raise


def _unwritable(out: Path, error: OSError) -> DataError:
    return DataError(f"{out}: {_REFUSED} ({error}{disk_full(error, out, None)}); nothing was left behind")


def _siblings(out: Path) -> tuple[Path, Path]:
    """Return where a new folder grows, and where the old one waits during an overwrite."""
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")


def _locked(folder: Path, out: Path) -> int:
    """An open, locked descriptor of ``folder``; the lock goes with the process, so a kill frees it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"{out}: another process is writing it now; wait for it, then use it") from None
    return descriptor
