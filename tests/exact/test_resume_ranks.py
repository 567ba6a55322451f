"""The same promises on several ranks: data-parallel under torchrun, and uniform runs at every layout of two."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopus.checkpoint.checkpointer import complete_checkpoints
from tests.exact.resume_runs import (
    OPTIMIZERS,
    SELECTIONS,
    assert_same,
    choices,
    command,
    everything,
    rows,
    settings,
    train,
)
from tests.faults import Interrupted, at_step, interrupt
from tests.harness import free_ports, run_ranks

DROPOUT = [*SELECTIONS["directional"], *OPTIMIZERS["adamw"], "model.dropout=0.1"]
SKETCH = [*SELECTIONS["countsketch"], *OPTIMIZERS["muon"]]
LAYOUTS = {
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "cp2": ["parallel.cp=2"],
    "vpp2": ["parallel.pp=2", "parallel.vpp=2"],
    "distributed": ["parallel.distributed_optimizer=true"],
}
FOUR_LAYERS = ["model.num_layers=4"]


def on_two_ranks(corpus: Path, folder: Path, ports: list[int]) -> None:
    """One rank of: straight, killed and resumed runs; the rest of the run that torchrun left; the other layouts."""

    def begin(name: str, *more: str) -> int:
        os.environ["MASTER_PORT"] = str(ports.pop())  # a process group for itself
        return train(settings(corpus, folder / name, *more))

    for name, chosen, last in (("dropout", DROPOUT, 7), ("sketch", SKETCH, 5)):
        assert begin(f"{name}_straight", *chosen) == 0
        with at_step(last, interrupt), suppress(Interrupted):
            begin(f"{name}_killed", *chosen)
        assert begin(f"{name}_killed", *chosen) == 0
    assert begin("torchrun", *DROPOUT) == 0
    for layout, parallel in LAYOUTS.items():
        assert begin(layout, *parallel, *FOUR_LAYERS) == 0


@pytest.fixture(scope="module")
def folder(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file. Under torchrun, SIGTERM reaches rank 1 just before update 6."""
    folder = tmp_path_factory.mktemp("ranks")
    port, *ports = free_ports(13)  # torchrun, and twelve process groups
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m"]
    fault = ["tests.faults", "SIGTERM", "6", "1", "train"]
    stopped = command([*launch, *fault, *settings(tiny_corpus, folder / "torchrun", *DROPOUT)])
    assert stopped.returncode == 1, stopped.stderr  # torchrun's own
    assert "exitcode  : 143" in stopped.stderr
    assert "another rank was asked to stop: stopping after 7 updates" in stopped.stdout
    assert [path.name for path in complete_checkpoints(folder / "torchrun")] == ["step_00000004", "step_00000007"]
    run_ranks(2, on_two_ranks, tiny_corpus, folder, ports, timeout_s=300)
    return folder


@pytest.mark.parametrize("case", ["dropout", "sketch"])
def test_killed_and_resumed_equals_straight_on_two_ranks(case: str, folder: Path) -> None:
    assert_same(everything(folder / f"{case}_killed"), everything(folder / f"{case}_straight"))


def test_sigterm_to_one_rank_under_torchrun_stops_all_and_the_run_goes_on(folder: Path) -> None:
    assert_same(everything(folder / "torchrun"), everything(folder / "dropout_straight"))


def test_the_launch_script_names_torchrun(folder: Path) -> None:
    script = (folder / "torchrun" / "launches" / "000" / "launch.sh").read_text()
    assert "torchrun --nproc-per-node 2 -m megaopus " in script


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uniform_trains_alike_at_every_layout(layout: str, folder: Path, tiny_corpus: Path) -> None:
    alone = folder / f"alone_{layout}"
    assert train(settings(tiny_corpus, alone, *FOUR_LAYERS)) == 0
    assert rows(folder / layout / "selection.jsonl") == rows(alone / "selection.jsonl")
    assert choices(folder / layout) == choices(alone)
    found, expected = (rows(path / "metrics.jsonl") for path in (folder / layout, alone))
    assert len(found) == len(expected) == 15  # ten updates; validations after 0, 3, 6, 9 and 10
    for row, other in zip(found, expected, strict=True):
        assert (row["kind"], row["step"]) == (other["kind"], other["step"])
        torch.testing.assert_close(numbers(row), numbers(other), rtol=1e-4, atol=0)
    assert_close_weights(folder / layout, alone)


def numbers(row: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([row["loss"], row.get("grad_norm", 0.0), row.get("lr", 0.0), *row.get("domains", {}).values()])


def assert_close_weights(run: Path, other: Path) -> None:
    found, expected = (everything(path)["tensors"] for path in (run, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 2e-3, f"{name}: {error:.1e}"  # AdamW's first steps magnify the last bits of tiny gradients
