"""Tells a person at the command line what one rank has to say for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


def speaks() -> bool:
    """Say whether this rank reports what all of its node have found: once per node, for a file may lack on one."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def tell(notes: Iterable[str]) -> None:
    """Print notes beside the output of a verb, once per node."""
    for note in notes if speaks() else ():
        print(f"note: {note}", file=sys.stderr, flush=True)
