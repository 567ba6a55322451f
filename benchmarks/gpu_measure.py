"""Measures training and scoring of models on a CUDA device; on a CPU, at toy sizes, as a rehearsal (gpu.py)."""

from __future__ import annotations

import gc
import hashlib
import statistics
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
from benchmarks.reference_gpt import ReferenceGPT
from megaopus.build import build_engine
from megaopus.config.run_config import RunConfig
from megaopus.distributed.launcher import place
from megaopus.distributed.mesh import Mesh
from megaopus.engine.gpt_forward import SequenceRules
from megaopus.meters import peak_tflops
from megaopus.models.flops import padded_vocab, training_flops_per_token
from megaopus.planning.memory import PROCESS_ROW, memory
from megaopus.planning.memory import peak as check_peak
from megaopus.selection.scorer import Scorer

WARM_UP, REPEATS = 3, 10
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
            rows.append(case_row(name, case, "cuda"))
        except torch.cuda.OutOfMemoryError as error:
            console.print(f"{name} is not measured: out of memory ({str(error).splitlines()[0]})", highlight=False)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def case_row(name: str, case: Case, device: str) -> dict[str, Any]:
    """Measure one case: training, scoring, and the memory of both beside what ``check`` says."""
    config = on_device(case, device)
    mesh = Mesh(config.parallel, device, deterministic=config.engine.deterministic)
    try:
        engine = build_engine(config, mesh, case.vocab_size, rules=SequenceRules(document_end=1))
        train, score = measured_training(engine, case), measured_scoring(engine, case, config)
    finally:
        mesh.close()
    tokens = config.train.global_batch_size * case.seq_len
    kind = torch.cuda.get_device_name(mesh.device) if device == "cuda" else "cpu"
    peak = peak_tflops(kind)
    flops = tokens * training_flops_per_token(config.model, case.vocab_size, case.seq_len) / case.ranks
    precision = "bf16" if config.engine.is_bf16(device == "cpu") else "fp32"
    rows = memory(config, case.vocab_size, case.ranks, precision, 0, device)
    del rows[PROCESS_ROW]
    return {
        "shape": name,
        "layout": case.layout,
        "estimator": config.selection.estimator,
        "optimizer": case.optimizer,
        "train_peak_gib": train.peak / GIB,
        "score_peak_gib": score.peak / GIB,
        "check_gib": check_peak(rows)[1] / GIB,
        "launches": train.launches + score.launches,
        "host_reads": train.host_reads + score.host_reads,
        "mfu": None if peak is None else flops / train.seconds / (1e12 * peak),
        "model_flops_per_s": flops / train.seconds,
        "estimate": False,
        "device": kind,
        "torch": torch.__version__,
        "commit": commit(),
        "kernels": "fused" if config.engine.is_fused(device == "cpu") else "eager",
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


def repeatable(case: Case, device: str) -> dict[str, Any]:
    """Measure a case in a process of its own; ``bits``: a digest of all moments of gradients, and of utilities."""
    config = on_device(case, device)
    mesh = Mesh(config.parallel, device, deterministic=config.engine.deterministic)
    try:
        engine = build_engine(config, mesh, case.vocab_size, rules=SequenceRules(document_end=1))
        train = measured_training(engine, case)
        states = [state for each in engine.optimizer.torch_optimizers for state in each.state.values()]
        found = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        utilities = scorer_of(engine, case, config).score(drawn(case, config.num_scored(), 0), 1).utilities
        assert found
        assert utilities is not None
        digest = hashlib.sha256()
        for each in (*found, utilities):
            digest.update(each.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        score = measured_scoring(engine, case, config)
    finally:
        mesh.close()
    return {"bits": digest.hexdigest(), "train": train, "score": score}


def on_device(case: Case, device: str) -> RunConfig:
    """The settings of a case, in fp32 where it is to run on a CPU."""
    config = case.config()
    config.engine.device = device
    if device == "cpu":
        config.engine.precision = "fp32"
    return config


def _both(train: Timed, score: Timed) -> Iterator[tuple[str, Timed]]:
    yield "train", train
    yield "score", score


def reference_row(name: str, case: Case, device: str) -> dict[str, Any]:
    """Measure a plain GPT-2 of the case's size: fp32 weights, 16-bit products, blocks by torch.compile on a GPU."""
    config, model = case.config(), case.model
    size = (model["num_layers"], model["hidden_size"], model["num_heads"], padded_vocab(case.vocab_size), case.seq_len)
    plain = ReferenceGPT(*size).to(device)
    if device == "cuda":
        for block in plain.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True)
    tokens = Drawn(torch.arange(config.train.global_batch_size), case.seq_len, case.vocab_size).batch().to(device)
    batches = tokens.split(case.micro)

    def step() -> None:
        for batch in batches:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = plain(batch).mean()
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timed = _timed(step, device == "cuda")
    return {
        "shape": name,
        "plain": True,
        "train_s": timed.seconds,
        "train_peak_gib": timed.peak / GIB,
        "train_tokens_per_s": tokens[:, 1:].numel() / timed.seconds,
    }


def measured_training(engine: Any, case: Case) -> Timed:
    """Time updates of one batch of the case's size."""
    config = case.config()
    batch = Drawn(torch.arange(config.train.global_batch_size), case.seq_len, case.vocab_size)
    return _timed(lambda: engine.train_step(batch), not engine.mesh.on_cpu)


def drawn(case: Case, count: int, first: int) -> Drawn:
    """Return ``count`` sequences of the case's length, from number ``first`` on."""
    return Drawn(first + torch.arange(count), case.seq_len, case.vocab_size)


def scorer_of(engine: Any, case: Case, config: RunConfig) -> Scorer:
    """Make what scores by ``config.selection``, against a proxy and a pool of sequences that no buffer has."""
    count = config.selection.proxy_batch_size
    return Scorer(
        config.selection,
        engine.scoring_backend(),
        proxy=lambda step: drawn(case, count, 1_000_000),
        pool=lambda step: drawn(case, count, 2_000_000),
        wanted=None,
        text_features=None,
        seed=config.seed,
    )


def measured_scoring(engine: Any, case: Case, config: RunConfig) -> Timed:
    """Time scorings of one buffer by ``config.selection``."""
    scorer, buffer = scorer_of(engine, case, config), drawn(case, config.num_scored(), 0)
    # the first of a period judges its step as well
    return _timed(lambda: scorer.score(buffer, 1), not engine.mesh.on_cpu)


def median_seconds(run: Callable[[], Any], cuda: bool) -> float:
    """Median of ``REPEATS`` calls after a warm-up, each waited for."""
    found = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[WARM_UP:])


def _timed(step: Callable[[], Any], cuda: bool) -> Timed:
    """Time a step, and count what it asks of the device; a CPU is asked for nothing."""
    if not cuda:
        return Timed(median_seconds(step, cuda), 0, 0, 0)
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
