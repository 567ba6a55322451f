"""Controls, windows and estimators through whole training runs: what they pick is on record in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exact.resume_runs import OPTIMIZERS, STEPS, assert_same, everything, settings, train

CHOICES = {
    "greats": ["selection=greats"],
    "low_ppl": ["selection=low_ppl"],
    "mid_ppl": ["selection=mid_ppl"],
    "domain_oracle": ["selection=domain_oracle"],
    "dsir": ["selection=dsir"],
    "importance": ["selection=importance", "selection.sampler=top_k"],
    "adjoint": ["selection=opus_exact", "selection.estimator=adjoint", "selection.layers=all"],
    "kronecker": ["selection=opus_exact", "selection.estimator=kronecker", "selection.sketch_dim=64"],
    "window": ["selection=opus_exact", "selection.score_length=8", "selection.score_window=random"],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_runs_pick_by_the_method_named(
    choice: str, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*CHOICES[choice], "selection.warmup_steps=2", "selection.rho=0.5"]
    overrides.append("selection.score_micro_batch_size=null")
    assert train(settings(tiny_corpus, tmp_path / "run", *overrides)) == 0
    said = capsys.readouterr().out
    assert said.count("scoring micro-batch 8 (takes ") == (choice not in ("dsir", "importance", "domain_oracle"))
    warnings = [line for line in said.splitlines() if "WARNING" in line]
    assert all("waits for data" in line for line in warnings), warnings  # a busy machine, nothing of the choice
    run = everything(tmp_path / "run")
    rows = run["selection"]
    own = ("greats", "low_ppl", "mid_ppl", "dsir", "importance", "domain_oracle")
    method = choice if choice in own else "opus"
    assert [row["method"] for row in rows] == ["uniform"] * 2 + [method] * (STEPS - 2)
    for row in rows[2:]:
        assert not row["events"]
        assert_consistent(choice, row, run["choices"][row["step"]])


def assert_consistent(choice: str, row: dict[str, Any], candidates: list[dict[str, Any]]) -> None:
    """The picks are those that the recorded utilities and domains call for."""
    utilities = torch.tensor([each["utility"] for each in candidates], dtype=torch.float64)
    assert utilities.std() > 0
    picked = torch.tensor([each["picked"] for each in candidates])
    if choice == "importance":  # which many have as much of as can be
        assert utilities[picked].min() >= utilities[~picked].max()
    elif choice != "greats":  # whose picks also lower each other's utility
        assert utilities[picked].min() > utilities[~picked].max()
    if choice == "domain_oracle":
        wanted = round(row["pool_share"]["docs"] * len(utilities))
        assert row["share"]["docs"] == pytest.approx(min(wanted, 4) / 4)


FALLS = ("predicted_fall", "uniform_fall", "realised_fall")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checking_predictions_changes_nothing_else(optimizer: str, tiny_corpus: Path, tmp_path: Path) -> None:
    """Picks, losses, weights and optimizer state to the last bit, dropout on; rows where a check was due."""
    common = ["selection=opus_exact", *OPTIMIZERS[optimizer], "selection.warmup_steps=2", "model.dropout=0.1"]
    runs = {}
    for every in (0, 3):
        overrides = settings(tiny_corpus, tmp_path / str(every), *common, f"selection.check_every={every}")
        assert train(overrides) == 0
        runs[every] = everything(tmp_path / str(every))
    falls = {every: [[row.pop(key) for key in FALLS] for row in run["selection"]] for every, run in runs.items()}
    assert_same(runs[3], runs[0])
    assert all(fall == [None] * 3 for fall in falls[0])
    assert [step for step, fall in enumerate(falls[3]) if None not in fall] == [3, 6, 9]
    for row, (predicted, uniform, _) in zip(runs[3]["selection"], falls[3], strict=True):
        if predicted is not None:
            candidates = runs[3]["choices"][row["step"]]
            picked = [each["utility"] for each in candidates if each["picked"]]
            assert predicted == pytest.approx(sum(picked) / len(picked))
            assert uniform == pytest.approx(sum(each["utility"] for each in candidates) / len(candidates))
            assert predicted > uniform


def test_plain_sgd_does_what_was_predicted(tiny_corpus: Path, tmp_path: Path) -> None:
    """Without momentum, decay, clipping and the average of proxy gradients, nothing but higher orders is left out."""
    plain = [f"optim.{key}=0" for key in ("settings.momentum", "weight_decay", "clip_grad")]
    check = [
        "selection=opus_exact",
        "selection.warmup_steps=0",
        "selection.proxy_half_life=0",
        "selection.check_every=1",
    ]
    overrides = settings(tiny_corpus, tmp_path, "optim=sgd", "optim.lr=0.001", *plain, *check)
    assert train(overrides) == 0
    rows = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    for row in rows:
        assert row["realised_fall"] == pytest.approx(row["predicted_fall"], rel=0.02)
