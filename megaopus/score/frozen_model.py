"""Opens the model that documents are scored under, and its optimizer: a run's checkpoint, or a Hugging Face folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopus.build import build_engine
from megaopus.checkpoint.checkpointer import read_state, resolve
from megaopus.checkpoint.manifest import verify
from megaopus.config.compose import arranged
from megaopus.config.parse import restored
from megaopus.config.run_config import RunConfig
from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.distributed.launcher import place
from megaopus.distributed.mesh import Mesh
from megaopus.engine.gpt_forward import SequenceRules
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.errors import CheckpointError, DataError
from megaopus.huggingface.families import model_config
from megaopus.huggingface.folder import CONFIG, ModelFolder, positions
from megaopus.huggingface.start import FolderWeights
from megaopus.huggingface.tokenizer import check_tokenizer
from megaopus.plugins import notes_on_missing
from megaopus.score.base import Begin
from megaopus.start import check_same_tokenizer

LENGTH = 1024
"""Tokens of a window under a Hugging Face model, at most, unless another number is asked for."""
WARM_STEPS = 16
"""Gradients of the pool that the optimizer of a Hugging Face model has seen, unless another number is asked for."""


class FrozenModel(ABC):
    """A model that is there already, before it is built."""

    config: RunConfig
    """As for a run of it at the layout of this launch."""
    about: dict[str, Any]
    """What a column made with it depends on."""
    stamps: list[Any]
    """Names, sizes and ages of its files."""

    @abstractmethod
    def engine(self, mesh: Mesh, corpus: Corpus) -> MegatronEngine:
        """Build it at this rank's place, with its weights and what there is of its optimizer's state. Collective."""

    def warm(self, engine: MegatronEngine, begin: Begin) -> None:
        """See to it that the optimizer has a state. Collective."""
        return None

    def _built(self, mesh: Mesh, corpus: Corpus, **more: Any) -> MegatronEngine:
        unit = self.config.parallel.cp * (self.config.parallel.tp if self.config.parallel.sequence_parallel else 1)
        if self.config.data.seq_len % unit:
            raise DataError(
                f"windows of {self.config.data.seq_len} tokens cannot be split over {unit} ranks (cp, with sequence"
                " parallelism cp x tp): choose other degrees"
            )
        # what fills windows up is marked as what is outside the loss
        rules = SequenceRules(document_end=corpus.eod_id, isolated=self.config.data.document_mask, marked=True)
        engine = build_engine(self.config, mesh, corpus.vocab_size, rules=rules, **more)
        assert isinstance(engine, MegatronEngine)
        return engine


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Says how a model is to be opened."""

    overrides: Sequence[str] = ()
    """Settings of ``parallel`` and ``engine``; of a folder's optimizer ``optim`` too."""
    device: str = "auto"
    """auto, cpu or cuda, where ``overrides`` do not say it."""
    optimizer: bool = False
    """Whether the optimizer's state is needed."""
    max_tokens: int | None = None
    """Of a window, for a folder; None: ``LENGTH``, or what the model reads."""
    warm_steps: int | None = None
    """For a folder's optimizer; None: ``WARM_STEPS``."""


def find_model(path: Path, corpus: Corpus, asked: Asked) -> FrozenModel:
    """Look at a run, a checkpoint or a Hugging Face model folder.

    Raises:
        CheckpointError, ModelError: there is none that can be read here, or one of other tokens than the corpus.
        ConfigError: overrides do not fit it, or the ranks of this launch.
        DataError: options that say nothing to it, or have no such value; a run of other tokens than the corpus.
    """
    if (path / CONFIG).is_file():
        return _OfFolder(path, corpus, asked)
    if asked.max_tokens is not None:
        raise DataError(f"--max-tokens: says nothing to the run {path}, whose windows are its data.seq_len")
    if asked.warm_steps is not None:
        raise DataError(f"--warm-steps: says nothing to the run {path}, whose optimizer has a state of its own")
    return _OfRun(path, corpus, asked)


class _OfRun(FrozenModel):
    """A checkpoint of ours, with the state that its optimizer had."""

    def __init__(self, path: Path, corpus: Corpus, asked: Asked):
        folder = self._folder = resolve(str(path), path / "none")[0]
        state = read_state(folder)
        self.config, self._step = _rearranged(state, folder, asked.overrides, asked.device), state["step"]
        check_same_tokenizer(corpus, state, self.config)
        self.about = {"checkpoint": str(folder), "step": self._step}
        self.stamps = _stamps(path for path in folder.rglob("*") if path.is_file())

    def engine(self, mesh: Mesh, corpus: Corpus) -> MegatronEngine:
        if problem := verify(self._folder, mesh):
            raise CheckpointError(f"{problem}; restore it, or name another with --checkpoint")
        engine = self._built(mesh, corpus)
        engine.load(self._folder / "weights", [])
        engine.step = self._step
        return engine


class _OfFolder(FrozenModel):
    """A Hugging Face model folder: weights alone. Its optimizer is shown gradients of the pool, and no weight moves."""

    def __init__(self, path: Path, corpus: Corpus, asked: Asked):
        folder = self._folder = ModelFolder.open(path)
        sections, first = ("optim",) if asked.optimizer else (), [_BEGINS, f"engine.device={asked.device}"]
        config = arranged(asked.overrides, model_config(folder.config), place().world_size, sections, first=first)
        _refuse_other_engines(config)
        most = positions(folder.config)
        if asked.max_tokens is not None and not 0 < asked.max_tokens <= most:
            raise DataError(f"--max-tokens {asked.max_tokens}: {path} reads 1 to {most:,} tokens")
        check_tokenizer(path, corpus)
        config.data.document_mask, config.data.seq_len = False, asked.max_tokens or min(most, LENGTH)
        self.config = config
        self.about = {"checkpoint": str(path)}
        self.stamps = _stamps([path / CONFIG, *{each.file for each in folder.tensors.values()}])
        self._warm_steps = 0
        if asked.optimizer:
            self._prepare_warming(corpus, WARM_STEPS if asked.warm_steps is None else asked.warm_steps)

    def _prepare_warming(self, corpus: Corpus, steps: int) -> None:
        optim = self.config.optim
        if steps < 1:
            raise DataError(f"--warm-steps {steps}: must be at least 1, or the optimizer has no state")
        if optim.spec().curvature:
            raise DataError(
                f"optim.name={optim.name}: its state is of gradients of labels that the model draws, which are not made"
                " here: choose another optimizer"
            )
        self._pool = Sequences(corpus, "pool", self.config.data.seq_len)
        self._warm_steps, self._batch = steps, min(len(self._pool), self.config.train.global_batch_size)
        self.about |= {"warm_steps": steps, "warm_sequences": self._batch, "optim": asdict(optim)}

    def engine(self, mesh: Mesh, corpus: Corpus) -> MegatronEngine:
        return self._built(mesh, corpus, start=FolderWeights(self._folder.path, self.config.model, mesh))

    def warm(self, engine: MegatronEngine, begin: Begin) -> None:
        """Make as many updates at a learning rate of 0, each by the mean gradient of other sequences of the pool.

        Raises CheckpointError for a gradient that is not finite, and an optimizer that moves weights all the same.
        """
        if not self._warm_steps:
            return
        stream = CandidateStream(self._pool, self._batch, self.config.seed, "static warm")
        tokens = self._batch * self.config.data.seq_len
        advance = begin("optimizer's state", self._warm_steps * tokens)
        before = _sums(engine)
        for step in range(self._warm_steps):
            if not engine.absorb(stream.at(step)):
                raise CheckpointError(f"{self._folder.path}: the gradient of the pool's loss is not finite")
            advance(tokens)
        if engine.mesh.any(not torch.equal(_sums(engine), before)):
            raise CheckpointError(
                f"optim.name={self.config.optim.name}: moves weights at a learning rate of 0, so that its state cannot"
                " be made here: choose another optimizer"
            )


_BEGINS = "experiment=continue"
"""What a folder's optimizer is, unless overrides say otherwise: that of a run that goes on with it."""


def _rearranged(state: dict[str, Any], folder: Path, overrides: Sequence[str], device: str) -> RunConfig:
    """Give the checkpoint's settings at the layout of this launch."""
    config = restored(state["config"], str(folder / "state.json"))
    if config.engine.name != "megatron":
        raise CheckpointError(
            f"{folder}: a checkpoint of engine.name={config.engine.name}; score reads those of the megatron engine"
        )
    if not config.optim.is_known():
        missing = "; ".join(notes_on_missing(config.plugins, folder)) or "no plugin of it is named"
        raise CheckpointError(f"{folder}: no optimizer {config.optim.name!r} here ({missing}): give --plugin MODULE")
    own, sharded = config.engine, "parallel.distributed_optimizer"
    if any(text.lstrip("+").startswith(sharded) for text in overrides):
        raise DataError(f"{sharded}: is the checkpoint's own ({config.parallel.distributed_optimizer}); leave it out")
    first = [f"engine.device={device}", f"{sharded}={str(config.parallel.distributed_optimizer).lower()}"]
    if not any(text.lstrip("+").startswith("engine=") for text in overrides):
        first += [f"engine.precision={own.precision}", f"engine.recompute={str(own.recompute).lower()}"]
        first.append(f"engine.timeout_minutes={own.timeout_minutes}")
        first.append(f"engine.deterministic={str(own.deterministic).lower()}")
    laid_out = arranged(overrides, config.model, place().world_size, first=first)
    _refuse_other_engines(laid_out)
    config.parallel, config.engine = laid_out.parallel, laid_out.engine
    config.model = replace(config.model, dropout=0.0)
    return config


def _refuse_other_engines(config: RunConfig) -> None:
    if config.engine.name != "megatron":
        raise DataError(f"engine.name={config.engine.name}: score runs on the megatron engine alone; leave it out")


def _stamps(files: Iterable[Path]) -> list[Any]:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)]


def _sums(engine: MegatronEngine) -> Tensor:
    """(parameters,) float64: the sum of what this rank's optimizer updates of each."""
    return torch.stack([piece.main.sum(dtype=torch.float64) for piece in engine.optimizer.pieces().values()])
