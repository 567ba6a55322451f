"""Runs what benchmarks/gpu.py asks of a device phase by phase, each in a process of its own that ends by a deadline.

A phase yields rows; each is written as a line of JSON as it comes, so that what breaks or hangs loses itself alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.common import ROOT, commit
from benchmarks.gpu_measure import (
    GIB,
    case_row,
    drawn,
    measured_scoring,
    measured_training,
    median_seconds,
    on_device,
    reference_row,
    repeatable,
    scorer_of,
)
from benchmarks.gpu_shapes import CASES, PRESET, Case, selection_of
from megaopus.build import build_engine
from megaopus.config.run_config import RunConfig
from megaopus.distributed.mesh import Mesh
from megaopus.meters import peak_tflops
from megaopus.models.config import ModelConfig
from megaopus.models.fused import missing_compiler
from megaopus.selection.estimators.registry import scoring_flops

Row = dict[str, Any]
MINUTES = 8.0
ESTIMATORS = ("directional", "adjoint", "countsketch", "kronecker")
ANSWERS = "answers.pt"
KINDS = (("fp32", "eager"), ("fp32", "fused"), ("bf16", "eager"), ("bf16", "fused"))
"""Precision and kernels whose answers are held against those of the CPU in fp32."""
_PATIENCE = 4
"""Times as long that a CPU may take, which compiles by g++."""
_PER_CYCLE = {8: 2048, 9: 4096, 10: 8192}
"""Major compute capability -> dense bf16 FLOPs of a multiprocessor in a cycle (data-sheet peak over their product)."""


@dataclass(frozen=True)
class Setup:
    """Says on what and at which size phases run."""

    device: str
    quick: bool
    """Toy sizes, which a CPU manages: a rehearsal, whose numbers say nothing of a GPU."""
    work: Path
    """Folder that phases share."""


@dataclass(frozen=True)
class Phase:
    """Says what runs, and for how many seconds at most."""

    run: Callable[[Setup], Iterator[Row]]
    seconds: float


def environment(setup: Setup) -> Iterator[Row]:
    """Tell what is there, and what it reaches: large products, copies, a kernel that does nothing."""
    cuda = setup.device == "cuda"
    found: Row = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    found["compiler_missing"] = missing_compiler(not cuda)
    if cuda:
        device = torch.cuda.get_device_properties(0)
        found |= {"device": device.name, "memory_gib": device.total_memory / 2**30, "cuda": torch.version.cuda}
        found |= {"sheet_flops": _known(peak_tflops(device.name)), **read_peaks(device)}
    size, dtype = (8192, torch.bfloat16) if cuda else (256, torch.float32)
    left, right = (torch.randn(size, size, device=setup.device, dtype=dtype) for _ in range(2))
    found["product_flops"] = 2 * size**3 / median_seconds(lambda: left @ right, cuda)
    numbers = torch.empty((1 << 30) if cuda else (1 << 20), device=setup.device)
    found["copy_bytes"] = 2 * numbers.nbytes / median_seconds(lambda: numbers.clone(), cuda)
    one = torch.zeros(1, device=setup.device)
    found["launch_s"] = median_seconds(lambda: [one.add_(1) for _ in range(1000)], cuda) / 1000
    yield found


def _known(tflops: float | None) -> float | None:
    return None if tflops is None else 1e12 * tflops


def read_peaks(device: Any) -> Row:
    """FLOPs of dense bf16 products and bytes of memory a second, as clocks and widths of the device give them."""
    clock, memory = getattr(device, "clock_rate", None), getattr(device, "memory_clock_rate", None)  # kHz
    per_cycle, width = _PER_CYCLE.get(device.major), getattr(device, "memory_bus_width", None)
    count = device.multi_processor_count
    return {
        "read_flops": None if clock is None or per_cycle is None else 1e3 * clock * count * per_cycle,
        "read_bytes": None if memory is None or width is None else 2e3 * memory * width / 8,
    }


# -- correctness -------------------------------------------------------------------------------------------------------

_GPT2 = ModelConfig(num_layers=2, hidden_size=128, num_heads=4)
STYLES: Mapping[str, ModelConfig] = {
    "gpt2": _GPT2,
    "llama": replace(
        _GPT2, num_kv_heads=2, position="rope", norm="rmsnorm", activation="swiglu", bias=False, tied=False
    ),
}


def answers(device: str, precision: str, kernels: str, quick: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Style -> losses of updates, and utilities of candidates after them, on one rank."""
    found = {}
    for style, model in STYLES.items():
        config = RunConfig()
        config.model, config.optim.lr, config.optim.schedule = model, 1e-3, "constant"
        config.engine.device, config.engine.precision, config.engine.kernels = device, precision, kernels
        config.data.seq_len = 64 if quick else 256
        config.train.global_batch_size, config.train.micro_batch_size, config.train.steps = 8, 4, 4
        config.selection = replace(selection_of(PRESET), proxy_batch_size=8, score_micro_batch_size=8)
        case = Case(model={}, vocab_size=1000, seq_len=config.data.seq_len, micro=4, micro_batches=2)
        mesh = Mesh(config.parallel, device)
        try:
            engine = build_engine(config, mesh, case.vocab_size)
            losses = [engine.train_step(drawn(case, 8, 1000 * step)).loss for step in range(config.train.steps)]
            utilities = scorer_of(engine, case, config).score(drawn(case, 32, 100_000), 1).utilities
            assert utilities is not None
        finally:
            mesh.close()
        found[style] = {"losses": torch.tensor(losses), "utilities": utilities.double().cpu()}
    return found


def correct_cpu(setup: Setup) -> Iterator[Row]:
    """Write down what the CPU answers in fp32."""
    started = time.monotonic()
    torch.save(answers("cpu", "fp32", "eager", setup.quick), setup.work / ANSWERS)
    yield {"case": "cpu fp32 eager", "seconds": time.monotonic() - started}


def correct_device(setup: Setup) -> Iterator[Row]:
    """Hold the device's answers against the CPU's, by precision and kernels."""
    expected = torch.load(setup.work / ANSWERS)
    for precision, kernels in KINDS:
        if kernels == "fused" and missing_compiler(setup.device == "cpu"):
            continue
        found = answers(setup.device, precision, kernels, setup.quick)
        for style, values in found.items():
            yield {"case": f"{style} {precision} {kernels}", **compared(values, expected[style])}


def compared(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> Row:
    """Largest relative error of a loss; of utilities the correlation, relative error, and share of the best alike."""
    mine, theirs = found["utilities"], expected["utilities"]
    best = max(1, len(mine) // 8)
    picks = [set(each.topk(best).indices.tolist()) for each in (mine, theirs)]
    return {
        "loss_error": float(((found["losses"] - expected["losses"]) / expected["losses"]).abs().max()),
        "utility_correlation": float(torch.corrcoef(torch.stack((mine, theirs)))[0, 1]),
        "utility_error": float((mine - theirs).norm() / theirs.norm()),
        "same_picks": len(picks[0] & picks[1]) / best,
    }


# -- speed and memory --------------------------------------------------------------------------------------------------


def shape(name: str) -> Callable[[Setup], Iterator[Row]]:
    """Make the phase that measures a shape: training, scoring, memory beside ``check``, and a plain compiled GPT."""

    def run(setup: Setup) -> Iterator[Row]:
        case = small(CASES[name]) if setup.quick else CASES[name]
        yield case_row(name, case, setup.device)
        if "position" not in case.model:  # GPT-2's, as the plain one is
            yield reference_row(name, case, setup.device)

    return run


def small(case: Case) -> Case:
    """The same kind of model at a size that a CPU trains in seconds."""
    size = {"num_layers": 2, "hidden_size": 128, "num_heads": 4, "head_dim": None, "ffn_hidden_size": None}
    heads = {"num_kv_heads": 2} if case.model.get("num_kv_heads") else {}
    return replace(case, model={**case.model, **size, **heads}, vocab_size=1000, seq_len=64, micro=2)


def estimators(setup: Setup) -> Iterator[Row]:
    """Measure what a scored token costs by each estimator, over a trained one, beside its FLOPs."""
    case = small(CASES["gpt2_small"]) if setup.quick else CASES["gpt2_small"]
    config = on_device(case, setup.device)
    mesh = Mesh(config.parallel, setup.device)
    try:
        engine = build_engine(config, mesh, case.vocab_size)
        train = measured_training(engine, case)
        tokens = config.train.global_batch_size * case.seq_len
        for name in ESTIMATORS:
            selection = replace(config.selection, estimator=name, contrast=False)
            score = measured_scoring(engine, case, replace(config, selection=selection))
            scored = config.num_scored() * config.scored_length()
            proxy = selection.proxy_batch_size * case.seq_len
            floor = (scored * scoring_flops(name, selection.gram, False).ratio + proxy) / tokens * train.seconds
            yield {
                "estimator": name,
                "score_s": score.seconds,
                "floor_s": floor,
                "over_floor": score.seconds / floor,
                "launches": score.launches,
                "host_reads": score.host_reads,
            }
    finally:
        mesh.close()


# -- the product -------------------------------------------------------------------------------------------------------


def product(setup: Setup) -> Iterator[Row]:
    """Train by the command, stop it by SIGTERM, go on, and compare with a run that was not stopped."""
    from rich.console import Console

    from megaopus.cli.demo import ensure_corpus
    from megaopus.report.compare import load_run

    corpus = ensure_corpus(setup.work / "corpus", Console(stderr=True))
    steps = 16 if setup.quick else 60
    settings = [
        f"data.path={corpus}",
        "selection=opus",
        "data.target_domains=[docs]",
        "data.seq_len=64",
        f"engine.device={setup.device}",
        "model.num_layers=2",
        "model.hidden_size=128",
        "model.num_heads=4",
        f"train.steps={steps}",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        f"train.eval_every={steps}",
        "train.eval_sequences=8",
        "logging.every=1",
        "checkpoint.every=8",
    ]
    straight = run_command([*settings, f"run_dir={setup.work / 'straight'}"])
    stopped = run_command([*settings, f"run_dir={setup.work / 'stopped'}"], stop_after=f"step {steps // 3}/")
    resumed = run_command([*settings, f"run_dir={setup.work / 'stopped'}"])
    losses = [[step.loss for step in load_run(setup.work / name).steps] for name in ("straight", "stopped")]
    yield {
        "exit": straight,
        "exit_stopped": stopped,
        "exit_resumed": resumed,
        "steps": len(losses[1]),
        "same_losses": losses[0] == losses[1],
        "largest_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def run_command(settings: Sequence[str], stop_after: str | None = None) -> int:
    """Run ``megaopus train``; SIGTERM once it has said ``stop_after``. Returns its exit status."""
    command = [sys.executable, "-m", "megaopus", "train", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if stop_after is not None and stop_after in line:
                process.send_signal(signal.SIGTERM)
                stop_after = None
        return process.wait()


# -- the same again ----------------------------------------------------------------------------------------------------


def repeated(setup: Setup) -> Iterator[Row]:
    """Measure a shape twice without and twice with engine.deterministic: whether bits are the same, and what it costs.

    Each time in a process of its own, since CUDA's libraries read their variables once.
    """
    case = small(CASES["gpt2_small"]) if setup.quick else CASES["gpt2_small"]
    spawn, without = multiprocessing.get_context("spawn"), 0.0
    for deterministic in (False, True):
        given, found = replace(case, deterministic=deterministic), []
        for _ in range(2):
            with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                found.append(alone.submit(repeatable, given, setup.device).result())
        same = found[0]["bits"] == found[1]["bits"]
        train, score = (min(each[what].seconds for each in found) for what in ("train", "score"))
        without = without or train
        yield {
            "deterministic": deterministic,
            "same_bits": same,
            "train_s": train,
            "score_s": score,
            "over_without": train / without,
            "train_peak_gib": found[0]["train"].peak / GIB,
            "launches": found[0]["train"].launches,
            **({"error": "bits differ from one run to the next"} if deterministic and not same else {}),
        }


PHASES: Mapping[str, Phase] = {
    "environment": Phase(environment, 40),
    "correct_cpu": Phase(correct_cpu, 60),
    "correct_device": Phase(correct_device, 90),
    "gpt2_small": Phase(shape("gpt2_small"), 75),
    "estimators": Phase(estimators, 75),
    "qwen3_0p6b": Phase(shape("qwen3_0p6b"), 75),
    "gpt2_medium": Phase(shape("gpt2_medium"), 75),
    "product": Phase(product, 150),
    "gpt2_xl": Phase(shape("gpt2_xl"), 90),
    "repeated": Phase(repeated, 200),
}
"""What is asked first comes first: the last ones are left out where the time is over."""


# -- one after another -------------------------------------------------------------------------------------------------


def run_phase(name: str, setup: Setup, lines: TextIO) -> None:
    """Write each row of a phase to ``lines`` as it comes; an error is a row as well."""
    try:
        for row in PHASES[name].run(setup):
            print(json.dumps({"phase": name, **row}), file=lines, flush=True)
    except Exception as error:
        print(json.dumps({"phase": name, "error": f"{type(error).__name__}: {error}"[:500]}), file=lines, flush=True)
        raise


def run_phases(
    names: Sequence[str],
    setup: Setup,
    write: Callable[[Row], None],
    *,
    minutes: float = MINUTES,
    command: Sequence[str] = (sys.executable, str(ROOT / "benchmarks" / "gpu.py")),
) -> None:
    """Run phases in processes of their own until ``minutes`` are over, and hand on each row with commit and seconds.

    ``command``: what takes ``--phase NAME`` and the setup, and prints rows.
    """
    end, about = time.monotonic() + 60 * minutes, {"commit": commit(), "device_kind": setup.device}
    for name in names:
        left = end - time.monotonic()
        allowed = min(PHASES[name].seconds * (_PATIENCE if setup.device == "cpu" else 1), left)
        if allowed < 1:
            write({"phase": name, "error": f"left out: the {minutes:g} minutes are over", **about})
            continue
        arguments = ["--phase", name, "--device", setup.device, "--work", str(setup.work)]
        _one([*command, *arguments, *(["--quick"] if setup.quick else [])], name, allowed, about, write)


def _one(command: Sequence[str], name: str, allowed: float, about: Row, write: Callable[[Row], None]) -> None:
    started, wrote = time.monotonic(), False
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(allowed, end)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"phase"'):
                wrote = True
                write({**json.loads(line), **about, "at_s": time.monotonic() - started})
        code = process.wait()
    finally:
        timer.cancel()
    if late.is_set():
        write({"phase": name, "error": f"ended: its {allowed:.0f} seconds were over", **about})
    elif code and not wrote:
        write({"phase": name, "error": f"ended with exit status {code}", **about})
