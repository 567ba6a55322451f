"""Writes synthetic run folders with the shape of real ones, for tests of the report."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.data.target import Target
from megaopus.events import Event
from megaopus.record.parquet import FOLDER, ChoiceSink
from megaopus.record.sinks import JsonlSink
from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord
from megaopus.selection.candidate_table import CandidateTable

NOT_FINITE = Event("selection.not_finite", "<b>candidates</b> with a utility that is not finite", ids=[3])
POOL = {"docs": 0.25, "source": 0.35, "readme": 0.25, "noise": 0.15}
TOKENS = 16 * 256


def write_run(
    path: Path,
    method: str,
    *,
    start: int = 100,
    steps: int = 240,
    pace: float = 1.0,
    seed: int = 0,
    domains: str = "",
    held_out: Target | None = None,
) -> Path:
    """A run folder that continues a warm-up of ``start`` steps; ``pace``: how many times faster its loss falls.

    ``domains``: those that its settings name as the target, one after the other; ``held_out``: the target that its
    environment names, whose parts have losses around that of the domain docs.
    """
    rng = random.Random(seed)
    path.mkdir(parents=True)
    metrics, selection = JsonlSink(path / "metrics.jsonl"), JsonlSink(path / "selection.jsonl")
    choices = ChoiceSink(path / FOLDER)
    time_s = 0.4 * start

    def validate(step: int) -> None:
        noise = 0.004 * rng.gauss(0, 1) if step > start else 0.0
        wanted = falling(start, step, pace) + noise
        losses = {"docs": wanted, "source": 2.2 + wanted / 4, "readme": 2.9 + wanted / 5, "noise": 7.2 + 0.02 * pace}
        target = {"items": wanted - 0.25, "nearest": wanted + 0.25} if held_out else {}
        record = ValidationRecord(
            step=step, tokens=step * TOKENS, time_s=time_s, loss=wanted, target=target, domains=losses
        )
        metrics.write({"kind": "validation", **asdict(record)})

    validate(start)
    for step in range(start, steps):
        chosen = method != "uniform"
        select_s = (0.11 + 0.02 * rng.random()) if chosen else 0.001
        step_s = 0.4 + 0.03 * rng.random() + select_s + (2.0 if step == start + 30 else 0.0)
        time_s += step_s
        record = StepRecord(
            step=step,
            tokens=(step + 1) * TOKENS,
            loss=falling(start, step, pace) + 0.05 * rng.gauss(0, 1),
            grad_norm=0.9 + 0.2 * rng.random(),
            lr=1e-3,
            time_s=time_s,
            step_s=step_s,
            select_s=select_s,
        )
        metrics.write({"kind": "step", **asdict(record)})
        chose = selection_record(step, chosen, min(1.0, (step - start) / 60), rng)
        selection.write(chose.facts())
        choices.add(step, candidates_of(step, chosen))
        if (step + 1) % 10 == 0:
            validate(step + 1)
    metrics.close()
    selection.close()
    choices.flush()
    write_settings(path, method, seed, domains, held_out)
    return path


def falling(start: int, step: int, pace: float) -> float:
    """Loss after ``step`` updates."""
    return 2.6 + 1.9 * math.exp(-(start + (step - start) * pace) / 180)


def write_settings(path: Path, method: str, seed: int, domains: str, held_out: Target | None) -> None:
    """Write the settings and facts that a launch leaves in the folder of a run."""
    settings = f"run_dir: {path}\nseed: {seed}\nselection:\n  method: {method}\n  rho: 0.5\n"
    settings += "model:\n  num_layers: 4\n  hidden_size: 128\noptim:\n  name: adamw\n"
    path.joinpath("config.yaml").write_text(settings + (f"data:\n  target_domains: [{domains}]\n" if domains else ""))
    facts: dict[str, Any] = {
        "git": "abc12345678900",
        "packages": {"torch": "2.13.0"},
        "started": "2026-11-29T09:13:58+00:00",
    }
    facts |= {"parameters": 1_071_872} | ({"target": asdict(held_out)} if held_out else {})
    path.joinpath("environment.json").write_text(json.dumps(facts))


def selection_record(step: int, chosen: bool, ramp: float, rng: random.Random) -> SelectionRecord:
    def draw(weights: dict[str, float], number: int) -> dict[str, float]:
        picks = rng.choices(list(weights), list(weights.values()), k=number)
        return {domain: picks.count(domain) / number for domain in weights}

    lean = {"docs": 1 + 3 * ramp, "source": 1 - 0.4 * ramp, "readme": 1 - 0.3 * ramp, "noise": 1 - 0.9 * ramp}
    weights = {domain: share * (lean[domain] if chosen else 1) for domain, share in POOL.items()}
    return SelectionRecord(
        step=step,
        method="opus" if chosen else "uniform",
        candidates=64,
        picked=32,
        share=draw(weights, 32),
        pool_share=draw(POOL, 64),
        ess=rng.uniform(24, 34) if chosen else 64.0,
        max_p_ratio=rng.uniform(5, 12) if chosen else 1.0,
        **(falls(step) if chosen and step % 10 == 0 else {}),
        events=[NOT_FINITE] if chosen and step in (120, 150) else [],
    )


def candidates_of(step: int, chosen: bool) -> CandidateTable:
    """Sequences of a pool of 1000, the upper half by utility picked; number 700 stands out in step 140."""
    ids = np.arange(64 * step, 64 * step + 64)
    utilities = np.random.default_rng(step).normal(size=64) * 1e-3
    if step == 140:
        ids[5], utilities[5] = 700 + 1000 * 9, 1.0
    columns = {
        "id": ids,
        "sequence": ids % 1000,
        "domain": ids % 4,
        "picked": utilities >= np.median(utilities) if chosen else np.arange(64) < 32,
        "probability": np.full(64, 1 / 64),
    }
    return CandidateTable(columns | ({"utility": utilities} if chosen else {}), list(POOL))


def falls(step: int) -> dict[str, float]:
    """Realised ones grow with the predicted ones, but for two outliers."""
    predicted = 0.01 + 1e-3 * (step % 70) + 1e-7 * step
    realised = {130: -4.0, 200: math.nan}.get(step, predicted / 2)
    return {"predicted_fall": predicted, "uniform_fall": predicted / 4, "realised_fall": realised}
