"""Short runs through the whole train path, and everything of a run folder that must not depend on interruptions."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopus import build
from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.config.compose import compose
from megaopus.config.run_config import RunConfig
from megaopus.distributed.launcher import without_launcher
from megaopus.optim.registry import spec_of
from megaopus.record.metrics import metrics_of
from megaopus.record.parquet import FOLDER, parts, read_part
from megaopus.record.types import StepRecord, ValidationRecord
from megaopus.settings import written
from tests import forks

STEPS = 10
MEASURED = {each.name for kind in (StepRecord, ValidationRecord) for each in metrics_of(kind) if not each.reproducible}
SELECTIONS = {
    "directional": [
        "selection=opus_exact",
        "selection.warmup_steps=2",
        "selection.proxy_half_life=7.0",
        "selection.check_every=2",
    ],
    "countsketch": [
        "selection=opus_boltzmann",
        "selection.estimator=countsketch",
        "selection.sketch_dim=512",
        "selection.score_micro_batch_size=null",
        "selection.redundancy=0.5",
        "selection.warmup_steps=2",
    ],
    "predict": [
        "selection=opus_exact",
        "selection.warmup_steps=0",
        "selection.rho=0.25",
        "selection.proxy_every=3",
        "selection.prescreen.mode=predict",
        "selection.score_micro_batch_size=null",
        "selection.prescreen.slice=32",
        "selection.prescreen.refit=16",
        "selection.prescreen.every=2",
    ],
    "cascade": [
        "selection=opus_exact",
        "selection.warmup_steps=1",
        "selection.rho=0.125",
        "selection.score_every=3",
        "selection.prescreen.mode=cascade",
        "selection.prescreen.multiple=2",
        "selection.guards.domain_floor=0.5",
        "selection.guards.near_duplicates=true",
    ],
    "odds": ["selection=opus", "selection.rho=0.25", "selection.prescreen.multiple=2", "selection.contrast=true"],
    "high_ppl": ["selection=high_ppl"],
    "uniform": ["selection=uniform"],
}


def overrides_of(optimizer: str) -> list[str]:
    """The command line of an optimizer's example; a schedule of each kind for those that take matrices and others."""
    spec = spec_of(optimizer)
    given = {key: value for key, value in spec.example.items() if key != "settings"}
    given |= {f"settings.{key}": value for key, value in spec.example.get("settings", {}).items()}
    schedule = {"schedule": "wsd", "decay_steps": 4} if spec.matrices else {"warmup_steps": 3}
    values = {key: written(value) for key, value in (given | schedule).items()}
    return [f"optim={optimizer}", *(f"optim.{key}={value}" for key, value in values.items())]


OPTIMIZERS = {name: overrides_of(name) for name in ("adamw", "muon", "sgd")}


def settings(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of a run of STEPS updates: a checkpoint every 4, a validation every 3."""
    return [
        f"data.path={corpus}",
        f"run_dir={run_dir}",
        "data.target_domains=[docs]",
        "data.seq_len=16",
        "engine=cpu",
        "model.num_layers=2",
        "model.hidden_size=32",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.eval_every=3",
        "train.eval_sequences=4",
        "selection.proxy_batch_size=4",
        "selection.score_micro_batch_size=8",  # where none is set, finding one takes a third of such a run
        "checkpoint.every=4",
        *more,
    ]


def train(overrides: list[str]) -> int:
    """Run in this process (on this rank); returns the exit status."""
    places = dict(text.split("=", 1) for text in overrides if text.startswith(("run_dir=", "resume=")))
    rest = tuple(text for text in overrides if text.split("=", 1)[0] not in places)
    config = copy.deepcopy(_composed(rest, int(os.environ.get("WORLD_SIZE", "1"))))
    for key, value in places.items():
        setattr(config, key, value)
    return build.train(config)


@functools.cache
def _composed(overrides: tuple[str, ...], world_size: int) -> RunConfig:
    return compose(list(overrides), world_size=world_size)


def command(program: list[str]) -> subprocess.CompletedProcess[str]:
    """``python -m <program>`` from the root of the sources, one thread a process."""
    environment = without_launcher(os.environ)
    return subprocess.run(
        [sys.executable, "-m", *program],
        cwd=Path(__file__).parents[2],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=forks.TIMEOUT_S,
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file without what a clock or the machine decides."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


def choices(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The candidates of each step of a run, over all parts."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in parts(run_dir / FOLDER):
        for row in read_part(path).to_pylist():
            found.setdefault(row["step"], []).append(row)
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's weights, read without the engine."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(str(folder)), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def everything(run_dir: Path) -> dict[str, Any]:
    """Return what the newest checkpoint and the records of a run hold, times and places left out."""
    folder = complete_checkpoints(run_dir)[-1]
    state = json.loads((folder / "state.json").read_text())
    for key in ("time_s", "config"):
        del state[key]
    return {
        "checkpoints": [path.name for path in complete_checkpoints(run_dir)],
        "state": state,
        "common": torch.load(folder / "weights" / "common.pt", weights_only=False),
        "tensors": tensors(folder / "weights"),
        "metrics": rows(run_dir / "metrics.jsonl"),
        "selection": rows(run_dir / "selection.jsonl"),
        "choices": choices(run_dir),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to the last bit."""
    for key in ("checkpoints", "state", "metrics", "selection", "choices"):
        assert found[key] == expected[key], key
    assert plain(found["common"]) == plain(expected["common"])
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, value in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], value), name


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every file: when it was written and how long it is; but for the lock, which says who was here last."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def plain(tree: Any) -> Any:
    """Nested state with its tensors as lists, so that == compares values."""
    if isinstance(tree, Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return tree
