"""Programs of Slurm that run an array in this process's machine, one task after the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def program(path: Path, text: str) -> None:
    """Write a script of bash that can be called."""
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def arrays_here(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Put the programs in ``folder``, which comes first in PATH; ``asked`` in it tells what sbatch was asked."""
    folder.mkdir()
    programs = {
        "sbatch": f"""
script="${{@: -1}}"; cp "$script" {folder}/script; echo "$@" >> {folder}/asked
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here RUN_OFFSET=0 bash "$script" >> {folder}/output 2>&1 || true
done
echo Submitted batch job 7""",
        "squeue": "true",
        "scontrol": 'echo "$3"',
        "srun": 'while [ "$1" != launch_pickled_pipeline ]; do shift; done; exec "$@"',
    }
    for name, text in programs.items():
        program(folder / name, text)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setattr("megaopus.corpus_tools.tasks.engines.POLL_SECONDS", 0.01)
    return folder
