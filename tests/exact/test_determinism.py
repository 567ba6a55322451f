"""engine.deterministic on a CPU: it trains and scores to the last bit as without it, and reads nothing unwritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megaopus.distributed import mesh
from megaopus.distributed.determinism import deterministic_torch
from tests.exact.resume_runs import OPTIMIZERS, SELECTIONS, assert_same, choices, everything, rows, settings, train

DROPOUT = "model.dropout=0.1"
COUNTSKETCH = [*SELECTIONS["countsketch"], *OPTIMIZERS["muon"], "selection.score_micro_batch_size=8", DROPOUT]
ZERO = [*SELECTIONS["odds"], "engine.name=deepspeed", DROPOUT]


@pytest.fixture
def with_it(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fill new memory with NaN while the setting is on, so that what reads it is seen; tells each time it was on."""
    found: list[bool] = []

    @contextmanager
    def filled() -> Iterator[None]:
        with deterministic_torch():
            torch.utils.deterministic.fill_uninitialized_memory = True
            found.append(torch.empty(3).isnan().all().item() is True)
            yield

    monkeypatch.setattr(mesh, "deterministic_torch", filled)
    return found


def test_a_cpu_computes_the_same(tiny_corpus: Path, tmp_path: Path, with_it: list[bool]) -> None:
    for name, more in (("without", []), ("with", ["engine.deterministic=true"])):
        assert train(settings(tiny_corpus, tmp_path / name, *COUNTSKETCH, *more)) == 0
    assert_same(everything(tmp_path / "with"), everything(tmp_path / "without"))
    assert with_it == [True]


def test_deepspeed_computes_the_same(tiny_corpus: Path, tmp_path: Path, with_it: list[bool]) -> None:
    for name, more in (("without", []), ("with", ["engine.deterministic=true"])):
        assert train(settings(tiny_corpus, tmp_path / name, *ZERO, *more)) == 0
    for file in ("metrics.jsonl", "selection.jsonl"):
        assert rows(tmp_path / "with" / file) == rows(tmp_path / "without" / file)
    assert choices(tmp_path / "with") == choices(tmp_path / "without")
    assert with_it == [True]
