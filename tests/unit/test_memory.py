"""Memory is measured and put beside its estimate, and an error for lack of it tells both."""

from pathlib import Path

import pytest
import torch

from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.errors import EngineError
from megaopus.record.types import StepRecord
from megaopus.report.compare import load_run
from megaopus.training.memory import PeakMemory, is_out_of_memory, out_of_memory_explained, resident_peak
from tests.exact.resume_runs import settings, train

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STEP = StepRecord(step=0, tokens=8, loss=1.0, grad_norm=1.0, lr=1.0, time_s=1.0, step_s=1.0, select_s=0.0)
COUNTED_LATE = 4 << 20
"""Bytes by which Linux's mark may fall short for a while: each processor counts some pages by itself."""
PARTS = {"weights": (3 << 30, "fp32"), "activations": (5 << 30, "estimate")}
REFUSED = "CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of ..."


def test_the_peak_of_the_process_covers_what_it_held(tmp_path: Path) -> None:
    before = resident_peak()
    held = torch.ones(16 << 20)  # 64 MiB, every page written
    assert resident_peak() >= max(before, held.numel() * 4) - COUNTED_LATE
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t   9000 kB\nVmHWM:\t    1234 kB\n")
    assert resident_peak(tmp_path / "status") == 1234 * 1024
    (tmp_path / "status").write_text("Name:\tpython\n")
    assert resident_peak(tmp_path / "status") >= held.numel() * 4
    assert resident_peak(tmp_path / "none") >= held.numel() * 4


def test_on_cpu_the_process_is_measured() -> None:
    found = PeakMemory(CPU, 100)(STEP)
    assert (found["memory_allocated"], found["memory_reserved"], found["memory_estimate"]) == (None, None, 100)
    assert found["memory_resident"] == pytest.approx(resident_peak(), abs=COUNTED_LATE)


def test_on_cuda_each_step_has_a_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.device]] = []

    def answer(name: str, value: int | None) -> None:
        def call(device: torch.device) -> int | None:
            asked.append((name, device))
            return value

        monkeypatch.setattr(torch.cuda, name, call)

    answer("max_memory_allocated", 70)
    answer("max_memory_reserved", 75)
    answer("reset_peak_memory_stats", None)
    found = PeakMemory(GPU, 60)(STEP)
    assert (found["memory_allocated"], found["memory_reserved"], found["memory_estimate"]) == (70, 75, 60)
    assert asked == [(name, GPU) for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peaks_of_a_real_gpu() -> None:
    meter = PeakMemory(torch.device("cuda", torch.cuda.current_device()), 0)
    meter(STEP)
    torch.ones(16 << 20, device="cuda").sum().item()
    found, after = meter(STEP), meter(STEP)
    assert 64 << 20 <= (found["memory_allocated"] or 0) <= (found["memory_reserved"] or 0)
    assert (after["memory_allocated"] or 0) < 64 << 20


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(REFUSED),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError("Unable to allocate 1.0 TiB"),
        MemoryError(),
    ],
    ids=["cuda", "host", "driver", "numpy", "python"],
)
def test_an_error_for_lack_of_memory_tells_peak_and_estimate(error: Exception) -> None:
    with pytest.raises(EngineError) as caught, out_of_memory_explained(CPU, 3, lambda: PARTS):
        raise error
    said = str(caught.value)
    first = str(error).splitlines()[0] if str(error) else "MemoryError"
    assert said.startswith(f"out of memory on rank 3 (cpu): {first}\n")
    assert "measured peak: resident " in said
    assert "estimated, as by check: 8.0G = activations 5.0G + weights 3.0G" in said
    assert "a smaller train.micro_batch_size" in said
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), EngineError("out of memory, says another")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    asked: list[str] = []
    with pytest.raises(type(error)) as caught, out_of_memory_explained(CPU, 0, lambda: asked.append("") or PARTS):
        raise error
    assert caught.value is error
    assert not asked


def test_a_real_allocation_that_no_machine_has_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_run_records_its_memory_and_explains_the_lack_of_it(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MegatronEngine.train_step

    def refused(self: MegatronEngine, *args: object, **more: object) -> object:
        if self.step == 3:
            raise torch.OutOfMemoryError(REFUSED)
        return original(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(MegatronEngine, "train_step", refused)
    with pytest.raises(EngineError, match=r"out of memory on rank 0 \(cpu\): CUDA out of memory") as caught:
        train(settings(tiny_corpus, tmp_path / "run", "selection=uniform", "logging.every=1"))
    assert "activations " in str(caught.value)
    steps = load_run(tmp_path / "run").steps
    assert [record.step for record in steps] == [0, 1, 2]
    peaks = [record.memory_resident or 0 for record in steps]
    assert min(peaks) > 1 << 26  # python and torch alone
    assert resident_peak() >= max(peaks) - COUNTED_LATE
    assert {record.memory_estimate for record in steps} != {None}
    said = capsys.readouterr().out
    assert said.count(" | mem ") == said.count(" est. | ") == 3
