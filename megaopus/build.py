"""Composes a run: a RunConfig becomes a run folder and a Trainer, and nowhere else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from megaopus.checkpoint.checkpointer import Checkpoint, Checkpointer, locate, set_aside, temporary_checkpoints
from megaopus.config.parse import to_yaml
from megaopus.config.resume_policy import Began, Change, changes, check_identity, continued, refuse_unallowed
from megaopus.config.run_config import RunConfig, default_settings
from megaopus.data.corpus import Corpus
from megaopus.data.mixture import continued_weights
from megaopus.data.read_ahead import TokenReader
from megaopus.data.run_data import RunData
from megaopus.distributed.collectives import on_rank_0
from megaopus.distributed.mesh import Mesh
from megaopus.engine.base import Engine
from megaopus.engine.gpt_forward import SequenceRules
from megaopus.engine.registry import ENGINES
from megaopus.engine.work_timer import WorkTimer
from megaopus.errors import CheckpointError, MegaopusError
from megaopus.fs import free_bytes
from megaopus.huggingface.side_files import FOLDER, copy_side_files, side_folder
from megaopus.meters import rank_memory, step_meters
from megaopus.models.flops import count_parameters
from megaopus.models.gpt import Start
from megaopus.planning.disk import checkpoint_bytes, disk_use
from megaopus.planning.estimate import start_line
from megaopus.record.console import Console
from megaopus.record.recorder import RECORD, Recorder, last_validation
from megaopus.record.sinks import METRICS_FILE
from megaopus.run_folder import run_lock, set_record_aside, write_run_folder
from megaopus.selection import Selector
from megaopus.selection.decide import PICKING, counts_exposures
from megaopus.selection.methods.registry import UNIFORM
from megaopus.start import start_weights
from megaopus.training.memory import out_of_memory_explained
from megaopus.training.signals import STOP_EXIT_CODE, StopSignal
from megaopus.training.spike_guard import SpikeGuard
from megaopus.training.step_profiler import StepProfiler
from megaopus.training.straggler import StragglerDetector
from megaopus.training.timers import Timers
from megaopus.training.trainer import Trainer
from megaopus.training.watchdog import HangWatchdog

WATCH_SHARE = 0.5
"""Part of ``engine.timeout_minutes`` without progress after which ranks say where they are; then collectives fail."""


def train(config: RunConfig, *, take_signals: bool = True) -> int:
    """Run or resume a training job on this rank; returns the process's exit status (0, or 143 after SIGTERM).

    Nothing is written before the model is built and the checkpoint, if there is one, restored. ``take_signals`` False:
    SIGTERM and SIGUSR1 stay with the program that calls this.
    """
    with StopSignal(take_signals) as stop:
        engine = config.engine
        mesh = Mesh(config.parallel, engine.device, engine.timeout_minutes, engine.deterministic)
        timers = Timers()
        watch = HangWatchdog(mesh, timers, WATCH_SHARE * 60 * engine.timeout_minutes)
        try:
            with (
                _locked(Path(config.run_dir), mesh),
                out_of_memory_explained(mesh.device, mesh.rank, lambda: _memory(config, mesh)),
            ):
                return _train(config, mesh, stop, timers)
        finally:
            watch.close()
            mesh.close()


@contextmanager
def _locked(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; refused on every rank if another job does. Collective."""
    with ExitStack() as held:
        on_rank_0(mesh, lambda: held.enter_context(run_lock(run_dir)))
        yield


def _train(config: RunConfig, mesh: Mesh, stop: StopSignal, timers: Timers) -> int:
    run_dir = Path(config.run_dir)
    checkpoint = locate(config.resume, run_dir, mesh)
    began = continued(checkpoint.state["config"], config) if checkpoint is not None and checkpoint.own else Began()
    if checkpoint is not None:
        before = checkpoint.state["config"].get("data", {}).get("weights", [])
        config.data.weights = continued_weights(before, config.data.weights, checkpoint.step)
    data = RunData.open(config.data, config.data_needs())
    identity = _identity(config, data, bf16=config.engine.is_bf16(mesh.on_cpu))
    changed = [] if checkpoint is None else _allowed_changes(config, identity, checkpoint)
    if checkpoint is not None and on_rank_0(mesh, lambda: _is_finished(config, checkpoint)):
        if mesh.rank == 0:
            done = f"{run_dir} is finished: {checkpoint.folder} has all {checkpoint.step} updates; nothing to do"
            Console(1, 1).note(f"{done} ('train.steps=N resume_allow=[train.steps]' goes on to N)")
        return 0
    vocab_size = config.model.derived_vocab_size(data.pool.corpus.vocab_size)
    tight = on_rank_0(mesh, lambda: _check_room(config, vocab_size, identity["precision"], checkpoint))
    begins = checkpoint is None and config.init.path is not None
    start = start_weights(config, mesh, data.pool.corpus) if begins else None
    trainer = build_trainer(config, mesh, data, stop, timers, start)
    began.put(trainer.config)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    old_record = on_rank_0(mesh, lambda: _begin(config, run_dir, mesh, checkpoint, data, vocab_size))
    monitor = Recorder(
        config.logging,
        run_dir,
        config.train.steps,
        is_writer=mesh.rank == 0,
        resume_step=checkpoint.step if checkpoint is not None and checkpoint.own else 0,
        wandb_config=trainer.config,
        meters=step_meters(config, mesh, vocab_size),
        selects=config.selection.method != UNIFORM,
    )
    try:
        if old_record is not None:
            monitor.note(f"{run_dir} has no checkpoint of its own: the record that lay there is now in {old_record}")
        for line in [*_resumed(checkpoint, changed), *began.told, *tight]:
            monitor.note(line)
        if begins:
            monitor.note(f"begins with the weights of {config.init.path}")
        monitor.note(start_line(config, mesh.shape, mesh.device.type, identity["precision"], data.summary()))
        reason = trainer.run(monitor)
    except BaseException:
        with suppress(MegaopusError):  # what went wrong first is what is told
            monitor.close()
        raise
    finally:
        trainer.reader.close()
        trainer.profiler.close()
    monitor.close()
    if reason is None:
        monitor.closing(trainer.checkpointer.last(), f"python -m megaopus report {shlex.quote(config.run_dir)}")
    return 0 if reason is None else STOP_EXIT_CODE


def _resumed(checkpoint: Checkpoint | None, changed: Sequence[Change]) -> Iterator[str]:
    """Yield the lines that tell where the run goes on from."""
    if checkpoint is None:
        return
    for problem in checkpoint.damaged:
        yield f"WARNING checkpoint passed over for an older one: {problem}"
    yield f"resumed from {checkpoint.folder} after {checkpoint.step} steps"
    if changed:
        lines = ", ".join(f"{key} {saved!r} -> {now!r}" for key, saved, now in changed)
        yield f"settings changed since that checkpoint: {lines}"


def _memory(config: RunConfig, mesh: Mesh) -> Mapping[str, tuple[int, str]]:
    """Estimate this rank's memory, also while nothing of the run is open yet."""
    return rank_memory(config, mesh, config.model.derived_vocab_size(Corpus.open(config.data.path).vocab_size))


def _allowed_changes(config: RunConfig, identity: dict[str, Any], checkpoint: Checkpoint) -> list[Change]:
    """List the settings that are not the checkpoint's. Raises CheckpointError for what must not differ."""
    check_identity(checkpoint.state["identity"], identity, checkpoint.folder)
    changed = changes(checkpoint.state["config"], asdict(config), default_settings(config))
    if checkpoint.own:  # a new run that begins at another's checkpoint is meant to be different
        refuse_unallowed(changed, config.resume_allow, checkpoint.folder)
    return changed


def _is_finished(config: RunConfig, checkpoint: Checkpoint) -> bool:
    """Say whether a run has made all its updates and the validation after them."""
    if not checkpoint.own or checkpoint.step < config.train.steps:
        return False
    return last_validation(Path(config.run_dir) / METRICS_FILE) == checkpoint.step


def _check_room(config: RunConfig, vocab_size: int, precision: str, checkpoint: Checkpoint | None) -> list[str]:
    """Return a warning if what the run may write does not fit its disk. Raises CheckpointError if that is sure."""
    run_dir, first = Path(config.run_dir), 0 if checkpoint is None else checkpoint.step
    there = len(temporary_checkpoints(run_dir, config.checkpoint.keep_every))
    use, free = disk_use(config, vocab_size, precision, first, there), free_bytes(run_dir)
    needed = {count: count * use.checkpoint + use.record for count in (use.sure, use.most)}
    if needed[use.most] <= free:
        return []
    count = use.sure if needed[use.sure] > free else use.most
    text = (
        f"{run_dir}: {needed[count]:,} bytes are needed, {free:,} are free: about {use.record:,} for the record, "
        f"{use.checkpoint:,} for each of {count} more checkpoint(s)"
    )
    remedy = "free some, set another run_dir, or a smaller checkpoint.keep"
    if needed[use.sure] > free:
        raise CheckpointError(f"{text}; {remedy} (nothing was written)")
    return [f"WARNING {text}; {remedy}"]


def _begin(
    config: RunConfig, run_dir: Path, mesh: Mesh, checkpoint: Checkpoint | None, data: RunData, vocab_size: int
) -> Path | None:
    """Write, on rank 0, for the first time: nothing can be refused any more. Says where an old record was moved to."""
    old_record = None
    if checkpoint is not None and checkpoint.own:
        for folder in checkpoint.passed_over:
            set_aside(folder)
    else:  # the rows that are there are of a run whose checkpoints are gone
        old_record = set_record_aside(run_dir, RECORD)
    if checkpoint is None and config.init.path is not None:
        copy_side_files(side_folder(Path(config.init.path)), run_dir / FOLDER)
    write_run_folder(
        run_dir,
        to_yaml(config),
        device=mesh.device.type,
        world_size=mesh.shape.world_size,
        first_step=0 if checkpoint is None else checkpoint.step,
        facts={
            "corpus": data.pool.corpus.fingerprint,
            "target": asdict(data.target()),
            "parameters": count_parameters(config.model, vocab_size, config.data.seq_len),
            "picking": PICKING,
        },
        packages=[spec.package for spec in ENGINES.values()],
    )
    return old_record


def build_trainer(
    config: RunConfig,
    mesh: Mesh,
    data: RunData,
    stop: StopSignal,
    timers: Timers | None = None,
    start: Start | None = None,
) -> Trainer:
    """Build engine, selector and trainer of this rank over the opened ``data``; writes no more than text features.

    ``start``: the weights to begin with; None: they are drawn.
    """
    timers = timers or Timers()
    most_bytes = config.data.read_ahead_mb << 20
    reader = TokenReader(partial(timers, "data"), pin=mesh.device.type == "cuda", most_bytes=most_bytes)
    corpus = data.pool.corpus
    engine = build_engine(config, mesh, corpus.vocab_size, start=start, rules=sequence_rules(config, data))
    identity = _identity(config, data, bf16=engine.bf16)
    vocab_size = config.model.derived_vocab_size(corpus.vocab_size)
    size = checkpoint_bytes(config, vocab_size, identity["precision"])
    engine.stop_asked = lambda: stop.reason is not None
    engine.work = WorkTimer(mesh.on_cpu, timers.clock, partial(timers.seconds, "data"))
    proxy, contrast = data.proxy_batches(reader), data.contrast_batches(reader)
    selector = Selector(
        config.selection,
        engine.scoring_backend(),
        num_selected=config.train.global_batch_size,
        proxy=None if proxy is None else proxy.at,
        pool=None if contrast is None else contrast.at,
        seed=config.seed,
        wanted=data.in_wanted_domains,
        text_features=data.text_features(mesh, RichConsole()),
    )
    return Trainer(
        engine=engine,
        stream=data.candidates(reader, _signatures(config, data, mesh)),
        reader=reader,
        selector=selector,
        checkpointer=Checkpointer(config.checkpoint, Path(config.run_dir), mesh, size=size),
        validation=data.evaluation_buffers(),
        held_out=data.held_out_buffers(),
        wanted=config.data.target_domains,
        guard=_guard(config),
        stragglers=StragglerDetector(config.logging.every, mesh.gather_objects),
        timers=timers,
        stop_requested=lambda: _agreed(mesh, stop),
        ask_to_stop=stop.ask,
        remote=data.remote,
        identity=identity,
        config=asdict(config),
        total_steps=config.train.steps,
        tokens_per_step=config.train.global_batch_size * config.data.seq_len,
        eval_every=config.train.eval_every,
        tasks=_tasks(config, engine, mesh, corpus),
        layer_grad_norm_every=config.logging.layer_grad_norm_every,
        profiler=StepProfiler(config.logging.profile_steps, Path(config.run_dir), mesh.rank),
    )


def _guard(config: RunConfig) -> SpikeGuard:
    """Make what leaves updates out whose gradient is far from the usual."""
    train = config.train
    clipped = config.optim.clip_grad > 0
    return SpikeGuard(train.spike_factor, train.spike_window, clipped=clipped, max_skipped=train.max_skipped)


def _signatures(config: RunConfig, data: RunData, mesh: Mesh) -> Any:
    """Map what tells copies apart in the pool, if picks depend on it and no text features say so; else None."""
    by_features = config.data_needs().text_features is not None
    return data.signatures(mesh) if counts_exposures(config.selection) and not by_features else None


def _tasks(config: RunConfig, engine: Engine, mesh: Mesh, corpus: Corpus) -> Any:
    """Make what scores the model on benchmarks while it trains; None if it is asked for none. Raises DataError."""
    if not config.tasks.every:
        return None
    from megaopus.evaluation.during import DuringTraining

    return DuringTraining(config, engine, mesh, corpus)


def sequence_rules(config: RunConfig, data: RunData) -> SequenceRules:
    """Say which tokens of a sequence see which, and which count in the loss, as the settings and the corpora have it.

    A corpus with a loss mask marks its tokens; others of the same run have none.
    """
    return SequenceRules(
        document_end=data.pool.corpus.eod_id,
        isolated=config.data.document_mask,
        skip_first=not config.data.first_token_loss,
        marked=data.masked,
    )


def build_engine(config: RunConfig, mesh: Mesh, vocab_size: int, **more: Any) -> Engine:
    """Build the engine of this rank; ``vocab_size`` is the tokenizer's, ``more`` as ``Engine`` takes it."""
    return config.engine.spec().load_class()(
        mesh,
        model=config.model,
        optim=config.optim,
        engine=config.engine,
        parallel=config.parallel,
        vocab_size=config.model.derived_vocab_size(vocab_size),
        seq_len=config.data.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        total_steps=config.train.steps,
        seed=config.seed,
        **more,
    )


def _agreed(mesh: Mesh, stop: StopSignal) -> str | None:
    """Find the stop reason if any rank has one; all ranks get an answer at the same step."""
    if not mesh.any(stop.reason is not None):
        return None
    return stop.reason or "another rank was asked to stop"


def _identity(config: RunConfig, data: RunData, *, bf16: bool) -> dict[str, Any]:
    """Name what must be equal for a checkpoint to mean the same: its form, sample order, model shape, optimizer."""
    # What came later is named where it is used: checkpoints written before it go on.
    later: dict[str, Any] = {} if config.engine.name == "megatron" else {"engine": config.engine.name}
    if config.data.weights:
        later["weighted"] = True  # domains have epochs of their own then
    if data.pool.kept is not None:
        later["filter"] = data.pool.kept.identity
    return later | {
        "corpus": data.pool.corpus.fingerprint,
        "seq_len": config.data.seq_len,
        "seed": config.seed,
        "model": config.model.identity(),
        "precision": "bf16" if bf16 else "fp32",
        "optimizer": config.optim.name,
        "global_batch_size": config.train.global_batch_size,
        "num_candidates": config.buffer_size(),
    }
