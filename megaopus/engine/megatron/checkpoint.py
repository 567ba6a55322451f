"""Saves and reads megatron's sharded format without other processes, and without running what a file holds."""

from __future__ import annotations

import inspect
import pickle
import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaopus.checkpoint.pending_save import PendingSave
from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import deal
from megaopus.errors import EngineError


def save_strategy(mesh: Mesh) -> Any:
    """A sharded save strategy for ``dist_checkpointing.save`` whose request ``megatron_saving`` can carry out.

    Ranks that have the same tensors share the writing of them.
    """
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    if mesh.shape.dp * mesh.shape.cp == 1:
        return _in_process_save()
    return FullyParallelSaveStrategyWrapper(_in_process_save(), mesh.dp_cp_group)


_OF_EXPERTS = ".mlp.experts."
"""In the names of experts' tensors."""


def load_dealt(wanted: dict[str, Any], folder: Path, mesh: Mesh, shared: Callable[[str], bool]) -> dict[str, Any]:
    """Load ``wanted`` as ``dist_checkpointing.load`` does; of the dp and cp ranks one reads a tensor and sends it on.

    ``shared``: first key -> whether all of them want the same of what is under it; else each reads its own. Nothing is
    held twice: what others read comes into the tensors of ``wanted``. Collective.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    ranks, rank = mesh.shape.dp * mesh.shape.cp, dist.get_rank(mesh.dp_cp_group)
    load = partial(dist_checkpointing.load, checkpoint_dir=str(folder), common_strategy=_plain_common_strategy())
    if ranks == 1:
        return load(wanted)
    apart = mesh.shape.ep > 1  # each rank has experts of its own
    leaves = [
        (path, leaf)
        for path, leaf in _tensors_in(wanted)
        if shared(path[0]) and not (apart and _OF_EXPERTS in leaf.key)
    ]
    readers = deal([leaf.data.numel() for _, leaf in leaves], ranks)
    request = _copied(wanted)
    for (path, leaf), reader in zip(leaves, readers, strict=True):
        mine = replace(leaf, replica_id=(*leaf.replica_id[:-1], 0))
        _at(request, path[:-1])[path[-1]] = mine if reader == rank else LocalNonpersistentObject(leaf.data)
    found: dict[str, Any] = _with_lists(load(request), wanted)
    for (path, leaf), reader in zip(leaves, readers, strict=True):
        value = (_at(found, path) if reader == rank else leaf.data).detach()
        assert value.is_contiguous()
        dist.broadcast(value, group=mesh.dp_cp_group, group_src=reader)
    return found


def _tensors_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (keys that lead to it, sharded tensor of megatron or what makes some) in one order on every rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(tree, ShardedTensor | ShardedTensorFactory):
        yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _tensors_in(value, (*path, key))


def _copied(tree: Any) -> Any:
    """Copy dictionaries, and lists that have tensors in them as dictionaries, which may be loaded in part."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list) and any(True for _ in _tensors_in(tree)):
        return {number: _copied(value) for number, value in enumerate(tree)}
    return tree


def _with_lists(tree: Any, like: Any) -> Any:
    """Make lists of dictionaries that ``_copied`` made of lists in ``like``."""
    if isinstance(like, list) and isinstance(tree, dict):
        return [_with_lists(tree[number], value) for number, value in enumerate(like)]
    if isinstance(like, dict) and isinstance(tree, dict):
        return {key: _with_lists(value, like.get(key)) for key, value in tree.items()}
    return tree


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@cache
def _in_process_save() -> Any:
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
def _plain_common_strategy() -> Any:
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
