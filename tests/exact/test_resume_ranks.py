"""The same promises on several ranks: data-parallel under torchrun, and uniform runs at every layout of two."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.pool import Jobs, Pool, free_ports

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


RUNS = {
    "dropout": DROPOUT,
    "sketch": SKETCH,
    "torchrun": DROPOUT,
    **{layout: [*parallel, *FOUR_LAYERS] for layout, parallel in LAYOUTS.items()},
}
"""Name -> settings."""


def run_to_the_end(name: str, corpus: Path, folder: Path) -> int:
    """One rank of a run, from where it stands."""
    return train(settings(corpus, folder / name, *RUNS[name.removesuffix("_killed")]))


def run_until_killed(name: str, corpus: Path, folder: Path, last: int) -> None:
    with at_step(last, interrupt), suppress(Interrupted):
        run_to_the_end(name, corpus, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where every run of this file lies under its name."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(pool: Pool, tiny_corpus: Path, folder: Path) -> Jobs[str]:
    """Name -> exit status of each of two ranks of the run, from where it stands to the end."""
    names = [*RUNS, "dropout_killed", "sketch_killed"]
    return pool.jobs(dict.fromkeys(names, 2), run_to_the_end, tiny_corpus, folder)


@pytest.fixture(scope="module")
def stopped(tiny_corpus: Path, folder: Path) -> Path:
    """A run under torchrun in which SIGTERM reached rank 1 just before update 6."""
    (port,) = free_ports(1)
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m"]
    fault = ["tests.faults", "SIGTERM", "6", "1", "train"]
    stopped = command([*launch, *fault, *settings(tiny_corpus, folder / "torchrun", *DROPOUT)])
    assert stopped.returncode == 1, stopped.stderr  # torchrun's own
    assert "exitcode  : 143" in stopped.stderr
    assert "another rank was asked to stop: stopping after 7 updates" in stopped.stdout
    assert [path.name for path in complete_checkpoints(folder / "torchrun")] == ["step_00000004", "step_00000007"]
    return folder / "torchrun"


@pytest.mark.parametrize(("case", "last"), [("dropout", 7), ("sketch", 5)], ids=["dropout", "sketch"])
def test_killed_and_resumed_equals_straight_on_two_ranks(
    case: str, last: int, pool: Pool, runs: Jobs[str], folder: Path, tiny_corpus: Path
) -> None:
    runs.begin([case])
    pool.run(2, run_until_killed, f"{case}_killed", tiny_corpus, folder, last)
    assert len((folder / f"{case}_killed" / "selection.jsonl").read_text().splitlines()) == last
    assert runs[f"{case}_killed"] == runs[case] == [0, 0]
    assert_same(everything(folder / f"{case}_killed"), everything(folder / case))


def test_sigterm_to_one_rank_under_torchrun_stops_all_and_the_run_goes_on(
    stopped: Path, runs: Jobs[str], folder: Path
) -> None:
    assert runs["torchrun"] == runs["dropout"] == [0, 0]
    assert_same(everything(stopped), everything(folder / "dropout"))


@pytest.mark.ranks  # as is the other test of that run, which takes long
def test_the_launch_script_names_torchrun(stopped: Path) -> None:
    script = (stopped / "launches" / "000" / "launch.sh").read_text()
    assert "torchrun --nproc-per-node 2 -m megaopus " in script


@pytest.fixture(scope="module")
def layouts(runs: Jobs[str], selected: Callable[..., list[str]]) -> Jobs[str]:
    return runs.begin(selected("layout"))


@pytest.fixture(scope="module")
def alone(tiny_corpus: Path, folder: Path) -> Path:
    """The run of four layers on one process."""
    assert train(settings(tiny_corpus, folder / "alone", *FOUR_LAYERS)) == 0
    return folder / "alone"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uniform_trains_alike_at_every_layout(layout: str, layouts: Jobs[str], folder: Path, alone: Path) -> None:
    assert layouts[layout] == [0, 0]
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
