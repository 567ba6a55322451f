"""A run that was killed and started again equals one that was left alone, to the last bit."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml

from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.config.parse import load
from megaopus.data.corpus import Corpus
from megaopus.errors import CheckpointError
from megaopus.optim.build import MixedPrecisionOptimizer
from megaopus.planning.disk import tensor_bytes
from tests import forks
from tests.exact.resume_runs import (
    OPTIMIZERS,
    SELECTIONS,
    STEPS,
    assert_same,
    command,
    everything,
    settings,
    snapshot,
    train,
)
from tests.faults import Interrupted, at_step, interrupt

CASES = {  # of the other optimizers: test_resume_optimizers.py
    # selection, optimizer, the update before which the run ends, further settings
    "directional-adamw": ("directional", "adamw", 7, []),
    "directional-muon": ("directional", "muon", 5, []),
    "countsketch-adamw": ("countsketch", "adamw", 9, []),
    "countsketch-muon": ("countsketch", "muon", 6, []),
    "predict-adamw": ("predict", "adamw", 7, []),
    "cascade-muon": ("cascade", "muon", 6, []),
    "high_ppl-sgd": ("high_ppl", "sgd", 8, []),
    "uniform-adamw-from-the-start-held-out-target": ("uniform", "adamw", 3, ["data.proxy_path=TARGET_CORPUS"]),
    "dropout": ("directional", "adamw", 6, ["model.dropout=0.1"]),
    "bf16": ("directional", "muon", 7, ["engine.precision=bf16"]),
    "llama-untied": (
        "directional",
        "adamw",
        5,
        [
            "model.position=rope",
            "model.norm=rmsnorm",
            "model.activation=swiglu",
            "model.tied=false",
            "model.num_kv_heads=2",
            "model.qk_norm=true",
        ],
    ),
}
CASES |= {
    f"directional-{name}": ("directional", name, 6, [])
    for name in OPTIMIZERS
    if name not in {optimizer for _, optimizer, _, _ in CASES.values()}
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_straight(case: str, tiny_corpus: Path, target_corpus: Path, tmp_path: Path) -> None:
    selection, optimizer, last, more = CASES[case]
    more = [text.replace("TARGET_CORPUS", str(target_corpus)) for text in more]
    chosen = [*SELECTIONS[selection], *OPTIMIZERS[optimizer], *more]
    assert train(settings(tiny_corpus, tmp_path / "straight", *chosen)) == 0
    again = settings(tiny_corpus, tmp_path / "killed", *chosen)
    with at_step(last, interrupt), pytest.raises(Interrupted):
        train(again)
    assert len((tmp_path / "killed" / "selection.jsonl").read_text().splitlines()) == last
    assert train(again) == 0
    straight = everything(tmp_path / "straight")
    assert_same(everything(tmp_path / "killed"), straight)
    assert_meaningful(straight, selection, optimizer)
    targets = [set(row["target"]) for row in straight["metrics"] if row["kind"] == "validation"]
    assert targets == [{"items", "nearest"} if "data.proxy_path" in str(more) else {"docs"}] * 5
    config = load(tmp_path / "straight" / "config.yaml")
    stored = sum(tensor.nbytes for tensor in straight["tensors"].values())
    vocab_size = Corpus.open(tiny_corpus).vocab_size
    foreseen = tensor_bytes(config, vocab_size, straight["state"]["identity"]["precision"])
    assert stored == pytest.approx(foreseen, rel=0.01)


def assert_meaningful(run: dict, selection: str, optimizer: str) -> None:
    """Check that the comparison has what it is about: utilities that select, optimizer state, an average."""
    assert len(run["selection"]) == STEPS
    assert list(run["choices"]) == list(range(STEPS))
    assert all(sum(row["picked"] for row in rows) == 4 for rows in run["choices"].values())
    assert all(sum(row["probability"] for row in rows) == pytest.approx(1) for rows in run["choices"].values())
    methods = {row["step"]: row["method"] for row in run["selection"]}
    utilities = {step: [row["utility"] for row in rows] for step, rows in run["choices"].items()}
    scored = [step for step, values in utilities.items() if set(values) != {None}]
    if selection in ("predict", "cascade"):
        assert None in utilities[scored[-1]]
        assert any(
            methods[step] == "opus" and run["choices"][step][0]["prescreen_score"] is not None for step in scored
        )
    elif selection != "uniform":
        assert len(utilities[scored[-1]]) == 8
        assert None not in utilities[scored[-1]]
    checked = [row["step"] for row in run["selection"] if row["realised_fall"] is not None]
    assert checked == ([2, 4, 6, 8] if selection == "directional" else [])  # none in warm-up
    parts = {
        "adamw": ("exp_avg.", "exp_avg_sq."),
        "muon": ("momentum_buffer.", "exp_avg."),
        "sgd": ("momentum_buffer.",),
    }
    for part in parts[optimizer]:
        found = [value for name, value in run["tensors"].items() if part in name]
        assert found
        assert all(value.abs().max() > 0 for value in found if value.dim() > 1 or len(value) == 1)
    averaged = [name for name in run["tensors"] if name.startswith("average.")]
    assert bool(averaged) == (selection not in ("high_ppl", "uniform"))


def test_a_run_killed_many_times_still_equals_straight(tiny_corpus: Path, tmp_path: Path) -> None:
    chosen = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"], "checkpoint.every=2"]
    assert train(settings(tiny_corpus, tmp_path / "straight", *chosen)) == 0
    again = settings(tiny_corpus, tmp_path / "killed", *chosen)
    for last in (1, 3, 3, 5, 9):
        with at_step(last, interrupt), pytest.raises(Interrupted):
            train(again)
    assert train(again) == 0
    assert_same(everything(tmp_path / "killed"), everything(tmp_path / "straight"))


def test_sigkill_of_the_command_and_the_same_command_again(tiny_corpus: Path, tmp_path: Path) -> None:
    chosen = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"]]
    again = settings(tiny_corpus, tmp_path / "killed", *chosen)
    killed = forks.program("tests.faults", "SIGKILL", "7", "0", "train", *again)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = command(["megaopus", "train", *again])
    assert finished.returncode == 0, finished.stderr
    assert "resumed from" in finished.stdout
    assert "selection.jsonl: 3 rows after step 4 of an earlier run dropped, 4 kept" in finished.stdout
    assert "Warning" not in finished.stderr
    assert train(settings(tiny_corpus, tmp_path / "straight", *chosen)) == 0
    assert_same(everything(tmp_path / "killed"), everything(tmp_path / "straight"))


def test_a_finished_run_started_again_does_nothing(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = settings(tiny_corpus, tmp_path / "run")
    assert train(overrides) == 0
    run = tmp_path / "run"
    before, left = everything(run), snapshot(run)
    capsys.readouterr()
    assert train(overrides) == 0
    assert_same(everything(run), before)
    assert snapshot(run) == left
    last = complete_checkpoints(run)[-1]
    said = capsys.readouterr().out
    assert said.startswith(f"{run} is finished: {last} has all 10 updates; nothing to do")
    assert len(said.splitlines()) == 1


def test_settings_changed_on_resume_are_named_and_used(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = ["optim.schedule=constant", "optim.weight_decay=0.1"]
    assert train(settings(tiny_corpus, tmp_path / "run", *constant, "optim.lr=1e-3", "train.steps=6")) == 0
    more = [*constant, "optim.lr=2e-3", "optim.betas=[0.8,0.9]", "train.steps=8", "selection=opus_exact"]
    again = settings(tiny_corpus, tmp_path / "run", *more, "selection.warmup_steps=0", "logging.every=5")
    with pytest.raises(CheckpointError, match=r"under other settings; these change what is trained on") as caught:
        train(again)
    changed = re.findall(r"^  (\S+): saved .*, now ", str(caught.value), re.MULTILINE)
    assert {"optim.lr", "optim.betas", "selection.method", "train.steps"} <= set(changed)
    assert "logging.every" not in changed
    capsys.readouterr()
    (allow,) = re.findall(r"'(resume_allow=\[.*\])'", str(caught.value))
    assert train([*again, allow]) == 0
    said = capsys.readouterr().out
    assert "optim.lr 0.001 -> 0.002, optim.betas [0.9, 0.95] -> [0.8, 0.9]" in said
    assert "selection.method 'uniform' -> 'opus'" in said
    assert "logging.every 10 -> 5" in said
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in metrics if row["kind"] == "step"] == [1e-3] * 6 + [2e-3] * 2
    chosen = [json.loads(line)["method"] for line in (tmp_path / "run" / "selection.jsonl").read_text().splitlines()]
    assert chosen == ["uniform"] * 6 + ["opus"] * 2
    groups = everything(tmp_path / "run")["common"]["optimizer"]["param_groups"]
    assert {group["peak_lr"] for group in groups} == {2e-3}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}


def test_each_launch_is_kept(tiny_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(tiny_corpus, run, "train.steps=2"))
    train(settings(tiny_corpus, run, "train.steps=3", "resume_allow=[train.steps]"))
    steps = {
        folder.name: yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] for folder in launches(run)
    }
    assert steps == {"000": 2, "001": 3}
    assert (run / "config.yaml").read_text() == (run / "launches" / "001" / "config.yaml").read_text()
    for folder in (run, *launches(run)):
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["world_size"] == 1
        assert environment["packages"]["torch"] == torch.__version__
        assert (folder / "launch.sh").read_text().startswith("#!/usr/bin/env bash\nset -euo pipefail\ncd ")
    assert not list(run.rglob("*partial*"))


def launches(run: Path) -> list[Path]:
    return sorted((run / "launches").iterdir())


def test_without_an_applied_update_there_is_nothing_to_save(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer has no state yet, so a checkpoint could not be restored; beginning again gives the same run."""
    overrides = settings(tiny_corpus, tmp_path / "run", "checkpoint.every=1", "train.steps=3")
    with monkeypatch.context() as patch:
        patch.setattr(MixedPrecisionOptimizer, "step", lambda self, norm, limit: False)
        with at_step(2, interrupt), pytest.raises(Interrupted):
            train(overrides)
    assert complete_checkpoints(tmp_path / "run") == []
    assert train(overrides) == 0
    assert train(settings(tiny_corpus, tmp_path / "straight", "checkpoint.every=1", "train.steps=3")) == 0
    assert_same(everything(tmp_path / "run"), everything(tmp_path / "straight"))


def test_weights_and_biases_sees_one_run(tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is an optional extra (megaopus[wandb])")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run = tmp_path / "run"
    overrides = settings(tiny_corpus, run, "logging=wandb_offline", "train.steps=6", *SELECTIONS["directional"])
    with at_step(5, interrupt), pytest.raises(Interrupted):
        train(overrides)
    name = (run / "wandb_run_id").read_text().strip()
    assert train(overrides) == 0
    assert (run / "wandb_run_id").read_text().strip() == name
    pieces = sorted(run.glob("wandb/offline-run-*"))
    assert pieces
    assert {piece.name.rsplit("-", 1)[1] for piece in pieces} == {name}
    assert all(list(piece.glob(f"run-{name}.wandb")) for piece in pieces)
