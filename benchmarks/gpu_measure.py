"""Measures training and scoring of real models on a real CUDA device (benchmarks/gpu.py)."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import commit
from benchmarks.gpu_shapes import CASES, PRESET, Case
from megaopus.build import build_engine
from megaopus.distributed.launcher import place
from megaopus.distributed.mesh import Mesh
from megaopus.engine.gpt_forward import SequenceRules
from megaopus.models.flops import training_flops_per_token
from megaopus.selection.scorer import Scorer

WARM_UP, REPEATS = 3, 10
PEAKS = {"H100 80GB": 989.4e12, "H100 PCIe": 756e12, "H200": 989.4e12, "A100": 312e12}
"""Part of a device's name -> its dense bf16 FLOPs a second (NVIDIA's data sheets)."""
GIB = 2**30


def no_device() -> str | None:
    """Say why nothing can be measured here; None: it can."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device here, so nothing can be measured"


class Drawn:
    """Candidates of random tokens (``selection.backend.Candidates``): zeros alone would all write to one row."""

    def __init__(self, ids: Tensor, seq_len: int, vocab_size: int):
        self.ids, self._seq_len, self._vocab_size = ids, seq_len, vocab_size

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Tensor) -> Drawn:
        return Drawn(self.ids[indices], self._seq_len, self._vocab_size)

    def batch(self, length: int | None = None) -> Tensor:
        wanted = torch.arange((length or self._seq_len) + 1)
        # a multiplicative hash of (sequence, position)
        mixed = (self.ids.view(-1, 1) * 1_000_003 + wanted) * 2_654_435_761 % 4_294_967_291
        return mixed % self._vocab_size


@dataclass(frozen=True)
class Timed:
    """Says what one kind of step took."""

    seconds: float
    """Of one, with all that it has the device do."""
    peak: int
    """Bytes of tensors."""
    launches: int
    host_reads: int
    """Times that the host waited for the device, as torch tells (``torch.cuda.set_sync_debug_mode``)."""


def measured_rows(names: Sequence[str], console: Console) -> list[dict[str, Any]]:
    """Measure the cases of as many ranks as this job has; one that does not fit is told and left out."""
    rows = []
    for name in names:
        case, ranks = CASES[name], place().world_size
        if case.ranks != ranks:
            console.print(f"{name} ({case.layout}) is not measured: it takes {case.ranks} ranks, this job has {ranks}")
            continue
        try:
            rows.append(_row(name, case))
        except torch.cuda.OutOfMemoryError as error:
            console.print(f"{name} is not measured: out of memory ({str(error).splitlines()[0]})", highlight=False)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _row(name: str, case: Case) -> dict[str, Any]:
    config = case.config()
    mesh = Mesh(config.parallel, "cuda")
    try:
        engine = build_engine(config, mesh, case.vocab_size, rules=SequenceRules(document_end=1))
        train, score = _training(engine, case), _scoring(engine, case)
    finally:
        mesh.close()
    tokens = config.train.global_batch_size * case.seq_len
    device = torch.cuda.get_device_name(mesh.device)
    peak = next((flops for part, flops in PEAKS.items() if part in device), None)
    flops = tokens * training_flops_per_token(config.model, case.vocab_size, case.seq_len) / case.ranks
    return {
        "shape": name,
        "layout": case.layout,
        "estimator": config.selection.estimator,
        "optimizer": case.optimizer,
        "train_peak_gib": train.peak / GIB,
        "score_peak_gib": score.peak / GIB,
        "launches": train.launches + score.launches,
        "host_reads": train.host_reads + score.host_reads,
        "mfu": None if peak is None else flops / train.seconds / peak,
        "estimate": False,
        "device": device,
        "torch": torch.__version__,
        "commit": commit(),
        "selection": PRESET,
        "ranks": case.ranks,
        "seq_len": case.seq_len,
        "micro_batch_size": case.micro,
        "micro_batches": case.micro_batches,
        "score_micro_batch_size": config.selection.score_micro_batch_size,
        "scored": config.num_scored(),
        "proxy_batch_size": config.selection.proxy_batch_size,
        "train_s": train.seconds,
        "score_s": score.seconds,
        "train_tokens_per_s": tokens / train.seconds,
        **{f"{which}_{key}": getattr(each, key) for which, each in _both(train, score) for key in _COUNTED},
    }


_COUNTED = ("launches", "host_reads")


def _both(train: Timed, score: Timed) -> Iterator[tuple[str, Timed]]:
    yield "train", train
    yield "score", score


def _training(engine: Any, case: Case) -> Timed:
    config = case.config()
    batch = Drawn(torch.arange(config.train.global_batch_size), case.seq_len, case.vocab_size)
    return _timed(lambda: engine.train_step(batch))


def _scoring(engine: Any, case: Case) -> Timed:
    config = case.config()

    def drawn(count: int, first: int) -> Drawn:
        return Drawn(first + torch.arange(count), case.seq_len, case.vocab_size)

    scorer = Scorer(
        config.selection,
        engine.scoring_backend(),
        proxy=lambda step: drawn(config.selection.proxy_batch_size, 1_000_000),
        pool=lambda step: drawn(config.selection.proxy_batch_size, 2_000_000),
        wanted=None,
        text_features=None,
        seed=config.seed,
    )
    buffer = drawn(config.num_scored(), 0)
    return _timed(lambda: scorer.score(buffer, 1))  # the first of a period judges its step as well


def _timed(step: Callable[[], Any]) -> Timed:
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(REPEATS):
        step()
    torch.cuda.synchronize()
    seconds, peak = (time.perf_counter() - started) / REPEATS, torch.cuda.max_memory_allocated()
    with _synchronizing() as waits:
        step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return Timed(seconds, peak, _kernels(profiler), len(waits))


def _kernels(profiler: Any) -> int:
    """Count kernels and copies inside the device; messages and copies from and to the host are others."""
    on_device = [each for each in profiler.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    others = ("nccl", "HtoD", "DtoH")
    return sum(not any(part in each.name for part in others) for each in on_device)


@contextmanager
def _synchronizing() -> Iterator[list[Any]]:
    """Yield a list of torch's warnings that an operation inside had the host wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: list[Any] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found.extend(each for each in caught if "synchronizing CUDA operation" in str(each.message))
