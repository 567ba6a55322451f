"""update_share.py, checkpoint_shares.py and pressure.py at toy size: their figures against what must come out."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import checkpoint_shares, pressure, real_reach, study, update_share
from benchmarks.fake_cuda import roofline
from benchmarks.gpu_shapes import Case
from megaopus.models.config import ModelConfig
from megaopus.models.flops import count_parameters
from megaopus.report.compare import load_run
from megaopus.selection.methods.registry import METHODS
from megaopus.selection.samplers.registry import SAMPLERS
from tests.exact.resume_runs import choices
from tests.pool import Pool

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="fake tensors need g++")

# -- update_share ------------------------------------------------------------------------------------------------------

WIDE = {"num_layers": 2, "hidden_size": 1024, "num_heads": 16}
CASE = Case(model=WIDE, vocab_size=8192, seq_len=64, micro=1, micro_batches=1)
WEIGHTS = count_parameters(ModelConfig(**WIDE), 8192, 64)


def _updates() -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    update_share.CASES = {"wide": CASE}
    given = [("adamw", 1, 1), ("adamw", 1, 4), ("muon", 2, 1)]
    return [update_share.measure("wide", *each) for each in given]


@needs_compiler
def test_an_update_is_told_from_the_passes_before_it(pool: Pool) -> None:
    adamw, longer, muon = pool.run(1, _updates)[0]
    # gradients are read, moments and fp32 weights read and written, weights written: 4 + 8 + 8 + 4 + 4 + 2 bytes
    least = 1e3 * 30 * WEIGHTS / roofline.MEMORY_BYTES
    assert least <= adamw["update_ms"] <= 2 * least
    assert (longer["update_ms"], longer["update_launches"]) == (adamw["update_ms"], adamw["update_launches"])
    passes = [row["step_ms"] - row["update_ms"] for row in (adamw, longer)]
    assert passes[1] == pytest.approx(4 * passes[0], rel=0.25)
    assert longer["share"] == pytest.approx(longer["update_ms"] / longer["step_ms"], rel=0.1)
    # each rank has half of the eight matrices of the blocks, and tells the other of them
    assert muon["messages"] == {"broadcast data_parallel_group_with_cp/2": 8}
    assert muon["update_ms"] > 2 * adamw["update_ms"]
    assert adamw["messages"] == {}


# -- checkpoint_shares -------------------------------------------------------------------------------------------------

SMALL = ModelConfig(num_layers=2, hidden_size=128, num_heads=4)


def _saved(folder: Path, sharded: bool) -> dict[str, Any]:
    checkpoint_shares.MODEL, checkpoint_shares.VOCAB, checkpoint_shares.SEQ_LEN = SMALL, 8192, 16
    warnings.simplefilter("ignore")
    return checkpoint_shares.measure(folder, sharded)


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_write_a_share_each_of_a_checkpoint(pool: Pool, tmp_path: Path, sharded: bool) -> None:
    found = pool.run(2, _saved, tmp_path, sharded)[0]
    whole = 12 * count_parameters(SMALL, 8192, 16) / 1e6  # fp32 weights and moments
    assert sum(found["file_mb"]) == pytest.approx(whole, rel=0.05)
    assert max(found["file_mb"]) < 0.6 * whole
    held = 16 * count_parameters(SMALL, 8192, 16) / 1e6  # with gradients
    assert max(found["held_mb"]) == pytest.approx(held * (0.75 if sharded else 1), rel=0.1)


def _counted() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    from benchmarks import gpu_shapes

    gpu_shapes.CASES = {"wide": CASE}
    return checkpoint_shares.counted("wide", 8)


@needs_compiler
def test_a_large_job_s_shares_add_up(pool: Pool) -> None:
    found = pool.run(1, _counted)[0]
    whole = 14 * WEIGHTS / 1e9
    assert found["whole_gb"] == pytest.approx(whole, rel=0.01)
    assert found["least_gb"] <= whole / 8 <= found["most_gb"]
    assert (found["layout"], found["ranks"]) == ("tp1 pp1 dp x cp 8", 8)


# -- pressure ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def registers() -> Iterator[None]:
    """Forget after a test what a plugin registered in this process."""
    before = {each: each.names() for each in (SAMPLERS, METHODS)}
    yield
    for registry, names in before.items():
        for name in set(registry.names()) - set(names):
            registry.remove(name)


TOY = [
    "data.seq_len=16",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=4",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.eval_sequences=4",
]


def test_an_arm_changes_its_pressure_at_half_of_the_updates(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registers: None
) -> None:
    def here(overrides: list[str], folder: Path, threads: int) -> Any:
        return study.trained([*overrides, *TOY], folder, threads, study.verb_here)

    monkeypatch.setattr(pressure, "trained", here)
    monkeypatch.setattr(pressure, "WANTED", "docs")
    row = pressure.run("narrowing", 1, pressure.Plan(4, (1,)), tiny_corpus, tmp_path)
    run = load_run(tmp_path / "narrowing_1")
    assert [each.method for each in run.selections] == 2 * ["importance"] + 2 * ["pressure_narrow"]
    assert row["final_loss"] == run.validations[-1].loss > 0
    assert (row["steps"], len(run.steps)) == (4, 4)
    for step, rows in choices(run.path).items():
        utilities = [each["utility"] for each in rows]
        assert len(utilities) == 64
        assert utilities.count(min(utilities)) == (48 if step >= 2 else 1)
        assert all(each["utility"] > min(utilities) for each in rows if each["picked"])


def _drawn_otherwise() -> int:
    from benchmarks import pressure_arms  # which registers itself, for this process

    utilities, ids = torch.linspace(0, 1, 64, dtype=torch.float64), torch.arange(64)
    best = SAMPLERS.find("top_k").draw(utilities, ids, 1.0, 0)
    drawn = [pressure_arms.sampled_now_and_then(utilities, ids, 1.0, key) for key in range(400)]
    return sum(not torch.equal(each, best) for each in drawn)


def test_the_placebo_draws_in_half_of_the_steps(pool: Pool) -> None:
    (others,) = pool.run(1, _drawn_otherwise)
    assert 160 < others < 240


def test_arms_are_held_against_what_they_are_to_beat() -> None:
    losses = {
        "uniform": (3.0, 3.2),
        "opus": (2.5, 2.7),
        "rising": (2.4, 2.5),
        "wide": (2.6, 2.8),
        "widening": (2.65, 2.85),
    }
    rows = [
        {"arm": arm, "seed": seed, "final_loss": loss}
        for arm, each in losses.items()
        for seed, loss in enumerate(each, 1)
    ]
    told = io.StringIO()
    pressure.show(rows, Console(file=told, width=120))
    lines = {line.split()[0]: line.split() for line in told.getvalue().splitlines() if line.strip()}
    assert lines["rising"][1:6] == ["2", "2.4500", "0.0707", "opus", "-0.1500"]
    assert lines["opus"][4:6] == ["uniform", "-0.5000"]
    assert lines["widening"][4:6] == ["wide", "+0.0500"]
    assert float(lines["rising"][6]) == pytest.approx(0.205, abs=1e-3)  # Student's t of -0.1 and -0.2: 3, one degree


def test_how_far_a_weighing_of_signals_could_go() -> None:
    """A utility that knows all goes to the end of the way, one that knows nothing no further than importance."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, real_reach.FEWER, generator=generator, dtype=torch.float64)
    known = torch.tensor([[2.0], [1.0], [0.0]]).double() + noise / 2

    def reached(utility: torch.Tensor, narrowed: int = 64) -> float:
        share, worth = np.array([0.1, 0.3, 0.6]), np.array([0.3, 0.2, 0.1])
        kinds = ["books", "code", "french"]
        scored = real_reach.Scored(kinds, share, worth, noise, utility, {64: noise})
        end = real_reach.best_worth(scored, 64)
        start, _ = real_reach.picked(scored, narrowed, 64, torch.tensor([1.0, 0.0, 0.0, 0.0]).double())
        found, _ = real_reach.picked(scored, narrowed, 64, torch.tensor([0.0, 1.0, 0.0, 0.0]).double())
        fitted, wanted = real_reach.picked(scored, narrowed, 64, None)
        assert fitted >= found - 0.02
        assert wanted > 0.1
        return (found - start) / (end - start)

    assert reached(known) == pytest.approx(1)
    assert abs(reached(noise)) < 1e-9
    assert 0 < reached(known, 16) < 0.9  # importance leaves too little
