"""Reads what a launcher (torchrun, Slurm's script) tells each process of its place among the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megaopus.errors import ConfigError, Problem

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that every launcher sets; a process that was started alone has none of them."""
_ALSO = "LOCAL_WORLD_SIZE"
"""Most set it too."""
_ALONE = "for one process unset {}; for several start with torchrun or launch/torchrun.sh"


class Place(NamedTuple):
    """Says which of the job's processes this one is."""

    rank: int = 0
    local_rank: int = 0
    """Among those of its node: the number of its GPU."""
    world_size: int = 1
    launched: bool = False
    """Tells whether there is a rendezvous at MASTER_ADDR:MASTER_PORT."""


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read this process's place. Raises ConfigError where ``VARIABLES`` are there in part, or are no numbers."""
    given = {name: environment[name] for name in (*VARIABLES, _ALSO) if name in environment}
    if not given:
        return Place()
    if missing := [name for name in VARIABLES if name not in given]:
        left = " ".join(f"{name}={value}" for name, value in given.items())
        reason = f"left over, or {', '.join(missing)} missing: a launcher sets all of them"
        raise ConfigError([Problem("environment", left, reason, _ALONE.format(" ".join(given)))])
    if problems := list(_problems(given)):
        raise ConfigError(problems)
    return Place(int(given["RANK"]), int(given["LOCAL_RANK"]), int(given["WORLD_SIZE"]), launched=True)


def _problems(given: Mapping[str, str]) -> Iterator[Problem]:
    remedy = _ALONE.format(" ".join(given))
    for name, value in given.items():
        if name != "MASTER_ADDR" and not value.isdecimal():
            yield Problem(f"environment {name}", value, "is not a number", remedy)
    size = given["WORLD_SIZE"]
    for name in ("RANK", "LOCAL_RANK"):
        if given[name].isdecimal() and size.isdecimal() and int(given[name]) >= int(size):
            yield Problem(f"environment {name}", given[name], f"not below WORLD_SIZE = {size}", remedy)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Give the environment of a process that is to run alone."""
    return {name: value for name, value in environment.items() if name not in (*VARIABLES, _ALSO)}
