"""Checkpoints of somebody with bad intent: what they hold is not run, and they reach no file outside."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.checkpoint.manifest import COMPLETE, MANIFEST, digest_of
from megaopus.errors import CheckpointError
from tests.exact.resume_runs import settings, train
from tests.faults import reseal


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def run(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("intent")
    assert train(settings(tiny_corpus, run_dir, "train.steps=2")) == 0
    return run_dir


def in_index(weights: Path, target: Path) -> None:
    (weights / ".metadata").write_bytes(pickle.dumps(Payload(target)))


def beside_the_index(weights: Path, target: Path) -> None:
    """The real index, with the payload in a field that torch does not look at."""
    index = read_index(weights)
    index.planner_data = Payload(target)
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def in_common(weights: Path, target: Path) -> None:
    torch.save({"optimizer": Payload(target)}, weights / "common.pt")


def as_a_pickled_entry(weights: Path, target: Path) -> None:
    """A weight that the index calls bytes: torch would unpickle it."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = read_index(weights)
    name = next(iter(index.state_dict_metadata))
    index.state_dict_metadata[name] = BytesStorageMetadata()
    places = [place for place in index.storage_data if place.fqn == name]
    torch.save(Payload(target), weights / "__0_0.distcp")
    for place in places:
        info = index.storage_data[place]
        index.storage_data[place] = type(info)("__0_0.distcp", 0, (weights / "__0_0.distcp").stat().st_size)
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def in_a_shard(weights: Path, target: Path) -> None:
    size = (weights / "__0_0.distcp").stat().st_size
    torch.save(Payload(target), weights / "__0_0.distcp")
    index = read_index(weights)
    for place, info in index.storage_data.items():
        index.storage_data[place] = type(info)("__0_0.distcp", 0, size)
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def outside(weights: Path, target: Path) -> None:
    index = read_index(weights)
    for place, info in index.storage_data.items():
        index.storage_data[place] = type(info)("../../../../elsewhere.distcp", info.offset, info.length)
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def absolute(weights: Path, target: Path) -> None:
    index = read_index(weights)
    for place, info in index.storage_data.items():
        index.storage_data[place] = type(info)("/etc/hostname", info.offset, info.length)
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def read_index(weights: Path) -> Any:
    return pickle.loads((weights / ".metadata").read_bytes())


CASES: dict[Callable[[Path, Path], None], str] = {
    in_index: r"\.metadata: not read .*asks for posix\.mkdir",
    beside_the_index: r"\.metadata: not read .*asks for posix\.mkdir",
    in_common: "cannot be restored",
    as_a_pickled_entry: "is a pickled object, not a tensor",
    in_a_shard: "cannot be restored",
    outside: r"names '\.\./\.\./\.\./\.\./elsewhere\.distcp', which is no file of",
    absolute: "names '/etc/hostname', which is no file of",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_in_a_checkpoint_is_run(
    case: Callable[[Path, Path], None], run: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    other, target = tmp_path / "other", tmp_path / "owned"
    shutil.copytree(run, other)
    (checkpoint,) = complete_checkpoints(other)
    case(checkpoint / "weights", target)
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=CASES[case]):
        train(settings(tiny_corpus, tmp_path / "new", f"resume={other}"))
    assert not target.exists()
    assert not (tmp_path / "new").exists()


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["../../../outside", "/etc/hostname", "weights/../../x", "./state.json", ""])
def test_a_manifest_that_names_a_file_outside(name: str, run: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (checkpoint,) = complete_checkpoints(other)
    content = json.loads((checkpoint / MANIFEST).read_text())
    content["files"][name] = content["files"]["state.json"]
    text = json.dumps(content)
    (checkpoint / MANIFEST).write_text(text)
    (checkpoint / COMPLETE).write_text(digest_of(text))
    with pytest.raises(CheckpointError, match="which does not lie in the checkpoint"):
        train(settings(tiny_corpus, tmp_path / "new", f"resume={other}"))


def test_deepspeed_files_are_plain_tensors(tmp_path: Path) -> None:
    from megaopus.engine.deepspeed.engine import checkpoint

    class Alone:
        tp_rank = 0

    torch.save({"tp": 1, "dp": 1, "steps": Payload(tmp_path / "owned")}, tmp_path / "zero_tp000_dp00000.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        list(checkpoint._files(tmp_path, Alone()))  # type: ignore[arg-type]
    assert not (tmp_path / "owned").exists()
