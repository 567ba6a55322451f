"""Says what the study on a real model keeps of a run before its folder is deleted (real_study.py)."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.pools import PASSAGES
from benchmarks.study import run_of, summary_of
from megaopus.config.run_config import RunConfig
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.run_data import RunData
from megaopus.data.text_features import BLOCKS, SequenceTextFeatures
from megaopus.evaluation.items import read_evaluation
from megaopus.evaluation.model import find, opened
from megaopus.record.parquet import FOLDER, parts, read_part, steps_of
from megaopus.report.compare import Run, compare
from megaopus.selection import sampler
from megaopus.selection.config import SelectionConfig

TASK = "lambada_openai"
_NEAR = 1e-5
"""Nats by which the mean of the losses of sequences and the validation may differ: the order of sums."""


def facts_of(config: RunConfig, run: Run, uniform: Mapping[str, Any] | None) -> dict[str, Any]:
    """Say what a row says of a run; ``uniform``: the row that it is held against, None if there is none yet."""
    kept = summary_of(run)
    last, seconds = run.validations[-1], run.steps[-1].time_s
    changed = [row.changed_by_utilities for row in run.selections if row.changed_by_utilities is not None]
    swapped = swaps(config, run.path)
    events = Counter(event.kind for each in run.selections for event in each.events)
    known = bool(changed) and config.selection.has_prior
    row: dict[str, Any] = {
        "updates": last.step,
        "final_loss": last.loss,
        "tokens_ratio": None,
        "time_ratio": None,
        "changed_share": statistics.fmean(changed) if known else swapped["changed"],
        "seconds": seconds,
        "update_s": seconds / last.step,
        **{name: kept[name] for name in ("share", "tokens_per_step", "uniform_steps", "validations")},
        "events": dict(events),
        "wanted": config.data.target_domains,
        "swapped": swapped,
        "sequences": sequence_losses(config, run),
    }
    if uniform is not None:
        row["tokens_ratio"], row["time_ratio"] = ratios(uniform, row)
    return row


def ratios(uniform: Mapping[str, Any], row: Mapping[str, Any], until: int | None = None) -> tuple[Any, Any]:
    """(share of uniform's tokens at which the arm is at uniform's last loss, that times seconds an update over its).

    ``until``: of validations after so many updates at most. None: never. Losses are those of single validations, which
    are of the same sequences each time.
    """
    runs = []
    for each in (uniform, row):
        kept = [point for point in each["validations"] if until is None or point["step"] <= until]
        runs.append(run_of({"key": "row", **each, "validations": kept}))
    tokens = compare(runs[0], runs[1], window=1).tokens_ratio
    return tokens, None if tokens is None else tokens * row["update_s"] / uniform["update_s"]


# -- picks -----------------------------------------------------------------------------------------------------------


def swaps(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Compare the picks with those by importance alone from the same candidates, by the run's own sampler and noise.

    Returns which share of them differ, and how many of each kind came in and had to go.
    """
    data = RunData.open(config.data, config.data_needs())
    features = SequenceTextFeatures(data.pool, data.ensure_text_features(Console(quiet=True)), BLOCKS)
    came: Counter[str] = Counter()
    went: Counter[str] = Counter()
    picks = 0
    for path in parts(run_dir / FOLDER):
        table = read_part(path, ["step", "id", "domain", "exposures", "picked"])
        for step, rows in steps_of(table):
            here = table.slice(rows.start, rows.stop - rows.start)
            ids = torch.from_numpy(here["id"].to_numpy().copy())
            times = torch.from_numpy(np.nan_to_num(here["exposures"].to_numpy().astype(np.float64)).astype(np.int64))
            picked = set(np.flatnonzero(here["picked"].to_numpy()).tolist())
            others = set(_by_importance(config, step, ids, features.importance(ids), times, len(picked)).tolist())
            kinds = here["domain"].to_pylist()
            came.update(kinds[place] for place in picked - others)
            went.update(kinds[place] for place in others - picked)
            picks += len(picked)
    return {"changed": sum(came.values()) / picks, "came": dict(came), "went": dict(went)}


def _by_importance(config: RunConfig, step: int, ids: Tensor, importance: Tensor, times: Tensor, count: int) -> Tensor:
    """(count,) positions picked by importance alone, those trained on before last."""
    selection: SelectionConfig = config.selection
    values = sampler.standardise(importance) if selection.utilities == "standardised" else importance
    draws = sampler.Draws(selection.sampler, selection.temperature, config.seed, step)
    return sampler.pick(values, ids, count, draws, levels=(times - selection.guards.exposure_cap).clamp_min(0))


# -- the trained model -----------------------------------------------------------------------------------------------


def sequence_losses(config: RunConfig, run: Run) -> dict[str, list[Any]]:
    """The loss of each sequence of the wanted text that is validated on, and the number of the document it begins in.

    Raises RuntimeError if their mean is not what the run's last validation says.
    """
    data = RunData.open(config.data, config.data_needs())
    wanted = {name: each for name, each in data.evaluation_buffers().items() if name in config.data.target_domains}
    found: dict[str, list[Any]] = {"losses": [], "documents": []}
    means = []
    with opened(find(run.path), ["engine=cpu"], 1) as (engine, _):
        for buffer in wanted.values():
            losses = engine.evaluate(buffer)
            found["losses"] += [round(value, 5) for value in losses.tolist()]
            found["documents"] += data.validation.first_document_of(buffer.sequence_ids).tolist()
            means.append(float(losses.mean()))
    if abs(statistics.fmean(means) - run.validations[-1].loss) > _NEAR:
        raise RuntimeError(
            f"{run.path}: its sequences have a mean loss of {means}, its validation {run.validations[-1]}"
        )
    return found


def judged(run_dir: Path, corpus: Path, limit: int, verb: Callable[[list[str]], None]) -> dict[str, Any]:
    """Nats of the last word and whether it is foretold, of each passage that is held out; ``verb`` runs ``eval``."""
    opened_corpus = Corpus.open(corpus)
    held_out = np.flatnonzero(opened_corpus.split_codes == SPLITS.index("validation"))
    items = run_dir / "items"
    items.mkdir(exist_ok=True)
    rows = [json.dumps({"text": text, "domain": PASSAGES}) + "\n" for text in opened_corpus.texts(held_out)]
    (items / f"{TASK}_test.jsonl").write_text("".join(rows), encoding="utf-8")
    out = run_dir / "judged.json"
    verb([str(run_dir), "engine=cpu", "--suite", TASK, "--data", str(items), "--limit", str(limit), "--out", str(out)])
    found = read_evaluation(out).items(TASK)
    assert found is not None
    return {
        "items": len(found.names),
        "nats": [round(-value, 5) for value in found.values["perplexity"].tolist()],
        "right": [int(value) for value in found.values["acc"].tolist()],
    }
