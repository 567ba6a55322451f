"""The one composition root: a RunConfig becomes a run folder and a Trainer."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megaopus.checkpoint.checkpointer import Checkpoint, Checkpointer, locate, set_aside
from megaopus.checkpoint.lock import run_lock
from megaopus.config.parse import to_yaml
from megaopus.config.resume_policy import Change, changes, check_identity, refuse_unallowed
from megaopus.config.run_config import RunConfig, default_settings
from megaopus.data.candidates import CandidateStream, evaluation_buffers
from megaopus.data.corpus import Corpus
from megaopus.data.mixture import continued, parse_stages, plain
from megaopus.data.score_filter import kept_documents
from megaopus.data.sequences import Sequences
from megaopus.data.text_features import SequenceTextFeatures, ensure_text_features
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh
from megaopus.engine.deepspeed.engine import DeepSpeedEngine
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.errors import CheckpointError
from megaopus.models.flops import count_parameters
from megaopus.record.recorder import Recorder
from megaopus.selection import SelectionConfig, Selector
from megaopus.training.signals import STOP_EXIT_CODE, StopSignal
from megaopus.training.spike_guard import SpikeGuard
from megaopus.training.straggler import StragglerDetector
from megaopus.training.trainer import Trainer
from megaopus.training.watchdog import HangWatchdog

PACKAGES = ("megaopus", "torch", "megatron-core", "deepspeed", "tokenizers", "numpy")
"""Whose versions a run's environment.json tells."""
WATCH_SHARE = 0.5
"""Part of ``engine.timeout_minutes`` without progress after which ranks say where they are; then collectives fail."""


def train(config: RunConfig) -> int:
    """Run or resume a training job on this rank; returns the process's exit status (0, or 143 after SIGTERM).

    Nothing is written before the model is built and the checkpoint, if there is one, restored.
    """
    with StopSignal() as stop:
        mesh = Mesh(config.parallel, config.engine.device, config.engine.timeout_minutes)
        watch = HangWatchdog(mesh, WATCH_SHARE * 60 * config.engine.timeout_minutes)
        try:
            with _locked(Path(config.run_dir), mesh):
                return _train(config, mesh, stop, watch)
        finally:
            watch.close()
            mesh.close()


@contextmanager
def _locked(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Rank 0 holds the run folder's lock; refused on every rank if another job does. Collective."""
    with ExitStack() as held:
        on_rank_0(mesh, lambda: held.enter_context(run_lock(run_dir)))
        yield


def _train(config: RunConfig, mesh: Mesh, stop: StopSignal, watch: HangWatchdog) -> int:
    run_dir = Path(config.run_dir)
    checkpoint = locate(config.resume, run_dir, mesh)
    changed: list[Change] = []
    if checkpoint is not None:
        config.data.weights = _continued_weights(checkpoint, config)
    corpora = Corpora(config)
    trainer = build_trainer(config, mesh, corpora, stop)
    trainer.phase = watch.phase
    if checkpoint is not None:
        check_identity(checkpoint.state["identity"], trainer.identity, checkpoint.folder)
        changed = changes(checkpoint.state["config"], trainer.config, default_settings(config))
        if checkpoint.own:  # a new run that begins at another's checkpoint is meant to be different
            refuse_unallowed(changed, config.resume_allow, checkpoint.folder)
        trainer.restore(checkpoint)
    on_rank_0(mesh, lambda: _begin(config, run_dir, mesh, checkpoint, trainer.identity["corpus"]))
    monitor = Recorder(
        config.logging,
        run_dir,
        config.train.steps,
        is_writer=mesh.rank == 0,
        # Rows in a folder without checkpoints of its own are of a launch that begins again.
        resume_step=checkpoint.step if checkpoint is not None and checkpoint.own else 0,
        wandb_config=trainer.config,
    )
    try:
        if checkpoint is not None:
            for problem in checkpoint.damaged:
                monitor.note(f"WARNING checkpoint passed over for an older one: {problem}")
            monitor.note(f"resumed from {checkpoint.folder} after {checkpoint.step} steps")
            if changed:
                lines = ", ".join(f"{key} {saved!r} -> {now!r}" for key, saved, now in changed)
                monitor.note(f"settings changed since that checkpoint: {lines}")
        monitor.note(_derived(config, mesh, corpora, trainer))
        reason = trainer.run(monitor)
    finally:
        monitor.close()
    return 0 if reason is None else STOP_EXIT_CODE


def _begin(config: RunConfig, run_dir: Path, mesh: Mesh, checkpoint: Checkpoint | None, corpus: str) -> None:
    """Rank 0, when nothing can be refused any more: the first that is written."""
    if checkpoint is not None and checkpoint.own:
        for folder in checkpoint.passed_over:
            set_aside(folder)
    write_run_folder(config, run_dir, mesh, 0 if checkpoint is None else checkpoint.step, corpus)


def build_trainer(config: RunConfig, mesh: Mesh, corpora: Corpora, stop: StopSignal) -> Trainer:
    """Engine, data and selector of this rank, from the config alone; writes nothing."""
    engine = build_engine(config, mesh, corpora.pool.corpus.vocab_size)
    selection = config.selection
    proxy = pool = None
    if selection.needs_proxy:
        proxy = proxy_stream(config, corpora).at
    if selection.needs_pool:
        pool = CandidateStream(corpora.pool, selection.proxy_batch_size, config.seed, "contrast").at
    selector = Selector(
        selection,
        engine.scoring_backend(),
        num_selected=config.train.global_batch_size,
        proxy=proxy,
        pool=pool,
        seed=config.seed,
        wanted=partial(_is_wanted, config.data.target_domains),
        text_features=corpora.text_features(selection, mesh) if selection.needs_text_features else None,
    )
    validation = evaluation_buffers(corpora.validation, config.train.eval_sequences)
    return Trainer(
        engine=engine,
        stream=candidate_stream(config, corpora),
        selector=selector,
        checkpointer=Checkpointer(config.checkpoint, Path(config.run_dir), mesh),
        validation=validation,
        wanted=config.data.target_domains or list(validation),
        guard=SpikeGuard(config.train.spike_factor, config.train.spike_window, clipped=config.optim.clip_grad > 0),
        max_skipped=config.train.max_skipped,
        pace=StragglerDetector(config.logging.every, mesh.gather_objects),
        stop_requested=lambda: _agreed(mesh, stop),
        identity=_identity(config, corpora, bf16=engine.bf16),
        config=asdict(config),
        total_steps=config.train.steps,
        tokens_per_step=config.train.global_batch_size * config.data.seq_len,
        eval_every=config.train.eval_every,
    )


def candidate_stream(config: RunConfig, corpora: Corpora) -> CandidateStream:
    """The buffers of a run."""
    return CandidateStream(
        corpora.pool,
        config.buffer_size(),
        config.seed,
        serves=config.selection.score_every,
        stages=parse_stages(config.data.weights),
    )


def proxy_stream(config: RunConfig, corpora: Corpora) -> CandidateStream:
    """The proxy batches of a run."""
    return CandidateStream(corpora.proxy(), config.selection.proxy_batch_size, config.seed, "proxy")


def _is_wanted(wanted: list[str], candidates: Any) -> torch.Tensor:
    """(N,) which of the candidates are of a wanted domain."""
    names = candidates.domain_names
    return torch.tensor([names[index] in wanted for index in candidates.domains])


def build_engine(config: RunConfig, mesh: Mesh, vocab_size: int) -> MegatronEngine | DeepSpeedEngine:
    """The engine of this rank; ``vocab_size`` is the tokenizer's."""
    kind: type[MegatronEngine | DeepSpeedEngine] = MegatronEngine
    if config.engine.name == "deepspeed":
        kind = DeepSpeedEngine
    return kind(
        mesh,
        model=config.model,
        optim=config.optim,
        engine=config.engine,
        parallel=config.parallel,
        vocab_size=config.model.vocab_size or vocab_size,
        seq_len=config.data.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        total_steps=config.train.steps,
        seed=config.seed,
    )


class Corpora:
    """The pool, the proxy and the validation set of a run, opened once."""

    def __init__(self, config: RunConfig):
        self._config = config.data
        self._opened: dict[str, Corpus] = {}
        data = config.data
        pool = self._open(data.path)
        self.pool = Sequences(pool, "pool", data.seq_len, kept=kept_documents(pool, data.filter))
        self.validation = Sequences(self._open(data.validation_path or data.path), "validation", data.seq_len)

    def proxy(self) -> Sequences:
        data = self._config
        return Sequences(self._open(data.proxy_path or data.path), "proxy", data.seq_len, data.target_domains or None)

    def text_features(self, selection: SelectionConfig, mesh: Mesh) -> SequenceTextFeatures:
        """Of the pool's sequences, computed by rank 0 if they are not there."""
        proxy = self.proxy()
        folder = on_rank_0(
            mesh, lambda: ensure_text_features(self.pool, proxy, self._config.text_features_path, Console())
        )
        return SequenceTextFeatures(self.pool, folder, selection.prescreen.text_features)

    def _open(self, path: str) -> Corpus:
        if path not in self._opened:
            self._opened[path] = Corpus.open(path)
        return self._opened[path]


def _agreed(mesh: Mesh, stop: StopSignal) -> str | None:
    """The stop reason if any rank has one; all ranks get an answer at the same step."""
    if not mesh.any(stop.reason is not None):
        return None
    return stop.reason or "another rank was asked to stop"


def _identity(config: RunConfig, corpora: Corpora, *, bf16: bool) -> dict[str, Any]:
    """What must be equal for a checkpoint to mean the same thing: its form, sample order, model shape, optimizer."""
    # What came later is named where it is used: checkpoints written before it go on.
    later: dict[str, Any] = {} if config.engine.name == "megatron" else {"engine": config.engine.name}
    if config.data.weights:
        later["weighted"] = True  # domains have epochs of their own then
    if corpora.pool.kept is not None:
        later["filter"] = corpora.pool.kept.identity
    return later | {
        "corpus": corpora.pool.corpus.fingerprint,
        "seq_len": config.data.seq_len,
        "seed": config.seed,
        "model": asdict(config.model),
        "precision": "bf16" if bf16 else "fp32",
        "optimizer": config.optim.name,
        "global_batch_size": config.train.global_batch_size,
        "num_candidates": config.buffer_size(),
    }


def _continued_weights(checkpoint: Checkpoint, config: RunConfig) -> list[Any]:
    """The stages of ``data.weights`` that the run had until the checkpoint, then those that it is given now."""
    before, now = (parse_stages(weights) for weights in (_saved_weights(checkpoint), config.data.weights))
    return plain(continued(before, now, checkpoint.step)) if before and now else config.data.weights


def _saved_weights(checkpoint: Checkpoint) -> list[Any]:
    return checkpoint.state["config"].get("data", {}).get("weights", [])


def _derived(config: RunConfig, mesh: Mesh, corpora: Corpora, trainer: Trainer) -> str:
    """The line printed before step 0: what follows from the config and the machine."""
    shape = mesh.shape
    train = config.train
    vocab_size = config.model.vocab_size or corpora.pool.corpus.vocab_size
    parameters = count_parameters(config.model, vocab_size, config.data.seq_len)
    engine = config.engine.name
    if engine == "deepspeed":
        engine += f" (ZeRO stage {config.engine.zero_stage})"
    parts = [
        f"{shape.world_size} rank(s) on {mesh.device.type}: dp={shape.dp} tp={shape.tp} cp={shape.cp} pp={shape.pp}",
        f"{parameters:,} parameters, {trainer.identity['precision']}, {config.optim.name}, {engine}",
        f"{train.steps} steps of {train.global_batch_size} x {config.data.seq_len} tokens",
        f"{config.selection.method} picks {train.global_batch_size} of {config.num_candidates()} candidates",
        f"pool of {len(corpora.pool):,} sequences ({corpora.pool.corpus.fingerprint[:12]})",
    ]
    if (kept := corpora.pool.kept) is not None:
        told = kept.told(corpora.pool.corpus)
        parts.append(f"filtered {next(iter(told))}: {told['all']}")
    if config.data.weights:
        stream = typing.cast(CandidateStream, trainer.stream)
        drawn = ", ".join(f"{name} {epochs:.2f}" for name, epochs in stream.epochs(train.steps).items())
        parts.append(f"domains by weight; epochs of each by the last step: {drawn}")
    return " | ".join(parts)


def write_run_folder(config: RunConfig, run_dir: Path, mesh: Mesh, first_step: int, corpus: str) -> None:
    """config.yaml, environment.json and launch.sh: what this launch runs with, where, and how it was started.

    ``first_step``: the first that it takes; ``corpus``: the pool's fingerprint.

    Each launch also keeps them under ``launches/NNN``, so that a resumed run still tells how it began.
    Raises CheckpointError if the folder cannot be written.
    """
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": mesh.device.type,
        "world_size": mesh.shape.world_size,
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_revision(),
        "arguments": sys.argv[1:],
        "first_step": first_step,
        "corpus": corpus,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    contents = {
        "config.yaml": to_yaml(config),
        "environment.json": json.dumps(environment, indent=1) + "\n",
        "launch.sh": _launch_script(mesh.shape.world_size),
    }
    try:
        launches = run_dir / "launches"
        launches.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name) for path in launches.iterdir() if path.name.isdecimal()), default=-1)
        partial = launches / "partial"
        partial.mkdir(exist_ok=True)
        for name, text in contents.items():
            _write(partial / name, text)
        partial.rename(launches / f"{number:03d}")
        for name, text in contents.items():
            _write(run_dir / name, text)
    except OSError as error:
        raise CheckpointError(f"{run_dir}: the run folder cannot be written ({error}); set another run_dir") from error


def _launch_script(world_size: int) -> str:
    """The command of this launch, from the folder it was given in.

    Who starts the ranks without torchrun says how in the environment: MEGAOPUS_LAUNCHER, a whole command.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    program = "python"
    if world_size > 1:
        nodes = f"--nnodes {world_size // per_node} " if world_size > per_node else ""
        program = f"torchrun {nodes}--nproc-per-node {per_node}"
    command = os.environ.get("MEGAOPUS_LAUNCHER") or f"{program} -m megaopus {shlex.join(sys.argv[1:])}"
    return f"#!/usr/bin/env bash\nset -euo pipefail\ncd {shlex.quote(os.getcwd())}\n{command}\n"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str | None:
    """Commit of the source tree, with "+" if it has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
