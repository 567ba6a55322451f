"""Finds the weights that a new run begins with: a Hugging Face folder, another run, or a Megatron-LM checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megaopus.checkpoint.checkpointer import read_state, resolve
from megaopus.checkpoint.manifest import verify
from megaopus.config.model_shape import OWN
from megaopus.config.parse import restored
from megaopus.config.run_config import RunConfig
from megaopus.data.corpus import Corpus
from megaopus.distributed.mesh import Mesh
from megaopus.errors import CheckpointError, DataError, ModelError
from megaopus.huggingface.families import normal
from megaopus.huggingface.folder import CONFIG
from megaopus.huggingface.start import FolderWeights
from megaopus.huggingface.tokenizer import check_tokenizer
from megaopus.models.config import ModelConfig
from megaopus.models.gpt import Start
from megaopus.models.names import whole_shapes

WEIGHTS = "weights"
"""The folder of a checkpoint of ours with its weights."""
_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


class Weights(Protocol):
    """Whole weights of a checkpoint, by our names."""

    def names(self) -> set[str]:
        """Name of every weight."""

    def __call__(self, name: str) -> Tensor:
        """Read one."""


def start_weights(config: RunConfig, mesh: Mesh, corpus: Corpus) -> Start:
    """Open the weights of ``init.path`` for this rank. Collective.

    Raises ModelError or CheckpointError if they are not of this model, or of other tokens than the corpus's.
    """
    assert config.init.path is not None
    path = Path(config.init.path)
    if (path / CONFIG).is_file():
        check_tokenizer(path, corpus)
        return FolderWeights(path, config.model, mesh)
    size = config.model.vocab_size or corpus.vocab_size
    shapes = whole_shapes(config.model, size, config.data.seq_len)
    if (megatron := _megatron_folder(path)) is not None:
        from megaopus.engine.megatron.weights import CheckpointWeights

        return _Parts(CheckpointWeights(megatron), shapes, size, mesh, megatron)
    folder = resolve(str(path), Path("/nowhere"))[0]
    if problem := verify(folder, mesh):
        raise CheckpointError(f"init.path={path}: {problem}")
    state = read_state(folder)
    source = restored(state["config"], str(folder / "state.json"))
    _check_model(source.model, config.model, folder)
    check_same_tokenizer(corpus, state, source)
    return _Parts(open_weights(folder / WEIGHTS, source), shapes, size, mesh, folder)


def open_weights(folder: Path, config: RunConfig) -> Weights:
    """Open the whole weights of a checkpoint of ours, of whichever engine wrote it; ``config``: its settings."""
    if config.engine.name == "deepspeed":
        from megaopus.engine.deepspeed.weights import CheckpointWeights as ZeroWeights

        return ZeroWeights(folder, config.model.gated)
    if config.engine.name != "megatron":
        raise CheckpointError(f"{folder}: weights of engine {config.engine.name!r} cannot be read here")
    from megaopus.engine.megatron.weights import CheckpointWeights

    return CheckpointWeights(folder)


def checkpoint_weights(folder: Path, config: RunConfig, vocab_size: int, mesh: Mesh) -> Start:
    """Open the weights of a checkpoint of ours for this rank, at whatever layout it was written; ``config``: its own.

    Raises ModelError if they are not those of its settings.
    """
    shapes = whole_shapes(config.model, vocab_size, config.data.seq_len)
    return _Parts(open_weights(folder / WEIGHTS, config), shapes, vocab_size, mesh, folder)


class _Parts:
    """Cuts a rank's parts out of whole weights. Raises ModelError if they are not those of ``shapes``."""

    def __init__(self, weights: Weights, shapes: dict[str, tuple[int, ...]], vocab_size: int, mesh: Mesh, folder: Path):
        self._weights, self._shapes, self._rows = weights, shapes, vocab_size
        self._mesh, self._folder = mesh, folder
        if wrong := sorted(weights.names() ^ shapes.keys()):
            missing = [name for name in wrong if name in shapes]
            words = f"no {missing[0]}" if missing else f"{wrong[0]}, which has no place in this model"
            raise ModelError(f"{folder}: its weights are not this model's: {words} ({len(wrong)} names differ)")

    def __call__(self, name: str, parameter: Any) -> Tensor:
        """This rank's part of a weight. Raises ModelError if the whole has another shape."""
        whole, shape = self._weights(name), self._shapes[name]
        if name in _TABLES and len(whole) >= self._rows and whole.shape[1:] == shape[1:]:
            # rows of padding count nowhere, and others may have padded otherwise
            whole = torch.cat([whole[: self._rows], whole.new_zeros(shape[0] - self._rows, *shape[1:])])
        if tuple(whole.shape) != shape:
            raise ModelError(f"{self._folder}: {name} has shape {tuple(whole.shape)}, here {shape}")
        return self._mesh.part(whole, parameter)


def _megatron_folder(path: Path) -> Path | None:
    """The folder of an iteration in a Megatron-LM checkpoint of the form torch_dist, if ``path`` is one."""
    if (marker := path / "latest_checkpointed_iteration.txt").is_file():
        number = marker.read_text(encoding="utf-8").strip()
        path = path / (f"iter_{int(number):07d}" if number.isdecimal() else number)
    own = (path / "COMPLETE").exists() or (path.parent / "COMPLETE").exists()
    return path if (path / ".metadata").is_file() and not own else None


def _check_model(theirs: ModelConfig, ours: ModelConfig, folder: Path) -> None:
    """Raise ModelError unless the two compute the same from the same weights."""
    first, second = normal(theirs), normal(ours)
    skipped = {*OWN, "vocab_size", "max_positions"}  # these are of the weights' shapes
    names = [each.name for each in fields(ModelConfig) if each.name not in skipped]
    if wrong := [name for name in names if getattr(first, name) != getattr(second, name)]:
        said = ", ".join(f"model.{name}={getattr(first, name)} (here {getattr(second, name)})" for name in wrong)
        raise ModelError(f"init.path: {folder} is of another model: {said}")


def check_same_tokenizer(corpus: Corpus, state: dict[str, Any], config: RunConfig) -> None:
    """Raise DataError unless ``corpus`` has the tokenizer of the corpus that a checkpoint was trained on."""
    if state["identity"].get("corpus") == corpus.fingerprint:
        return
    try:
        trained_on = Corpus.open(config.data.path)
    except DataError as error:
        raise DataError(
            f"{corpus.path}: not the corpus that the checkpoint was trained on, and whether it has the same tokenizer"
            f" cannot be told without that ({error})"
        ) from error
    if trained_on.tokenizer_sha256 != corpus.tokenizer_sha256:
        raise DataError(
            f"{corpus.path}: another tokenizer than that of {trained_on.path}, which the checkpoint was trained on;"
            f" prepare it with --tokenizer {trained_on.path / 'tokenizer.json'}"
        )
