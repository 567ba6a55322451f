"""Weights changed on resume: the run is the one that was told of the change from the start."""

from __future__ import annotations

from pathlib import Path

import yaml

from megaopus.__main__ import main
from tests.exact.resume_runs import choices, settings, train


def ids_of(run: Path) -> list[list[int]]:
    return [[row["id"] for row in rows] for rows in choices(run).values()]


def test_weights_changed_on_resume_count_from_there_on(tiny_corpus: Path, tmp_path: Path, capsys) -> None:
    first, then = "[[0,{docs:3,code:1}]]", "[[0,{code:1}]]"
    run = tmp_path / "run"
    assert train(settings(tiny_corpus, run, f"data.weights={first}", "train.steps=4")) == 0
    assert "domains by weight; epochs of each by the last step: " in capsys.readouterr().out
    again = settings(tiny_corpus, run, f"data.weights={then}", "resume_allow=[data.weights,train.steps]")
    assert train(again) == 0
    assert "data.weights [[0, {'docs': 3, 'code': 1}]] -> " in capsys.readouterr().out
    straight = tmp_path / "straight"
    assert train(settings(tiny_corpus, straight, "data.weights=[[0,{docs:3,code:1}],[4,{code:1}]]")) == 0
    assert ids_of(run) == ids_of(straight)
    seen = [number for ids in ids_of(run) for number in ids]
    assert len(set(seen)) == len(seen)
    recorded = yaml.safe_load((run / "config.yaml").read_text())["data"]["weights"]
    assert recorded == [[0, {"docs": 3.0, "code": 1.0}], [4, {"code": 1.0}]]


def test_weights_cannot_be_switched_on_in_the_middle(tiny_corpus: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert train(settings(tiny_corpus, run, "train.steps=4")) == 0
    assert main(["train", *settings(tiny_corpus, run, "data.weights=[[0,{docs:1}]]")]) == 2
    assert "weighted: saved None, now True" in capsys.readouterr().err
