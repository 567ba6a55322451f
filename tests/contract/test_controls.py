"""Controls, windows and estimators through whole training runs: what they pick is on record in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exact.resume_runs import STEPS, settings, train

CHOICES = {
    "greats": ["selection=greats"],
    "low_ppl": ["selection=low_ppl"],
    "mid_ppl": ["selection=mid_ppl"],
    "domain_oracle": ["selection=domain_oracle"],
    "adjoint": ["selection=opus", "selection.estimator=adjoint", "selection.layers=all"],
    "kronecker": ["selection=opus", "selection.estimator=kronecker", "selection.sketch_dim=64"],
    "window": ["selection=opus", "selection.score_length=8", "selection.score_window=random"],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_runs_pick_by_the_method_named(
    choice: str, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*CHOICES[choice], "selection.warmup_steps=2", "selection.rho=0.5"]
    assert train(settings(tiny_corpus, tmp_path / "run", *overrides)) == 0
    said = capsys.readouterr().out
    assert said.count("scoring micro-batch 8 (takes ") == (choice != "domain_oracle")
    assert "WARNING" not in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "selection.jsonl").read_text().splitlines()]
    method = choice if choice in ("greats", "low_ppl", "mid_ppl", "domain_oracle") else "opus"
    assert [row["method"] for row in rows] == ["uniform"] * 2 + [method] * (STEPS - 2)
    for row in rows[2:]:
        assert not row["events"]
        assert_consistent(choice, row)


def assert_consistent(choice: str, row: dict[str, Any]) -> None:
    """The picks are those that the recorded utilities and domains call for."""
    utilities = torch.tensor(row["utilities"], dtype=torch.float64)
    assert utilities.std() > 0
    picked = torch.tensor([i in row["picked_ids"] for i in row["candidate_ids"]])
    if choice != "greats":  # whose picks also lower each other's utility
        assert utilities[picked].min() > utilities[~picked].max()
    if choice == "domain_oracle":
        wanted = round(row["pool_share"]["docs"] * len(utilities))
        assert row["share"]["docs"] == pytest.approx(min(wanted, 4) / 4)
