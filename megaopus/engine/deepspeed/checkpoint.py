"""Checkpoints of the DeepSpeed engine: each rank writes the fragments it owns, and any number of ranks reads them.

DeepSpeed's own checkpoints pickle its settings and objects and are cut to the number of ranks and the stage that wrote
them. Here a file holds plain tensors: of each parameter a run of its flattened elements (fp32 weights, optimizer state)
and where it starts. A reader takes from all files of its tensor-parallel rank what it owns itself, so the number of
data-parallel ranks and the stage may change; the tensor-parallel degree may not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopus.checkpoint.pending_save import PendingSave
from megaopus.distributed.mesh import Mesh
from megaopus.engine.deepspeed.zero_optimizer import Fragment, ZeroOptimizer
from megaopus.errors import EngineError
from megaopus.selection.backend import Gradient


def _path(folder: Path, mesh: Mesh, dp_rank: int) -> Path:
    return folder / f"zero_tp{mesh.tp_rank:03d}_dp{dp_rank:05d}.pt"


def prepare_save(
    folder: Path, zero: ZeroOptimizer, mesh: Mesh, groups: Mapping[str, Mapping[str, Tensor]]
) -> PendingSave:
    """A save of copies of this rank's fragments; data-parallel rank 0 also ``groups``, whole. Collective."""
    wholes: dict[str, Gradient] = {group: {} for group in groups}
    for group, values in groups.items():
        for name in values:
            whole = values[name]  # put together by all ranks when it is read
            if mesh.dp_rank == 0:
                wholes[group][name] = whole.detach().cpu().clone()
    content = {
        "tp": mesh.shape.tp,
        "dp": mesh.shape.dp,
        "steps": zero.steps(),
        "fragments": {
            name: {
                "start": fragment.start,
                "shape": list(zero.shape(name)),
                **{key: zero.local(name, key).cpu().clone() for key in ("weight", *zero.keys(name))},
            }
            for name, fragment in zero.fragments.items()
        },
        "groups": wholes if mesh.dp_rank == 0 else {},
    }
    path = _path(folder, mesh, mesh.dp_rank)

    def write() -> list[Path]:
        torch.save(content, path)
        return [path]

    return PendingSave(write, list)


def load(folder: Path, zero: ZeroOptimizer, mesh: Mesh, groups: list[str]) -> dict[str, Gradient]:
    """Restore what ``save`` wrote and return the groups asked for. Collective.

    Raises EngineError if the files are of another tensor-parallel degree or model, or do not hold every element.
    """
    missing = {name: fragment.numel for name, fragment in zero.fragments.items()}
    found: dict[str, Gradient] = {}
    for content in _files(folder, mesh):
        if content["fragments"].keys() != missing.keys():
            names = ", ".join(sorted(content["fragments"].keys() ^ missing.keys()))
            raise EngineError(f"the checkpoint is of a model with other parameters: {names}")
        for name, saved in content["fragments"].items():
            if saved["shape"] != list(zero.shape(name)):
                raise EngineError(f"{name} has shape {saved['shape']} in the checkpoint, {list(zero.shape(name))} here")
            if lacking := set(zero.keys(name)) - saved.keys():
                raise EngineError(f"the checkpoint is of another optimizer: no {', '.join(sorted(lacking))} of {name}")
            missing[name] -= _take(zero, name, saved)
        if "first" not in content:
            continue
        zero.set_steps(content["steps"])
        found = {group: content["groups"][group] for group in groups}
    if incomplete := [name for name, count in missing.items() if count]:
        raise EngineError(f"the checkpoint does not hold all of {', '.join(incomplete)}")
    zero.refresh()
    return {
        group: {name: zero.fragments[name].cut(value).to(mesh.device, copy=True) for name, value in values.items()}
        for group, values in found.items()
    }


def _files(folder: Path, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """The files of this tensor-parallel rank, of data-parallel rank 0 first (marked so); tensors are read when used."""
    count = 1
    dp_rank = 0
    while dp_rank < count:
        path = _path(folder, mesh, dp_rank)
        if not path.is_file():
            raise EngineError(f"{path} is missing: the checkpoint is of another engine or tensor-parallel degree")
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if content["tp"] != mesh.shape.tp:
            raise EngineError(f"the checkpoint was written with parallel.tp={content['tp']}, this is {mesh.shape.tp}")
        count = content["dp"]
        yield content | ({"first": True} if dp_rank == 0 else {})
        dp_rank += 1


def _take(zero: ZeroOptimizer, name: str, saved: dict[str, Any]) -> int:
    """Copy what this rank owns of a saved fragment; returns the number of elements."""
    mine: Fragment = zero.fragments[name]
    start = max(mine.start, saved["start"])
    count = min(mine.start + mine.numel, saved["start"] + len(saved["weight"])) - start
    if count <= 0:
        return 0
    for key in ("weight", *zero.keys(name)):
        part = saved[key].narrow(0, start - saved["start"], count)
        zero.local(name, key).narrow(0, start - mine.start, count).copy_(part)
    return count
