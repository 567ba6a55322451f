"""Reads a Hugging Face model folder: its ``config.json``, and parts of the tensors in its safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megaopus.errors import ModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class Stored:
    """Says where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it: F32, BF16, F16."""


LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
"""Entries of config.json that say how many positions a model has, in the order in which they count."""
FLOATS = ("F32", "BF16", "F16")
PIECE_BYTES = 32 << 20
"""Of a tensor that are read at a time."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder whose headers were read; tensors are read when they are asked for."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Read ``config.json`` and the headers of the weights.

        Raises ModelError if one is missing or damaged, or if weights are pickled or of other types than ``FLOATS``.
        """
        folder = Path(path)
        config = read_config(folder)
        files = _files(folder)
        found: dict[str, Stored] = {}
        for file in files:
            found |= _header(file)
        if wrong := sorted(name for name, each in found.items() if each.dtype not in FLOATS):
            each = found[wrong[0]]
            raise ModelError(f"{each.file}: {wrong[0]} is {each.dtype}; weights must be one of {', '.join(FLOATS)}")
        return cls(folder, config, found)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {name: each.shape for name, each in self.tensors.items()}

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, in its own type; of the file no more than ``PIECE_BYTES`` are in memory beside it."""
        rows, *others = (each.indices(size) for each, size in zip(part, self.tensors[name].shape, strict=True))
        of_row = 4 * math.prod(self.tensors[name].shape[1:])  # bytes at most, of whole rows: so they lie in the file
        step = max(1, PIECE_BYTES // of_row)
        if rows[1] - rows[0] <= step or rows[2] != 1:
            return self._piece(name, part)
        shape = [len(range(*each)) for each in (rows, *others)]
        found: Tensor | None = None
        for first in range(rows[0], rows[1], step):
            piece = self._piece(name, (slice(first, min(first + step, rows[1])), *part[1:]))
            found = piece.new_empty(shape) if found is None else found
            found[first - rows[0] :][: len(piece)] = piece
        assert found is not None
        return found

    def _piece(self, name: str, part: tuple[slice, ...]) -> Tensor:
        from safetensors import safe_open

        # opened anew: pages of a file that stays open count as this process's memory
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_slice(name)[part].clone()


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model folder. Raises ModelError if there is none, or no object in it."""
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = "no such folder" if not folder.is_dir() else f"cannot be read ({error.strerror})"
        raise ModelError(f"{file}: {what}; name a folder as save_pretrained or the Hugging Face hub make it") from error
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds no object")
    return found


def positions(config: Mapping[str, Any]) -> int:
    """Say how many positions the model of a ``config.json`` was made for. Raises ModelError if it does not say."""
    found = next((config[key] for key in LENGTHS if isinstance(config.get(key), int)), None)
    if found is None:
        raise ModelError(f"{CONFIG}: none of {', '.join(LENGTHS)} says how many positions the model has")
    return found


def _files(folder: Path) -> list[Path]:
    """The safetensors files of the model."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: no weight_map in it: {error!r}") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(f"{folder}: {index.name} names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if pickled := sorted(path.name for pattern in PICKLED for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder}: weights are pickled ({pickled[0]}), and reading a pickle runs what it holds: load them where"
            " you trust them, and save_pretrained(FOLDER) writes safetensors"
        )
    raise ModelError(f"{folder}: neither {WHOLE} nor {INDEX} is there")


def _header(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return {name: Stored(file, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); copy it again") from error
