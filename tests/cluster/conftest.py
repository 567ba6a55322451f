"""The run that nothing disturbs, on two ranks of one node; the others must end as it does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.exact.resume_runs import OPTIMIZERS, SELECTIONS, everything, settings, train
from tests.pool import Pool

ROOT = Path(__file__).parents[2]
TORCHRUN = str(ROOT / "launch" / "torchrun.sh")
CHOSEN = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"], "train.steps=40", "train.eval_every=20"]
"""Forty updates, with a checkpoint every four."""
CUT_SECONDS = 30
"""How long a rank waits for another one here; the ranks of a busy machine may start that far apart."""


def overrides(corpus: Path, run_dir: Path) -> list[str]:
    return settings(corpus, run_dir, *CHOSEN, f"engine.timeout_minutes={CUT_SECONDS / 60}")


def environment() -> dict[str, str]:
    """Return what a launcher starts from: this python, one thread a rank."""
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def updates(run_dir: Path) -> int:
    """Updates that a run has recorded."""
    path = run_dir / "selection.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="session")
def straight(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    with Pool() as pool:
        assert pool.run(2, train, overrides(tiny_corpus, run_dir)) == [0, 0]
    return everything(run_dir)
