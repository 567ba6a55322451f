"""Times the steps of several runs in one process, in turns, so that what else the machine does meets all alike."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from megaopus.build import build_trainer
from megaopus.config.compose import compose
from megaopus.data.run_data import RunData
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.record.config import LoggingConfig
from megaopus.record.console import progress
from megaopus.record.recorder import Recorder
from megaopus.training.signals import StopSignal

SETTLED = 65
"""Updates after which the default recipe's predictor has its first 64 scores, and every cost has set in."""
TURN = 32
"""Updates of a turn: a multiple of every period of the recipes."""
ROUNDS = 3


def seconds_of_a_step(runs: Mapping[str, Sequence[str]], updates: int) -> dict[str, float]:
    """Return the median seconds of a step of each of ``runs`` (name -> overrides), selection included.

    Each run is taken to where its costs are what they stay, or to its end, which ``updates`` says, if that comes
    first; then they take turns of ``TURN`` updates, or as many, ``ROUNDS`` times, first one and then the other. One
    process, so one rank. Writes no run folder.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    settled, turn = min(SETTLED, updates), min(TURN, updates)
    total = len(runs) * (settled + ROUNDS * turn)
    with tempfile.TemporaryDirectory() as folder, progress("timing steps in turns", total) as advance:
        mesh = Mesh(ParallelConfig())
        try:
            steps = {}
            for name, overrides in runs.items():
                steps[name] = settled_steps([*overrides, f"run_dir={folder}"], mesh, settled, turn)
                advance(settled)
            for round_ in range(ROUNDS):
                for name in list(steps)[:: -1 if round_ % 2 else 1]:
                    began = time.perf_counter()
                    steps[name]()
                    seconds[name].append((time.perf_counter() - began) / turn)
                    advance(turn)
        finally:
            mesh.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def settled_steps(overrides: Sequence[str], mesh: Mesh, settled: int, turn: int) -> Callable[[], None]:
    """Make ``settled`` updates of a run; returns what makes its next ``turn`` ones and writes nothing."""
    config = compose([*overrides, "selection.warmup_steps=1"])
    trainer = build_trainer(config, mesh, RunData.open(config.data, config.data_needs()), StopSignal())
    nobody = silent_recorder()
    for _ in range(settled):
        trainer.update(nobody)

    def several() -> None:
        for _ in range(turn):
            trainer.update(nobody)

    return several


def silent_recorder() -> Recorder:
    """Make a recorder that writes and says nothing."""
    return Recorder(LoggingConfig(), "", 0, is_writer=False)
