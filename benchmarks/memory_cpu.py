"""Hold fake tensors, and the estimate, to what real ones take: on the CPU, where both can be had.

python benchmarks/memory_cpu.py
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.memory import ROOT, SHAPES, run_config
from megaopus.config.run_config import RunConfig
from megaopus.planning.memory import PROCESS_ROW, memory, peak

RESULTS = ROOT / "results" / "memory_cpu.jsonl"
SHAPE = replace(SHAPES["llama_small"], seq_len=256, micro=2)
"""A small batch of a model that the machine holds."""
SELECTIONS = ("uniform", "directional", "adjoint")


def config_of(selection: str) -> RunConfig:
    """The settings of the run, in fp32."""
    config = run_config(SHAPE, "1", selection)
    config.engine.device = "cpu"
    return config


def _resident(which: str) -> int:
    """Bytes of this process in memory: now (RSS), or at most since ``_forget`` (HWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"Vm{which}:"))


def _forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def _real_job(config: RunConfig) -> Iterator[tuple[Any, Any]]:
    from benchmarks.fake_cuda.meter import DeviceMeter
    from megaopus.distributed.mesh import Mesh

    mesh, meter = Mesh(config.parallel, "cpu"), DeviceMeter("cpu")
    try:
        with meter:
            yield mesh, meter
    finally:
        mesh.close()


def main() -> None:
    """Measure with fake tensors, then with real ones, and write both beside the estimate."""
    from benchmarks.fake_cuda.measure import fake_job, measure

    warnings.simplefilter("ignore")
    config = config_of("uniform")
    selections = {name: config_of(name).selection for name in SELECTIONS}
    with fake_job(config, 0, 1, "cpu") as (mesh, meter):
        fake = measure(config, SHAPE.vocab_size, mesh, meter, selections).scoring
    _forget()
    with _real_job(config) as (mesh, meter):
        trained = measure(config, SHAPE.vocab_size, mesh, meter, {})
        resident = _resident("HWM")
    with _real_job(config) as (mesh, meter):
        real = measure(config, SHAPE.vocab_size, mesh, meter, selections).scoring
    rows = []
    for name in SELECTIONS:
        found = memory(config_of(name), SHAPE.vocab_size, 1, "fp32", 0, "cpu")
        process = found.pop(PROCESS_ROW).size
        row: dict[str, Any] = {"selection": name, "real": real[name], "fake": fake[name], "estimate": peak(found)[1]}
        if name == "uniform":
            assert trained.training == real[name]
            row |= {"resident": resident, "estimate_with_process": row["estimate"] + process}
        rows.append(row)
        print(row)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
