"""Reads single weights out of a checkpoint of the DeepSpeed engine, without an engine, on one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopus.errors import CheckpointError

_FILE = re.compile(r"zero_tp(\d+)_dp(\d+)\.pt")
_ROWS = re.compile(r"(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(weight|bias)$")
_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")


class CheckpointWeights:
    """Hands out whole fp32 weights by our parameters' names, put together of all ranks' fragments.

    ``gated``: the MLP's first matrix is [gate; up], of each of which a tensor-parallel rank holds a share.
    """

    def __init__(self, folder: Path, gated: bool):
        files = sorted(path for path in folder.glob("zero_tp*_dp*.pt") if _FILE.fullmatch(path.name))
        if not files:
            raise CheckpointError(f"{folder}: no weights of a DeepSpeed run in it")
        self._gated = gated
        self._parts: list[list[dict[str, Any]]] = []
        """By tensor-parallel rank: the files' contents, in which tensors are read when they are used."""
        for path in files:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            rank = int(_FILE.fullmatch(path.name)[1])  # type: ignore[index]
            while len(self._parts) <= rank:
                self._parts.append([])
            self._parts[rank].append(content)
        first = self._parts[0][0]
        if len(self._parts) != first["tp"] or any(len(part) != first["dp"] for part in self._parts):
            raise CheckpointError(f"{folder}: files of {first['tp']} x {first['dp']} ranks belong there, not all do")

    def names(self) -> set[str]:
        """Name of every weight in the whole model."""
        return set(self._parts[0][0]["fragments"])

    def __call__(self, name: str) -> Tensor:
        """A whole weight, fp32."""
        parts = [self._part(contents, name) for contents in self._parts]
        if len(parts) == 1 or not (_ROWS.search(name) or _COLUMNS.search(name)):
            return parts[0]
        if _COLUMNS.search(name):
            return torch.cat(parts, 1)
        blocks = [part.chunk(2 if self._gated and "linear_fc1" in name else 1) for part in parts]
        return torch.cat([block for same in zip(*blocks, strict=True) for block in same])

    def _part(self, contents: list[dict[str, Any]], name: str) -> Tensor:
        """Put one tensor-parallel rank's part together."""
        if name not in contents[0]["fragments"]:
            raise CheckpointError(f"no weight {name} in the checkpoint")
        found = torch.empty(contents[0]["fragments"][name]["shape"], dtype=torch.float32)
        for content in contents:
            fragment = content["fragments"][name]
            found.view(-1).narrow(0, fragment["start"], len(fragment["weight"])).copy_(fragment["weight"])
        return found
