"""Saves and reads megatron's sharded format without other processes, and without running what a file holds."""

from __future__ import annotations

import inspect
import pickle
import queue
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megaopus.checkpoint.pending_save import PendingSave
from megaopus.distributed.mesh import Mesh
from megaopus.errors import EngineError


@cache
def in_process_strategy() -> Any:
    """A sharded save strategy for ``dist_checkpointing.save`` whose request ``megatron_saving`` can carry out."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class InProcessSave(TorchDistSaveShardedStrategy):
        def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
            filesystem_async._results_queue = queue.Queue()  # megatron would start a manager process for it
            return super().async_save(sharded_state_dict, checkpoint_dir)

    return InProcessSave("torch_dist", 1, thread_count=1)


def megatron_saving(request: Any, folder: Path, mesh: Mesh, copy: bool) -> PendingSave:
    """Carry out megatron's ``AsyncRequest``: same files, no other process.

    ``copy``: copy the tensors to be written now; otherwise they must not change before the write.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # Without megatron's switching the garbage collector off: that is for forked processes.
    write_bucket = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)
    buckets: list[Any] = []
    if request.async_fn is not None:
        transforms, results = request.async_fn.args[0], request.async_fn_args[2]
        buckets = request.preload_fn()
    if copy:
        # Those of the CPU are the training's own: what came from a GPU is a copy already.
        own = {id(tensor) for bucket in request.async_fn_args[1] for _, tensor in bucket[2][1]} if buckets else set()
        buckets = [
            (path, key, (data, [(item, tensor.clone() if id(tensor) in own else tensor) for item, tensor in tensors]))
            for path, key, (data, tensors) in buckets
        ]

    def write() -> list[Path]:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            outcome: queue.Queue = queue.Queue()
            count: queue.Queue = queue.Queue()
            count.put(index)  # megatron's worker takes it to say that it has ended
            write_bucket(transforms, index, bucket, outcome, count, True)
            written[index] = outcome.get_nowait()[1]
            if isinstance(written[index], Exception):
                raise written[index]
        if buckets:
            results.put(written)
        return [Path(path) for path, _, _ in buckets]

    def commit() -> list[Path]:
        with mesh.megatron():
            for finalize in request.finalize_fns:
                finalize()
        return [folder / name for name in (".metadata", "metadata.json", "common.pt")] if mesh.rank == 0 else []

    return PendingSave(write, commit)


@cache
def plain_common_strategy() -> Any:
    """Reads common.pt as tensors and plain values, whatever the environment says."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class PlainCommon(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: Any) -> Any:
            return torch.load(Path(checkpoint_dir) / "common.pt", map_location="cpu", weights_only=True)

    return PlainCommon()


_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}
"""What the pickled index of torch's sharded format is made of: module -> names."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours needs")


def check_index(folder: Path) -> None:
    """Refuse an index (.metadata) that would run code or read outside ``folder`` when torch unpickles it.

    torch reads it with a bare ``pickle.load``, and entries that are marked as bytes as arbitrary pickles.

    Raises EngineError.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
        places = {info.relative_path for info in index.storage_data.values()}
        kinds = index.state_dict_metadata.items()
    except Exception as error:  # whatever broken bytes make the unpickler raise
        raise EngineError(f"{path}: not read ({error})") from error
    for place in places:
        if not isinstance(place, str) or place in ("", ".", "..") or "/" in place or (folder / place).is_symlink():
            raise EngineError(f"{path}: names {place!r}, which is no file of {folder}")
    if pickled := [name for name, kind in kinds if isinstance(kind, BytesStorageMetadata)]:
        raise EngineError(f"{path}: {pickled[0]} is a pickled object, not a tensor")
