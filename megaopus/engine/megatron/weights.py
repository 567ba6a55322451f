"""Reads single weights out of a checkpoint of the megatron engine, without an engine, on one process."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megaopus.errors import CheckpointError

MAIN = "optimizer.state.fp32_param."
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Our names of norms -> megatron's in its checkpoints, which are those of fused layers."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


class CheckpointWeights:
    """Hands out whole weights by our parameters' names; of the layers of one kind, one tensor holds all."""

    def __init__(self, folder: Path):
        self._reader = FileSystemReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(f"{folder}: not the weights of a checkpoint ({error})") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._folder = folder

    def names(self) -> set[str]:
        """Name of every weight in the whole model; what is kept of weights, GROUP.NAME, is none."""
        found, kept = set(), self._metadata.state_dict_metadata
        for key, stored in kept.items():
            group, _, of_weight = key.partition(".")
            if not isinstance(stored, TensorStorageMetadata) or group.startswith("optimizer") or of_weight in kept:
                continue
            for ours, theirs in _FUSED_NORMS.items():
                key = key.replace(theirs, ours)
            if key.startswith("decoder.layers."):
                rest = key.removeprefix("decoder.layers.")
                found |= {f"decoder.layers.{layer}.{rest}" for layer in range(stored.size[0])}
            else:
                found.add(key)
        return found

    def __call__(self, name: str) -> Tensor:
        """A whole weight: fp32 where the run kept one beside a 16-bit weight, else as it was trained."""
        layer = _LAYER.match(name)
        key = f"decoder.layers.{layer[2]}" if layer else name
        for ours, theirs in _FUSED_NORMS.items():
            key = key.replace(f".{ours}", f".{theirs}")
        if MAIN + key in self._metadata.state_dict_metadata:
            key = MAIN + key
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder}: no weight {name} in it")
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer:
            offsets[0], sizes[0] = int(layer[1]), 1
        found = torch.empty(sizes, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        self._reader.read_data(LoadPlan(items), _Into(found)).wait()
        return found[0] if layer else found


class _Into(DefaultLoadPlanner):
    """Has a reader put what it reads into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target
