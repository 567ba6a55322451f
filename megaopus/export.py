"""Writes a checkpoint of ours as a Hugging Face model folder, from any layout, on one process without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopus.checkpoint.checkpointer import read_state, resolve
from megaopus.checkpoint.manifest import read_manifest
from megaopus.config.parse import restored
from megaopus.config.run_config import RunConfig
from megaopus.data.corpus import TOKENIZER, Corpus
from megaopus.errors import DataError, ModelError
from megaopus.huggingface.families import Family, family_for, model_config, normal
from megaopus.huggingface.folder import CONFIG, read_config
from megaopus.huggingface.side_files import FOLDER, copy_side_files
from megaopus.huggingface.tensors import Recipe, recipes
from megaopus.huggingface.written import DTYPES, Planned, write_json, write_tensors
from megaopus.models.config import ModelConfig
from megaopus.start import WEIGHTS, open_weights

GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """Tells what was written."""

    checkpoint: Path
    architecture: str
    parameters: int
    dtype: str
    files: tuple[str, ...]


def export(
    run: str | Path, out: Path, *, dtype: str | None = None, most_bytes: int = 5 * 10**9, advance: Any = None
) -> Exported:
    """Write ``run`` (a run folder, whose newest checkpoint is taken, or a checkpoint) as a model folder ``out``.

    ``dtype``: fp32, bf16 or fp16; None: what the run computed in. ``most_bytes``: of one file. ``advance`` is told the
    numbers of each tensor written. In memory there is one tensor of ours at a time. Nothing stays of an export that
    failed. Raises CheckpointError if there is no checkpoint, ModelError if its model has no form at Hugging Face or
    ``out`` is there already.
    """
    folder = resolve(str(run), Path("/nowhere"))[0]
    read_manifest(folder)
    state = read_state(folder)
    config = restored(state["config"], str(folder / "state.json"))
    beside = folder.parent.parent / FOLDER
    corpus = None if config.model.vocab_size and (beside / TOKENIZER).is_file() else trained_on(config, folder)
    model = _model(config, corpus)
    family = family_for(model)
    dtype = dtype or state["identity"]["precision"]
    if out.exists():
        raise ModelError(f"{out} is there already: name a new folder (nothing was written)")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if beside.is_dir():
            copy_side_files(beside, partial)
        _describe(partial, family, model, config, corpus, dtype)
        made = recipes(model, model.vocab_size or 0, fused=family.fused, experts=family.experts)
        names, count = _weights(partial, made, open_weights(folder / WEIGHTS, config), dtype, most_bytes, advance)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(folder, family.architecture, count, dtype, tuple(names))


def trained_on(config: RunConfig, folder: Path) -> Corpus:
    """Open the corpus that the run was trained on, which has its tokenizer. Raises ModelError if it is gone."""
    try:
        return Corpus.open(config.data.path)
    except DataError as error:
        raise ModelError(
            f"{folder}: the tokenizer is that of the corpus, which cannot be read ({error}); put the corpus there again"
        ) from error


def _model(config: RunConfig, corpus: Corpus | None) -> ModelConfig:
    """Return the model's settings with nothing left to derive."""
    size = config.model.vocab_size
    if size is None:
        assert corpus is not None
        size = corpus.vocab_size
    return normal(
        replace(config.model, vocab_size=size, max_positions=config.model.max_positions or config.data.seq_len)
    )


def _describe(
    out: Path, family: Family, model: ModelConfig, config: RunConfig, corpus: Corpus | None, dtype: str
) -> None:
    """Write config.json, the tokenizer and what generation needs, unless they came with the model."""
    written = _settings(out, family, model, config)
    if corpus is not None:
        shutil.copyfile(corpus.path / TOKENIZER, out / TOKENIZER)
        end = corpus.tokenizer().id_to_token(corpus.eod_id)
        names = {"bos_token": end, "eos_token": end, "model_max_length": config.data.seq_len}
        write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        written |= {"bos_token_id": corpus.eod_id, "eos_token_id": corpus.eod_id}
        ends = {"bos_token_id": corpus.eod_id, "eos_token_id": corpus.eod_id}
        write_json(out / GENERATION, {"_from_model_config": True, **ends})
    kind = str(DTYPES[dtype][0]).removeprefix("torch.")
    write_json(out / CONFIG, {**written, "torch_dtype": kind, "dtype": kind})


def _settings(out: Path, family: Family, model: ModelConfig, config: RunConfig) -> dict[str, Any]:
    """config.json: that which came with the model if it still says what the model is, else one of our making."""
    if (out / CONFIG).is_file():
        given = read_config(out)
        if normal(model_config(given)) == model:
            return given
    length = {} if model.position == "learned" else {"max_position_embeddings": config.data.seq_len}
    return {"architectures": [family.architecture], **family.written(model), **length}


def _weights(
    out: Path,
    made: dict[str, Recipe],
    read: Callable[[str], Tensor],
    dtype: str,
    most_bytes: int,
    advance: Callable[[int], None] | None,
) -> tuple[list[str], int]:
    """Write the weights; returns the files' names and how many numbers they hold."""
    planned: dict[str, Planned] = {}
    owner: dict[str, str] = {}
    for name, recipe in made.items():
        for piece in recipe.pieces:
            planned[piece.name] = Planned(piece.name, piece.shape)
            owner[piece.name] = name
    last: dict[str, Any] = {}

    def value(wanted: Planned) -> Tensor:
        ours = owner[wanted.name]
        if last.get("name") != ours:  # queries, keys and values of one matrix come one after the other
            last.clear()
            last.update(name=ours, whole=read(ours))
        if advance is not None:
            advance(wanted.bytes(1))
        return _source(made[ours], wanted.name, last["whole"])

    names = write_tensors(out, planned.values(), value, dtype, most_bytes)
    return names, sum(each.bytes(1) for each in planned.values())


def _source(recipe: Recipe, name: str, whole: Tensor) -> Tensor:
    """Return a source tensor, as it stands in the file, out of the whole parameter that it is a part of."""
    parts = [(first, part) for piece, first, part in recipe.sources(whole) if piece == name]
    found = torch.cat([part for _, part in sorted(parts, key=lambda each: each[0])])
    transposed = next(piece.transposed for piece in recipe.pieces if piece.name == name)
    return found.t() if transposed else found
