"""Begins a run at the weights of a Hugging Face model folder: each rank reads its own part of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import is_split
from megaopus.errors import ModelError
from megaopus.huggingface.families import family_of, model_config
from megaopus.huggingface.folder import ModelFolder
from megaopus.huggingface.tensors import Recipe, check_tensors, recipes
from megaopus.models.config import ModelConfig
from megaopus.models.gpt import EMBEDDING

_ROWS = 4096
"""Of two tables that are compared, at a time."""


class FolderWeights:
    """Hands out parts of a model folder's weights by our parameters' names (``models.gpt.Start``).

    Raises ModelError, by name, for what the folder has too many of, lacks, or has in another shape than ``model``.
    """

    def __init__(self, path: str | Path, model: ModelConfig, mesh: Mesh):
        self.folder = ModelFolder.open(path)
        self._mesh = mesh
        self.recipes = checked(self.folder, model)

    def __call__(self, name: str, parameter: Any) -> Tensor:
        """This tensor-parallel rank's part of a parameter, in the folder's own precision."""
        size = self._mesh.parts(parameter)
        dim = parameter.partition_dim if size > 1 and is_split(parameter) else None
        rank = dist.get_rank(self._mesh.tensor_group(parameter))
        return self.recipes[name].part(self.folder.read, rank, size, dim)


def checked(folder: ModelFolder, model: ModelConfig) -> dict[str, Recipe]:
    """Return how ``model`` is made of the folder's tensors, if it is: all of them, and no others.

    Raises ModelError otherwise, and if a tied model's output layer is there and is not its embedding.
    """
    rows = model_config(folder.config).vocab_size
    assert rows is not None
    family = family_of(folder.config)
    found = recipes(model, rows, fused=family.fused, experts=family.experts)
    check_tensors(folder.shapes, found, model.tied)
    if model.tied and "lm_head.weight" in folder.tensors:
        _same(folder, found[EMBEDDING].pieces[0].name, "lm_head.weight", rows)
    return found


def _same(folder: ModelFolder, one: str, other: str, rows: int) -> None:
    columns = slice(0, folder.tensors[one].shape[1])
    for first in range(0, rows, _ROWS):
        part = (slice(first, min(first + _ROWS, rows)), columns)
        alike = folder.shapes[other] == folder.shapes[one]
        if not alike or not torch.equal(folder.read(one, part), folder.read(other, part)):
            raise ModelError(
                f"{folder.path}: tie_word_embeddings is true, but {other} is not {one}; set it to false in config.json"
                " if the model was trained with two matrices"
            )
