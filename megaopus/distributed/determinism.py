"""Has torch, cuBLAS and NCCL give the same bits whenever the same is computed again on the same devices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch.backends import cudnn

from megaopus.errors import ConfigError, Problem

VARIABLES: Mapping[str, Sequence[str]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # else what streams find free decides which kernel runs
    "NCCL_NVLS_ENABLE": ("0",),  # switches add up numbers as they arrive; rings and trees of GPUs have one order
}
"""Variable that a library reads once, when it begins -> values that make it repeat itself, the usual one first."""
_SETTING = "engine.deterministic"


def set_variables(has_begun: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Put ``VARIABLES`` where they are not set, for good: the libraries would not look again.

    ``has_begun``: whether this process has used CUDA already. Raises ConfigError, with nothing changed, for a value
    that is none of theirs, and for one that would come too late.
    """
    problems = []
    for name, values in VARIABLES.items():
        given, start = environment.get(name), f"start the program with {name}={values[0]}, or {_SETTING}=false"
        if given is None and has_begun:
            reason = f"{_SETTING}=true, but this process used CUDA before it was set"
            problems.append(Problem(f"environment {name}", given, reason, start))
        elif given is not None and given not in values:
            reason = f"{_SETTING}=true needs {' or '.join(values)}"
            problems.append(Problem(f"environment {name}", given, reason, f"unset it, for runs set it; or {start}"))
    if problems:
        raise ConfigError(problems)
    for name, values in VARIABLES.items():
        environment.setdefault(name, values[0])


@contextmanager
def deterministic_torch() -> Iterator[None]:
    """Let torch take, inside, only kernels that repeat themselves, and raise RuntimeError where it has none.

    Memory that nothing was written to stays as it is: nothing here reads it, and filling it costs a pass.
    """
    filled: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode()
    saved = filled.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    filled.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark = False, True, False
    try:
        yield
    finally:
        filled.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark = saved
        torch.use_deterministic_algorithms(before > 0, warn_only=before == 1)
