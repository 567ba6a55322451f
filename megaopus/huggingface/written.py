"""Writes a model folder: config.json, safetensors files that never hold more than one tensor in memory, an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megaopus.errors import ModelError
from megaopus.huggingface.folder import INDEX, WHOLE

DTYPES = {"fp32": (torch.float32, "F32", 4), "bf16": (torch.bfloat16, "BF16", 2), "fp16": (torch.float16, "F16", 2)}
"""Our name -> (torch's, safetensors', bytes)."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]

    def bytes(self, width: int) -> int:
        """Of it at ``width`` bytes a number."""
        count = width
        for size in self.shape:
            count *= size
        return count


def shards(planned: Iterable[Planned], width: int, most: int) -> list[list[Planned]]:
    """Cut tensors into files of at most ``most`` bytes, in their order; a larger one has a file of its own."""
    found: list[list[Planned]] = []
    size = most + 1
    for each in planned:
        if size + each.bytes(width) > most:
            found.append([])
            size = 0
        found[-1].append(each)
        size += each.bytes(width)
    return found


def write_tensors(
    folder: Path, planned: Iterable[Planned], read: Callable[[Planned], Tensor], dtype: str, most: int
) -> list[str]:
    """Write all tensors, each of which ``read`` gives when its turn has come; returns the files' names.

    The form of a file is safetensors' own: the header's length in eight bytes, the header (JSON: name -> type, shape,
    place), the numbers, little-endian, one tensor after the other (https://github.com/huggingface/safetensors).
    """
    kind, theirs, width = DTYPES[dtype]
    files = shards(planned, width, most)
    names = [WHOLE] if len(files) == 1 else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in _from_1(files)]
    total = 0
    for name, content in zip(names, files, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for each in content:
            header[each.name] = {
                "dtype": theirs,
                "shape": list(each.shape),
                "data_offsets": [end, end := end + each.bytes(width)],
            }
        total += end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with _file(folder / name) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for each in content:
                tensor = read(each)
                if tuple(tensor.shape) != each.shape:
                    raise ModelError(f"{each.name}: shape {tuple(tensor.shape)}, expected {each.shape}")
                file.write(tensor.to(kind).contiguous().view(torch.uint8).numpy().data)
    if len(files) > 1:
        places = {each.name: name for name, content in zip(names, files, strict=True) for each in content}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / INDEX, index)
        names = [*names, INDEX]
    return names


def write_json(path: Path, value: Any) -> None:
    """Write it as Hugging Face's files are: indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_1(values: list[Any]) -> range:
    return range(1, len(values) + 1)


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("wb") as file:
            yield file
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror}); name another folder, or free room") from error
