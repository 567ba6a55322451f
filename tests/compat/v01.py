"""Holds what the tests of this folder share: the frozen files of version 0.1, and a place to use them in.

``tests/fixtures/v01`` was made by the code of commit 9551056 (``tests/fixtures/make_v01.py``) and is never made anew: a
change that it does not pass takes something away from users.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from megaopus.__main__ import main
from megaopus.distributed.launcher import without_launcher

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v01"


def frozen(name: str) -> Any:
    """One of the fixture's JSON files."""
    return json.loads((FIXTURE / name).read_text(encoding="utf-8"))


EXPECTED = frozen("expected.json")
"""Run -> what it does when nothing stops it."""


MOVED = {"checkpoint.every": (0, "15m")}
"""Setting -> its default in version 0.1 and now; such a change is told when a run of then goes on."""
TOLD_OF_MOVED = ", ".join(f"{key} {then!r} -> {now!r}" for key, (then, now) in MOVED.items())


def copied(folder: Path, *runs: str) -> Path:
    """Copy the fixture's corpus, with what lies beside it, and some of its runs into ``folder``, which it returns."""
    for place in FIXTURE.glob("corpus*"):
        shutil.copytree(place, folder / place.name)
    for name in runs:
        shutil.copytree(FIXTURE / "runs" / name, folder / "runs" / name)
    return folder


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in ``folder``, as a process alone, without what torchrun sets."""
    with chdir(folder), mock.patch.dict(os.environ, without_launcher(os.environ), clear=True):
        yield


def command(run: str) -> list[str]:
    """The arguments of ``python -m megaopus`` in the run's launch.sh."""
    *_, line = (FIXTURE / "runs" / run / "launch.sh").read_text().splitlines()
    python, dash_m, package, *arguments = shlex.split(line)
    assert (python, dash_m, package, arguments[0]) == ("python", "-m", "megaopus", "train")
    return arguments


def megaopus(folder: Path, *arguments: str) -> int:
    """Run one verb in ``folder``, in this process; returns its exit status."""
    with inside(folder):
        return main(list(arguments))


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
