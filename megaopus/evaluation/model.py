"""Opens a model to be evaluated (a run, a checkpoint, a Hugging Face folder) at the layout of this launch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megaopus.checkpoint.checkpointer import read_state, resolve
from megaopus.checkpoint.manifest import verify
from megaopus.config.compose import layout
from megaopus.config.parse import restored
from megaopus.config.run_config import RunConfig
from megaopus.data.tokenizer import EOD, load_tokenizer
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.base import Engine
from megaopus.engine.config import EngineConfig
from megaopus.errors import CheckpointError, DataError, ModelError
from megaopus.export import trained_on
from megaopus.huggingface.families import model_config
from megaopus.huggingface.folder import CONFIG, ModelFolder, positions
from megaopus.huggingface.side_files import FOLDER
from megaopus.huggingface.start import FolderWeights
from megaopus.models.config import ModelConfig
from megaopus.models.gpt import Start
from megaopus.selection.config import PASS_TOKENS
from megaopus.start import checkpoint_weights


@dataclass(frozen=True, kw_only=True)
class Found:
    """Says what a path holds, before anything of it is built."""

    path: Path
    step: int | None
    """Updates that a checkpoint of ours has had."""
    run: RunConfig | None
    """The settings of the run that wrote it."""
    model: ModelConfig
    vocab_size: int
    max_length: int
    """Positions that the model was made for."""
    words: Words

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the weights: of the files' names, sizes and times."""
        files = sorted(path for path in self.path.rglob("*") if path.suffix in (".safetensors", ".distcp", ".pt"))
        stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Words:
    """Holds what turns a model's text into tokens."""

    tokenizer: Tokenizer
    prefix: int
    """Token before a text that has nothing before it."""
    end: int
    """Token that ends a text."""
    folder: Path
    """Where the tokenizer lies; a chat template may lie beside it."""


def find(path: Path) -> Found:
    """Look at a run folder, a checkpoint of ours, or a Hugging Face model folder.

    Raises CheckpointError or ModelError if it is none, or has no tokenizer.
    """
    if (path / CONFIG).is_file():
        folder = ModelFolder.open(path)
        model = model_config(folder.config)
        assert model.vocab_size is not None
        words = words_of(path)
        length = positions(folder.config)
        return Found(
            path=path, step=None, run=None, model=model, vocab_size=model.vocab_size, max_length=length, words=words
        )
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run, a checkpoint or a Hugging Face model folder")
    checkpoint = resolve(str(path), Path("/nowhere"))[0]
    state = read_state(checkpoint)
    config = restored(state["config"], str(checkpoint / "state.json"))
    return _found_run(checkpoint, config, state["step"])


def _found_run(checkpoint: Path, config: RunConfig, step: int) -> Found:
    beside = checkpoint.parent.parent / FOLDER
    size = config.model.vocab_size
    if size is not None and (beside / "tokenizer.json").is_file():
        words = words_of(beside)
    else:
        corpus = trained_on(config, checkpoint)
        size = config.model.derived_vocab_size(corpus.vocab_size)
        words = words_of(corpus.path, corpus.eod_id)
    length = positions_of(config, beside)
    return Found(
        path=checkpoint, step=step, run=config, model=config.model, vocab_size=size, max_length=length, words=words
    )


@contextmanager
def opened(found: Found, overrides: list[str], world_size: int) -> Iterator[tuple[Engine, Mesh]]:
    """Build the model with its weights alone, at the layout that ``overrides`` name. Collective.

    Raises ConfigError, CheckpointError (every byte of a checkpoint is checked), ModelError.
    """
    parallel, engine = layout(overrides, found.model, world_size)
    mesh = Mesh(parallel, engine.device, engine.timeout_minutes, engine.deterministic)
    try:
        yield engine_of(found, mesh, parallel, engine), mesh
    finally:
        mesh.close()


def engine_of(found: Found, mesh: Mesh, parallel: ParallelConfig, engine: EngineConfig) -> Engine:
    """Build the model with its weights alone, for this rank. Raises as ``opened``."""
    weights: Start
    seq_len = found.max_length
    if found.run is None:
        weights = FolderWeights(found.path, found.model, mesh)
    else:
        if problem := verify(found.path, mesh):
            raise CheckpointError(f"{problem}; restore it, or name another checkpoint")
        seq_len = found.run.data.seq_len
        weights = checkpoint_weights(found.path, found.run, found.vocab_size, mesh)
    return engine.spec().load_class()(
        mesh,
        model=found.model,
        optim=None,
        engine=engine,
        parallel=parallel,
        vocab_size=found.vocab_size,
        seq_len=seq_len,
        micro_batch_size=max(1, PASS_TOKENS["cpu" if mesh.on_cpu else "cuda"] // seq_len),
        total_steps=1,
        seed=0,
        start=weights,
    )


def positions_of(config: RunConfig, *folders: Path) -> int:
    """Say how many positions the model of a run was made for: more than its sequences have, if it came from elsewhere.

    ``folders``: where what came with the model may lie.
    """
    for folder in folders:
        if (folder / CONFIG).is_file():
            return positions(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    return config.data.seq_len


def words_of(folder: Path, end: int | None = None) -> Words:
    """Read the tokenizer of a folder; ``end``: the end-of-document token of a corpus. Raises ModelError.

    Special tokens written in a text are read as such: chat templates write them.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        raise ModelError(f"{error}; copy the model's tokenizer.json there") from error
    tokenizer.encode_special_tokens = False
    if end is not None:
        return Words(tokenizer=tokenizer, prefix=end, end=end, folder=folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = {}
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        ids[name] = None if token is None else tokenizer.token_to_id(token)
    end = next((each for each in (ids["eos_token"], tokenizer.token_to_id(EOD)) if each is not None), None)
    if end is None:
        raise ModelError(f"{file}: names no eos_token that the tokenizer has; add the token that ends a text")
    prefix = ids["bos_token"]
    return Words(tokenizer=tokenizer, prefix=end if prefix is None else prefix, end=end, folder=folder)
