"""Times a few steps of a run at several layouts, one after the other, in ranks of their own on this machine."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from megaopus.distributed.launcher import without_launcher

STEPS = 3
"""Updates that are timed, after one that warms up (two where a batch is selected: the second is the first to score)."""
SECONDS, MORE_STEPS = 2.0, 40
"""Short updates are timed for so many seconds, but no more of them than this: a few of 0.1 s tell mostly noise."""
_MODULE = "megaopus.timed_layouts"
_LAST_LINES = 3
_PORTS = range(12_000, 30_000)


class Timing(NamedTuple):
    """Tells the seconds of a step, and of the selection in it, as medians; or why there are none."""

    step_s: float = 0.0
    selection_s: float = 0.0
    failed: str = ""


def time_layouts(
    runs: Sequence[Sequence[str]],
    config_dir: Path | None,
    ranks: int,
    done: Callable[[int], None],
    clock: str = "wall",
) -> list[Timing]:
    """Time some updates of each of ``runs`` (overrides) on ``ranks`` new processes; no run folder is written.

    One start serves all; where one fails, the rest go on in another. ``done`` is called as layouts are finished.
    ``clock``: "cpu" adds up the CPU seconds of all ranks, which are what one quiet core would take.
    """
    found: list[Timing] = []
    while len(found) < len(runs):
        started = len(found)
        with tempfile.TemporaryDirectory(prefix="megaopus-plan-") as folder:
            job, rows, log = (Path(folder) / name for name in ("job.json", "rows.jsonl", "log"))
            rows.touch()
            left = [list(run) for run in runs[started:]]
            about = {"runs": left, "ports": _free_ports(len(left)), "rows": str(rows), "folder": folder, "clock": clock}
            job.write_text(json.dumps({**about, "config_dir": config_dir and str(config_dir)}), encoding="utf-8")
            _launched(job, ranks, rows, log, found, done)
            if len(found) < len(runs):
                last = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
                said = " | ".join(line.strip() for line in last[-_LAST_LINES:]) or "its ranks ended without a word"
                found.append(Timing(failed=said))
                done(1)
    return found


def _launched(job: Path, ranks: int, rows: Path, log: Path, found: list[Timing], done: Callable[[int], None]) -> None:
    """Start the ranks and append what they time, as it comes, until they end."""
    environment = {"OMP_NUM_THREADS": "1" if ranks > 1 else "", **without_launcher(os.environ)}
    environment = {name: value for name, value in environment.items() if value}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", _MODULE, str(job)]
    before = len(found)
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, *command], stdout=stream, stderr=stream, env=environment)
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None
                lines = rows.read_text(encoding="utf-8").splitlines()[len(found) - before :]
                for line in lines:
                    found.append(Timing(*json.loads(line)))
                    done(1)
                time.sleep(0 if ended else 0.1)
        finally:
            process.terminate()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, below those that outgoing connections are given."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def main(job: Path) -> None:
    """Time the runs of a job on this rank; rank 0 appends a line for each."""
    about: dict[str, Any] = json.loads(job.read_text(encoding="utf-8"))
    config_dir = about["config_dir"] and Path(about["config_dir"])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each layout has a rendezvous of its own
    for overrides, port in zip(about["runs"], about["ports"], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        row = _timed([*overrides, f"run_dir={about['folder']}/run"], config_dir, about["clock"])
        if os.environ["RANK"] == "0":
            with Path(about["rows"]).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


def _timed(overrides: Sequence[str], config_dir: Path | None, clock: str) -> Timing:
    """Time the steps of one layout: this rank's, which waits for the others in each; by CPU seconds those of all."""
    from megaopus.build import build_trainer
    from megaopus.config.compose import compose
    from megaopus.data.run_data import RunData
    from megaopus.distributed.mesh import Mesh
    from megaopus.selection.methods.registry import UNIFORM
    from megaopus.side_by_side import silent_recorder
    from megaopus.training.signals import StopSignal
    from megaopus.training.timers import Timers

    now = time.process_time if clock == "cpu" else time.perf_counter
    config = compose([*overrides], config_dir, int(os.environ["WORLD_SIZE"]))
    selects = config.selection.method != UNIFORM
    config.selection.warmup_steps = min(1, config.selection.warmup_steps)
    engine = config.engine
    mesh = Mesh(config.parallel, engine.device, engine.timeout_minutes, engine.deterministic)
    try:
        timers, nobody, rows = Timers(now), silent_recorder(), []
        data = RunData.open(config.data, config.data_needs())
        trainer = build_trainer(config, mesh, data, StopSignal(False), timers)
        step, last = 0, selects + STEPS
        while step <= last:
            began, before = now(), timers.seconds("select")
            trainer.update(nobody)
            if step > selects:
                chosen = timers.seconds("select") - before if selects else 0.0
                rows.append((now() - began, chosen))
            if step == selects + STEPS:
                more = mesh.gather_objects(_more(rows))[0]  # all ranks go by the first
                last = max(last, min(last + more, config.train.steps - 1))
            step += 1
        trainer.reader.close()
        if clock == "cpu":
            gathered = zip(*mesh.gather_objects(rows), strict=True)
            rows = [(sum(each[0] for each in of_ranks), sum(each[1] for each in of_ranks)) for of_ranks in gathered]
        selection_s = statistics.median(row[1] for row in rows)
        return Timing(selection_s + statistics.median(row[0] - row[1] for row in rows), selection_s)
    finally:
        mesh.close()


def _more(rows: Sequence[tuple[float, float]]) -> int:
    """Count the further updates that fill ``SECONDS`` at the pace of these."""
    step_s = statistics.median(row[0] for row in rows)
    return min(MORE_STEPS, max(0, int(SECONDS / step_s) - len(rows)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
