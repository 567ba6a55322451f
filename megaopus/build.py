"""The one composition root: a RunConfig becomes a run folder and a Trainer."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from megaopus.checkpoint.checkpointer import Checkpointer, read_state, resolve
from megaopus.config import RunConfig, to_yaml
from megaopus.data.candidates import CandidateStream
from megaopus.data.corpus import Corpus
from megaopus.data.sequences import Sequences
from megaopus.distributed.mesh import Mesh
from megaopus.engine.megatron import MegatronEngine
from megaopus.errors import CheckpointError
from megaopus.monitor.health import STOP_EXIT_CODE, StopSignal
from megaopus.monitor.monitor import Monitor
from megaopus.selection import Selector
from megaopus.trainer import Trainer


def train(config: RunConfig) -> int:
    """Run or resume a training job on this rank; returns the process's exit status (0, or 143 after SIGTERM)."""
    run_dir = Path(config.run_dir)
    checkpoint = resolve(config.resume, run_dir)
    state = read_state(checkpoint) if checkpoint is not None else None
    with StopSignal() as stop:
        mesh = Mesh(config.parallel, config.engine.device, config.engine.timeout_minutes)
        try:
            return _train(config, mesh, stop, checkpoint, state)
        finally:
            mesh.close()


def _train(
    config: RunConfig, mesh: Mesh, stop: StopSignal, checkpoint: Path | None, state: dict[str, Any] | None
) -> int:
    run_dir = Path(config.run_dir)
    corpora = _Corpora(config)
    identity = _identity(config, corpora)
    if state is not None:
        _check_identity(state["identity"], identity, checkpoint)
    if mesh.rank == 0:
        write_run_folder(config, run_dir, mesh.shape.world_size)
    monitor = Monitor(
        config.logging,
        run_dir,
        config.train.steps,
        is_writer=mesh.rank == 0,
        resume_step=state["step"] if state is not None else 0,
        wandb_config=asdict(config),
    )
    try:
        trainer = build_trainer(config, mesh, corpora, monitor, stop, identity)
        if checkpoint is not None and state is not None:
            trainer.restore(checkpoint, state)
            monitor.note(f"resumed from {checkpoint} after {state['step']} steps")
        monitor.note(_derived(config, mesh, corpora))
        reason = trainer.run()
    finally:
        monitor.close()
    return 0 if reason is None else STOP_EXIT_CODE


def build_trainer(
    config: RunConfig, mesh: Mesh, corpora: _Corpora, monitor: Monitor, stop: StopSignal, identity: dict[str, Any]
) -> Trainer:
    """Engine, data and selector of this rank, from the config alone."""
    engine = build_engine(config, mesh, corpora.pool.corpus.vocab_size)
    selection = config.selection
    proxy = None
    if selection.method == "opus":
        proxy = CandidateStream(corpora.proxy(), selection.proxy_batch_size, config.seed, "proxy").at
    selector = Selector(
        selection,
        engine.scoring_backend(),
        num_selected=config.train.global_batch_size,
        proxy=proxy,
        seed=config.seed,
    )
    validation = corpora.validation.fixed(config.train.eval_sequences)
    return Trainer(
        engine=engine,
        stream=CandidateStream(corpora.pool, config.num_candidates(), config.seed),
        selector=selector,
        monitor=monitor,
        checkpointer=Checkpointer(config.checkpoint, Path(config.run_dir), mesh),
        validation=validation,
        wanted=config.data.wanted or list(validation),
        stop_requested=lambda: _agreed(mesh, stop),
        identity=identity,
        total_steps=config.train.steps,
        tokens_per_step=config.train.global_batch_size * config.data.seq_len,
        eval_every=config.train.eval_every,
    )


def build_engine(config: RunConfig, mesh: Mesh, vocab_size: int) -> MegatronEngine:
    """The engine of this rank; ``vocab_size`` is the tokenizer's."""
    return MegatronEngine(
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


class _Corpora:
    """The pool, the proxy and the validation set of a run, opened once."""

    def __init__(self, config: RunConfig):
        self._config = config.data
        self._opened: dict[str, Corpus] = {}
        data = config.data
        self.pool = Sequences(self._open(data.path), "pool", data.seq_len)
        self.validation = Sequences(self._open(data.validation_path or data.path), "validation", data.seq_len)

    def proxy(self) -> Sequences:
        data = self._config
        return Sequences(self._open(data.proxy_path or data.path), "proxy", data.seq_len, data.wanted or None)

    def _open(self, path: str) -> Corpus:
        if path not in self._opened:
            self._opened[path] = Corpus.open(path)
        return self._opened[path]


def _agreed(mesh: Mesh, stop: StopSignal) -> str | None:
    """The stop reason if any rank has one; all ranks get an answer at the same step."""
    if not mesh.any(stop.reason is not None):
        return None
    return stop.reason or "another rank was asked to stop"


def _identity(config: RunConfig, corpora: _Corpora) -> dict[str, Any]:
    """What must be equal for a checkpoint to mean the same thing: sample order, model shape, optimizer."""
    return {
        "corpus": corpora.pool.corpus.fingerprint,
        "seq_len": config.data.seq_len,
        "seed": config.seed,
        "model": asdict(config.model),
        "optimizer": config.optim.name,
        "global_batch_size": config.train.global_batch_size,
        "num_candidates": config.num_candidates(),
    }


def _check_identity(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path | None) -> None:
    lines = [f"  {key}: saved {saved.get(key)!r}, now {value!r}" for key, value in now.items() if saved.get(key) != value]
    if lines:
        raise CheckpointError(
            f"{checkpoint} belongs to another run; these differ:\n" + "\n".join(lines) + "\n"
            "Set them back, or start a new run with another run_dir and resume=never"
        )


def _derived(config: RunConfig, mesh: Mesh, corpora: _Corpora) -> str:
    """The line printed before step 0: what follows from the config and the machine."""
    shape = mesh.shape
    train = config.train
    parts = [
        f"{shape.world_size} rank(s) on {mesh.device.type}: dp={shape.dp} tp={shape.tp} pp={shape.pp}",
        f"{train.steps} steps of {train.global_batch_size} x {config.data.seq_len} tokens",
        f"{config.selection.method} picks {train.global_batch_size} of {config.num_candidates()} candidates",
        f"pool of {len(corpora.pool):,} sequences ({corpora.pool.corpus.fingerprint[:12]})",
    ]
    return " | ".join(parts)


def write_run_folder(config: RunConfig, run_dir: Path, world_size: int) -> None:
    """config.yaml, environment.json and launch.sh; the run folder is the truth about a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / "config.yaml", to_yaml(config))
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": world_size,
        "packages": {name: _version(name) for name in ("megaopus", "torch", "megatron-core", "tokenizers", "numpy")},
        "git": _git_revision(),
        "arguments": sys.argv[1:],
    }
    _write(run_dir / "environment.json", json.dumps(environment, indent=1))
    program = "python" if world_size == 1 else f"torchrun --nproc-per-node {world_size}"
    command = f"{program} -m megaopus {shlex.join(sys.argv[1:])}"
    _write(run_dir / "launch.sh", f"#!/usr/bin/env bash\nset -euo pipefail\n{command}\n")


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
