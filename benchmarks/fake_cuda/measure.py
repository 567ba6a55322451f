"""Measures what a rank's tensors take in the real engine: built, training and scoring, step after step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.fake_cuda.device import fake_ranks, fake_tensors
from benchmarks.fake_cuda.meter import DeviceMeter
from benchmarks.fake_cuda.parts import Parts
from benchmarks.fake_cuda.work import Work
from megaopus.build import build_engine
from megaopus.config.run_config import RunConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.gpt_forward import SequenceRules
from megaopus.selection.config import SelectionConfig
from megaopus.selection.methods.registry import UNIFORM
from megaopus.selection.pieces import parameter_shapes
from megaopus.selection.scorer import Scorer


class Zeros:
    """Candidates of ``count`` sequences of token 0 (``selection.backend.Candidates``)."""

    def __init__(self, count: int, seq_len: int):
        self._count, self._seq_len = count, seq_len

    @property
    def ids(self) -> Tensor:
        return torch.arange(self._count)

    def __len__(self) -> int:
        return self._count

    def take(self, indices: Tensor) -> Zeros:
        return Zeros(len(indices), self._seq_len)

    def batch(self, length: int | None = None) -> Tensor:
        return torch.zeros(self._count, (length or self._seq_len) + 1, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Says what one rank's tensors take, in bytes, and what it asks of its device."""

    parameters: int
    """Weights on this rank, counted, not bytes."""
    built: int
    """Alive before the first step."""
    held: int
    """Alive between training steps: weights, gradients, optimizer state."""
    training: int
    """Peak of a training step."""
    scoring: dict[str, int] = field(default_factory=dict)
    """Selection (its name) -> peak of the scoring of a buffer, or of the training step after it if that is larger."""
    kept: dict[str, int] = field(default_factory=dict)
    """Selection -> alive after scoring, beyond ``held``."""
    train_work: Work = field(default_factory=Work)
    """What the second training step asked of the device."""
    score_work: dict[str, Work] = field(default_factory=dict)
    """Selection -> what the scoring of a buffer did, the last of those made."""


@contextmanager
def fake_job(config: RunConfig, rank: int, world_size: int, device: str = "cuda") -> Iterator[tuple[Mesh, DeviceMeter]]:
    """Be one rank of a job on fake tensors inside."""
    with fake_ranks(rank, world_size), fake_tensors(device) as meter:
        mesh = Mesh(config.parallel, device, deterministic=config.engine.deterministic)
        try:
            yield mesh, meter
        finally:
            mesh.close()


def measure(
    config: RunConfig, vocab_size: int, mesh: Mesh, meter: DeviceMeter, selections: dict[str, SelectionConfig]
) -> Measured:
    """Train two steps, the first a small one, then score buffers by each of ``selections`` in turn."""
    rules = SequenceRules(document_end=1, isolated=config.data.document_mask)
    engine = build_engine(config, mesh, vocab_size, rules=rules)
    _count_passes(engine, meter)
    built = meter.bytes
    dp, group = mesh.shape.dp, config.parallel.pp if config.parallel.vpp > 1 else 1
    engine.train_step(Zeros(dp * group * config.train.micro_batch_size, config.data.seq_len))  # makes the state
    gc.collect()
    meter.reset_peak()
    meter.work = Work()
    with _parts(engine, meter.work):
        engine.train_step(Zeros(config.train.global_batch_size, config.data.seq_len))
    held, training, train_work = meter.bytes, meter.peak, meter.work
    meter.work = Work()
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through again and again
    scoring, kept, score_work = {}, {}, {}
    for name, selection in selections.items():
        scoring[name], kept[name] = training, 0
        if selection.method != UNIFORM:
            peak, kept[name] = _score(replace(config, selection=selection), engine, meter)
            score_work[name], meter.work = meter.work, Work()  # what is made for the next one is not its work
            scoring[name] = max(peak, training + kept[name])
    gc.unfreeze()
    parameters = sum(weight.numel() for weight in engine.module.parameters())
    peaks: dict[str, Any] = {"built": built, "held": held, "training": training, "scoring": scoring, "kept": kept}
    return Measured(parameters=parameters, **peaks, train_work=train_work, score_work=score_work)


def _count_passes(engine: Any, meter: DeviceMeter) -> None:
    """Have ``Work.pass_launches`` count what megatron's schedule launches, where it runs the engine's passes."""
    if not hasattr(engine, "_schedule"):
        return
    schedule = engine._schedule

    def run(**given: Any) -> Any:
        work, before = meter.work, meter.work.kernels()
        found = schedule(**given)
        work.pass_launches += work.kernels() - before
        return found

    engine._schedule = run


def _parts(engine: Any, work: Work) -> AbstractContextManager[None]:
    """Have ``Work.parts`` say what takes the time inside, where megatron's schedule runs the engine's passes."""
    if not hasattr(engine, "_schedule"):
        return nullcontext()
    parts = Parts()
    work.part = parts.now
    return parts.watched(engine)


def _score(config: RunConfig, engine: Any, meter: DeviceMeter) -> tuple[int, int]:
    """(peak, bytes left behind) of scored buffers, as many as it takes until one leaves no more than the one before."""
    held = meter.bytes
    scorer = _scorer(config, engine)
    pieces = scorer.backend.pieces()
    sizes = {name: (piece.numel,) for name, piece in pieces.items()} or parameter_shapes(scorer.backend)
    average = {name: torch.zeros(size, device=scorer.backend.device) for name, size in sizes.items()}
    # of an earlier buffer: the average, where one is kept, and how far along the step to go, which was judged then
    judged = {"level": 0, "error": 1e-3, "period": 0}
    scorer.load_state_dict({"count": 1, "average": average, "estimator": judged})
    del average
    buffer = Zeros(config.num_scored(), config.data.seq_len)
    before, step = -1, 0
    meter.reset_peak()
    while meter.bytes > before + held // 1000:
        before, meter.work = meter.bytes, Work()
        with mock.patch.object(Scorer, "_once", _no_check):
            scorer.score(buffer, step)
        gc.collect()
        step += 1
    return meter.peak, meter.bytes - held


def _no_check(*args: Any) -> None:
    """Leave out what is looked at in the first scoring of a run alone."""


def _scorer(config: RunConfig, engine: Any) -> Scorer:
    proxy = Zeros(config.selection.proxy_batch_size, config.data.seq_len)
    return Scorer(
        config.selection,
        engine.scoring_backend(),
        proxy=lambda step: proxy,
        pool=lambda step: proxy,
        wanted=None,
        text_features=None,
        seed=config.seed,
    )
