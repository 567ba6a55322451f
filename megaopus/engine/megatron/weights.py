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

_OF_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Before what an optimizer keeps; numbered where there are two (Muon, and AdamW for the rest)."""
_MAINS = tuple(f"{optimizer}optimizer.state.fp32_param." for optimizer in ("", "chained_0.", "chained_1."))
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Our names of norms -> megatron's in its checkpoints, which are those of fused layers."""
_LAYERS = re.compile(r"^(decoder\.layers\.)(?=[a-z])")
_EXPERTS = re.compile(r"(\.mlp\.experts\.)experts\.")
"""Where the number of a layer, and of an expert, is missing in the name of a tensor that has all of them."""


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
            kept_of = key.partition(".")[2]  # GROUP.NAME
            if not isinstance(stored, TensorStorageMetadata) or _OF_OPTIMIZER.match(key) or kept_of in kept:
                continue
            for ours, theirs in _FUSED_NORMS.items():
                key = key.replace(theirs, ours)
            if _EXPERTS.search(key):
                names = {_EXPERTS.sub(rf"\1local_experts.{number}.", key) for number in range(stored.size[0])}
            elif _LAYERS.search(key):
                names = {_LAYERS.sub(rf"\g<1>{number}.", key) for number in range(stored.size[0])}
            else:
                names = {key}
            found |= names
        return found

    def __call__(self, name: str) -> Tensor:
        """A whole weight: fp32 where the run kept one beside a 16-bit weight, else as it was trained."""
        key, number = self._place(name)
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder}: no weight {name} in it")
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if number is not None:
            offsets[0], sizes[0] = number, 1
        found = torch.empty(sizes, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        self._reader.read_data(LoadPlan(items), _Into(found)).wait()
        return found if number is None else found[0]

    def _place(self, name: str) -> tuple[str, int | None]:
        """(name of the tensor that has a weight, its number among those stacked in that; None: it is alone)."""
        for ours, theirs in _FUSED_NORMS.items():
            name = name.replace(f".{ours}", f".{theirs}")
        kept, number = self._metadata.state_dict_metadata, None
        if (found := re.search(r"\.mlp\.experts\.local_experts\.(\d+)\.", name)) is not None:
            name, number = name.replace(f"local_experts.{found[1]}.", "experts."), int(found[1])
        elif name not in kept and (found := re.match(r"decoder\.layers\.(\d+)\.", name)) is not None:
            name, number = f"decoder.layers.{name[found.end() :]}", int(found[1])
        return next((main + name for main in _MAINS if main + name in kept), name), number


class _Into(DefaultLoadPlanner):
    """Has a reader put what it reads into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target
