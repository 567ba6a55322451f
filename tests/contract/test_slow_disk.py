"""A slow disk is seen with both engines, and is no rank's own work; a slow rank is seen with DeepSpeed too."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from megaopus import build
from megaopus.config.compose import compose
from megaopus.data.read_ahead import TokenReader
from megaopus.data.run_data import RunData
from megaopus.data.sequences import Sequences
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.record.config import LoggingConfig
from megaopus.record.recorder import Recorder
from megaopus.training.signals import StopSignal
from megaopus.training.straggler import OWN_WORK
from megaopus.training.timers import Timers
from tests.exact.resume_runs import settings
from tests.pool import Pool

READ_S, FORWARD_S = 0.3, 1.0
ENGINES = {"megatron": "megatron.passes", "deepspeed": "deepspeed.engine"}
"""Engine -> the module of it that calls the forward pass of a micro-batch."""


class Clock:
    """Seconds that pass for reading, for forward passes, and for nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow(self, patch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """Let each call take so long."""
        original = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return original(*args, **kwargs)

        patch.setattr(owner, name, slow)


def slow_steps(engine: str, overrides: list[str], forward_s: float) -> tuple[Timers, list[str]]:
    """Three updates with nothing read ahead: (what was booked, what was said)."""
    clock, said = Clock(), []
    module = importlib.import_module(f"megaopus.engine.{ENGINES[engine]}")
    config = compose([*overrides, f"engine.name={engine}"])
    mesh = Mesh(ParallelConfig(), "cpu")
    try:
        with pytest.MonkeyPatch.context() as patch:
            timers = Timers(clock)
            data = RunData.open(config.data, config.data_needs())
            trainer = build.build_trainer(config, mesh, data, StopSignal(), timers)
            patch.setattr(TokenReader, "ahead", lambda self, step, plan: None)
            patch.setattr(Recorder, "step", lambda self, record, selection, events: said.extend(map(str, events)))
            clock.slow(patch, Sequences, "read", READ_S)
            clock.slow(patch, module, "token_losses", forward_s)
            for _ in range(3):
                trainer.update(Recorder(LoggingConfig(), "", 3, is_writer=False))
        return timers, said
    finally:
        mesh.close()


@pytest.fixture
def overrides(tiny_corpus: Path, tmp_path: Path) -> list[str]:
    """Uniform batches in two micro-batches, each of them read and passed forward by itself."""
    return settings(tiny_corpus, tmp_path, "train.steps=3", "logging.every=3")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slow_disk_is_seen(engine: str, overrides: list[str]) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is an optional extra (megaopus[deepspeed])")
    timers, said = slow_steps(engine, overrides, FORWARD_S)
    assert timers.seconds("data") == pytest.approx(3 * 2 * READ_S)
    assert timers.seconds(OWN_WORK) == pytest.approx(3 * 2 * FORWARD_S)
    assert timers.seconds("train") == pytest.approx(3 * 2 * FORWARD_S)
    assert said == ["rank 0 waits for data 23% of the time"]


def on_a_rank(overrides: list[str]) -> list[str]:
    """Return what is said where rank 1 takes twice as long for its passes."""
    return slow_steps("deepspeed", overrides, FORWARD_S * (1 + int(os.environ["RANK"])))[1]


def test_deepspeed_names_a_slow_rank(overrides: list[str], pool: Pool) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an optional extra (megaopus[deepspeed])")
    slow = "rank 1 is slow: 2.000 s of its own work an update, median 1.500"
    assert pool.run(2, on_a_rank, overrides) == [
        [f"rank 0 waits for data {share} of the time", slow]
        for share in ("23%", "13%")  # of each rank's own clock
    ]
