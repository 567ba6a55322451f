"""Tells a person at the command line what one rank has to say for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from megaopus.distributed.launcher import VARIABLES


def speaks() -> bool:
    """Say whether this rank reports what all of its node have found: once per node, for a file may lack on one."""
    alone = any(name not in os.environ for name in VARIABLES)  # or with what a launcher left over: it says so itself
    return alone or os.environ["LOCAL_RANK"] == "0"


def tell(notes: Iterable[str]) -> None:
    """Print notes beside the output of a verb, once per node."""
    for note in notes if speaks() else ():
        print(f"note: {note}", file=sys.stderr, flush=True)
