"""Bytes are counted as by hand; the micro-batch size found is the largest that fits, the same on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.engine.config import EngineConfig
from megaopus.selection import ModuleBackend, SelectionConfig, Selector, TensorCandidates, memory, scorer
from megaopus.selection.config import PASS_TOKENS, most_per_pass
from tests.harness import random_batch, tiny_engine
from tests.pool import Pool
from tests.unit.selection_net import UNGUARDED, batch, make_backend, proxy

CPU = torch.device("cpu")
COUNT = 32


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_the_meter_counts_storages_once_while_they_live() -> None:
    before = torch.zeros(1000)
    with memory.Meter() as meter:
        before += 1
        before.view(10, 100).t()
        assert meter.bytes == 0  # made before
        kept = torch.ones(1000)
        part = kept[10:]
        part.mul_(2)
        kept.unbind()
        assert meter.bytes == 4000
        del kept
        assert meter.bytes == 4000  # a view keeps its storage
        del part
        assert meter.bytes == 0
        parts = [torch.ones(10, dtype=torch.float64), torch.ones(10)]
        torch._foreach_add_(parts, 1.0)
        assert meter.bytes == 120
        (before + 1).sum()  # 4000 and 4, gone again
    assert (meter.bytes, meter.peak) == (120, 4124)
    parts.clear()
    assert meter.bytes == 0  # also outside


def test_the_meter_sees_backward_passes() -> None:
    n = 64
    weight = torch.eye(n, requires_grad=True)
    with memory.Meter() as meter:
        middle = weight @ weight  # one matrix, and kept for exp's backward pass another
        end = middle.exp()
        total = end.sum()
        matrix = 4 * n * n
        assert meter.bytes == 2 * matrix + 4
        del middle
        assert meter.bytes == matrix + 4
        grad = torch.autograd.grad(total, weight)[0]
        # exp's output; its gradient; two products with the weight
        assert meter.peak == 4 * matrix + 8
        del end, total
        assert meter.bytes == matrix
    assert grad.numel() == n * n


def test_measuring_does_not_keep_code_from_being_compiled() -> None:
    compiled = []
    model = torch.compile(nn.Linear(4, 4), backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    assert memory.peak_bytes(lambda: model(torch.ones(3, 4)), CPU) >= 48
    assert not compiled
    model(torch.ones(3, 4))
    assert compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peaks_are_those_of_its_allocator() -> None:
    device = torch.device("cuda", 0)
    kept = torch.ones(1 << 20, device=device)
    assert memory.peak_bytes(lambda: (kept + 1) * 2, device) == 2 * (4 << 20)
    assert 0 < memory.free_bytes(device) <= torch.cuda.mem_get_info(device)[1]


# -- free memory -------------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       9000 kB\nMemFree:  100 kB\nMemAvailable:       4000 kB\n"}
V2 = {"proc/self/cgroup": "0::/jobs/mine\n"}
V1 = {"proc/self/cgroup": "9:cpu:/mine\n4:hugetlb,memory:/mine\n0::/\n"}


def group(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon 1\ninactive_file {cached}\nactive_file {cached}\ntotal_active_file 7\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 4_096_000),
        (V2, 4_096_000),
        (V2 | group("sys/fs/cgroup/jobs/mine", "max", 10), 4_096_000),
        (V2 | group("sys/fs/cgroup/jobs/mine", 5000, 1000), 4000),
        (V2 | group("sys/fs/cgroup/jobs/mine", 5000, 4500, cached=1000), 2500),
        (V2 | group("sys/fs/cgroup/jobs/mine", 5000, 1000) | group("sys/fs/cgroup/jobs", 6000, 3000), 3000),
        (V2 | group("sys/fs/cgroup", 5000, 6000), -1000),  # a container sees its own group as the root
        (V2 | group("sys/fs/cgroup/other", 5000, 1000), 4_096_000),
        (
            V1
            | {
                "sys/fs/cgroup/memory/mine/memory.limit_in_bytes": "9000\n",
                "sys/fs/cgroup/memory/mine/memory.usage_in_bytes": "8000\n",
                "sys/fs/cgroup/memory/mine/memory.stat": "inactive_file 3\ntotal_inactive_file 20\n",
            },
            1020,
        ),
    ],
)
def test_free_memory_is_the_least_that_the_system_grants(tmp_path: Path, files: dict[str, str], free: int) -> None:
    assert memory.host_free(write(tmp_path, MEMINFO | files)) == free


def test_free_memory_is_shared_by_the_processes_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = memory.os.sysconf("SC_PHYS_PAGES") * memory.os.sysconf("SC_PAGE_SIZE")
    assert memory.host_free(tmp_path) == physical // 2  # nothing to read: macOS
    assert 0 < memory.host_free(Path("/")) <= physical
    monkeypatch.setattr(memory, "host_free", lambda root: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_bytes(CPU) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU) == 250
    monkeypatch.setattr(memory, "host_free", lambda root: -1000)
    assert memory.free_bytes(CPU) == 0


# -- the search --------------------------------------------------------------------------------------------------------


def test_most_per_pass_is_limited_by_candidates_and_tokens() -> None:
    assert most_per_pass(12, 1, "cpu") == 8
    assert most_per_pass(1, 1, "cpu") == 1
    assert most_per_pass(1000, PASS_TOKENS["cpu"] // 16 + 1, "cpu") == 16  # with the token that is only a label
    assert most_per_pass(1000, 10 * PASS_TOKENS["cpu"], "cpu") == 1
    assert most_per_pass(1 << 20, 64, "xpu") == most_per_pass(1 << 20, 64, "cuda") == PASS_TOKENS["cuda"] // 64


@pytest.mark.parametrize("lines", [((0, 100),), ((900, 100),), ((1000, 1), (0, 300)), ((5000, 0), (100, 70))])
@pytest.mark.parametrize(("most", "first"), [(1, 1), (8, 1), (64, 1), (50, 3), (2, 3)])
def test_the_search_finds_the_largest_size_that_fits(
    lines: tuple[tuple[int, int], ...], most: int, first: int, monkeypatch
) -> None:
    """Whatever lines the memory follows, of which the highest counts; and no run takes more than is free."""

    def taken(size: int) -> int:
        return max(base + slope * size for base, slope in lines)

    for free in (0, 150, 1000, 2000, 2500, 3300, 9999, 12_345, 30_000, 10**9):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        ran: list[int] = []

        def run(size: int, ran: list[int] = ran) -> None:
            ran.append(size)
            torch.empty(taken(size), dtype=torch.uint8)

        given = {} if first == 1 else {"first": first, "what": "proxy"}
        size, note = memory.find_micro_batch_size(run, most, CPU, lambda value: value, **given)
        tried = [first * 2**power for power in range(7)]
        assert size == max((each for each in tried if each <= most and taken(each) <= free / 2), default=first)
        assert note.startswith(f"{given.get('what', 'scoring')} micro-batch {size}")
        assert all(taken(each) <= free for each in ran if each > first)
        assert len(ran) <= 8


# -- a selector --------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "directional": {},
    "adjoint-redundancy": {"estimator": "adjoint", "redundancy": 0.5},
    "directional-redundancy": {"redundancy": 0.5, "gram": "kronecker"},
    "countsketch": {"estimator": "countsketch"},
    "kronecker": {"estimator": "kronecker"},
    "high_ppl": {"method": "high_ppl"},
}


def candidates(seed: int) -> TensorCandidates:
    return TensorCandidates(torch.randn(COUNT, 64, 5, generator=torch.Generator().manual_seed(seed)))


def make(**settings: Any) -> Selector:
    config = SelectionConfig(**{"method": "opus", "sketch_dim": 64, "guards": UNGUARDED, **settings})
    return Selector(config, make_backend(), num_selected=4, proxy=proxy, seed=0)


def estimate_of(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return what a selector with ``settings`` runs at its first step, given a micro-batch size."""
    seen: list[Callable[[int], None]] = []

    def keep(run: Callable[[int], None], *rest: Any) -> tuple[int, str]:
        seen.append(run)
        return 1, "scoring micro-batch 1"

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "find_micro_batch_size", keep)
        make(**settings).select(candidates(0), 0)
    return seen[0]


@pytest.mark.parametrize("case", SETTINGS)
def test_peaks_of_estimates_are_those_of_torchs_allocator(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = estimate_of(SETTINGS[case], monkeypatch)
    run(4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(4)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert memory.peak_bytes(partial(run, 4), CPU) == pytest.approx(max(held), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", SETTINGS)
def test_the_size_found_keeps_a_selectors_passes_within_half_of_the_free_memory(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = estimate_of(SETTINGS[case], monkeypatch)
    run(1)
    peaks = {2**power: memory.peak_bytes(partial(run, 2**power), CPU) for power in range(6)}
    assert list(peaks.values()) == sorted(set(peaks.values()))  # larger passes take more
    explicit = make(**SETTINGS[case], score_micro_batch_size=4).select(candidates(0), 0)
    assert explicit.notes == []
    # free for half of which a size is just enough, or a byte too little
    for free, expected in ((1, 1), (2 * peaks[4], 4), (2 * peaks[8] - 2, 4), (2 * peaks[8], 8), (10**12, COUNT)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        found = make(**SETTINGS[case])
        first, second = found.select(candidates(0), 0), found.select(candidates(1).take(torch.arange(8)), 1)
        assert found.state_dict()["micro_batch_size"] == expected
        assert first.notes[0].startswith(f"scoring micro-batch {expected} (takes ")
        assert (len(first.notes), second.notes, first.events) == (1, [], [])
        torch.testing.assert_close(first.utilities, explicit.utilities, rtol=1e-3, atol=1e-6)
        same = make(**SETTINGS[case], score_micro_batch_size=expected).select(candidates(0), 0)
        assert torch.equal(first.utilities, same.utilities)  # nothing of the search is left
        assert peaks[expected] <= free / 2 or expected == 1


def test_a_resumed_selector_keeps_the_size_whatever_is_free_then(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(proxy_half_life=0.0)
    assert first.state_dict() == {}
    first.select(candidates(0), 0)
    state = first.state_dict()
    assert state["micro_batch_size"] == COUNT
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    second = make(proxy_half_life=0.0)
    second.load_state_dict(state)
    assert second.state_dict() == state
    found, expected = second.select(candidates(1), 1), first.select(candidates(1), 1)
    assert found.notes == []
    assert torch.equal(found.utilities, expected.utilities)
    for settings, size in (({"redundancy": 0.5}, 1), ({"score_length": 3}, 1)):  # other passes: found anew
        other = make(proxy_half_life=0.0, **settings)
        other.load_state_dict(state)
        other.select(candidates(1), 1)
        assert other.state_dict()["micro_batch_size"] == size
    explicit = make(proxy_half_life=0.0, score_micro_batch_size=2)
    explicit.load_state_dict(state)
    assert explicit.select(candidates(1), 1).notes == []
    assert explicit.state_dict().keys() == {"estimator"}


def test_the_size_is_found_anew_only_where_what_is_kept_of_candidates_changed() -> None:
    """Checkpoints from before gram_sketch keep their size: without a Gram matrix, and with a sketch of each layer."""
    one = {"method": "opus", "score_micro_batch_size": None}
    plain = scorer._settings(SelectionConfig(**one))
    assert "gram_sketch" not in plain
    assert scorer._settings(SelectionConfig(**one, gram_sketch="per_layer", groups=2, check_every=3)) == plain
    before, now = (
        scorer._settings(SelectionConfig(**one, redundancy=0.5, gram_sketch=way)) for way in ("per_layer", "summed")
    )
    assert before == plain.replace("redundancy=0.0", "redundancy=0.5")
    assert now == before.replace("gram='countsketch',", "gram='countsketch', gram_sketch='summed',")


def test_nothing_is_measured_where_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: torch.device) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr(memory, "free_bytes", refused)
    for settings in ({"estimator": "exact"}, {"method": "uniform"}, {"score_micro_batch_size": 2}):
        assert make(**settings).select(candidates(0), 0).notes == []
    long = TensorCandidates(torch.randn(4, 2 * PASS_TOKENS["cpu"], 5))
    assert make().select(long, 0).notes == ["scoring micro-batch 1"]


# -- the proxy's passes ------------------------------------------------------------------------------------------------


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Selector]:
    """Make selectors with 12 proxy sequences, of which a training pass takes two, as if it were for a GPU."""
    monkeypatch.setattr(scorer, "_saves_launches", lambda device: True)

    def made(**settings: Any) -> Selector:
        given = {"score_micro_batch_size": 8, "guards": UNGUARDED, "proxy_batch_size": 12, **settings}
        backend = make_backend()
        backend.micro_batch_size = 2
        many = {name: lambda step, first=first: batch(first + step, 12) for name, first in (("proxy", 1), ("pool", 99))}
        return Selector(SelectionConfig(method="opus", **given), backend, num_selected=4, seed=0, **many)

    return made


def proxy_passes(selector: Selector, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Sizes that a scoring asks of gradients, in turn."""
    asked: list[int | None] = []
    gradient = selector.backend.gradient

    def asking(proxy: Any, length: int | None = None, **more: Any) -> Any:
        asked.append(more.get("micro_batch_size"))
        return gradient(proxy, length, **more)

    with monkeypatch.context() as patch:
        patch.setattr(selector.backend, "gradient", asking)
        selector.select(candidates(0), 0)
    return asked


@pytest.mark.parametrize("contrast", [False, True])
def test_the_proxys_passes_grow_from_trainings_with_the_free_memory(
    contrast: bool, proxies: Callable[..., Selector], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, expected in ((10**12, 8), (0, 2)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        selector = proxies(contrast=contrast)
        assert selector.state_dict()["proxy_micro_batch_size"] is None
        first = selector.select(candidates(0), 0)
        assert first.notes[0].startswith(f"proxy micro-batch {expected} (takes ")
        state = selector.state_dict()
        assert state["proxy_micro_batch_size"] == expected
        set_so = proxies(contrast=contrast, proxy_micro_batch_size=expected)
        assert torch.equal(set_so.select(candidates(0), 0).utilities, first.utilities)  # nothing of the search is left
        monkeypatch.setattr(memory, "free_bytes", lambda device: pytest.fail("measured"))
        resumed = proxies(contrast=contrast)
        resumed.load_state_dict(state)
        assert resumed.state_dict().keys() == state.keys()
        again = selector.select(candidates(1), 1).utilities
        assert torch.equal(resumed.select(candidates(1), 1).utilities, again)
        assert proxy_passes(resumed, monkeypatch) == [expected]


def test_a_state_of_before_goes_on_with_trainings_passes(
    proxies: Callable[..., Selector], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = proxies()
    first.select(candidates(0), 0)
    state = first.state_dict()
    del state["proxy_micro_batch_size"], state["proxy_sized_for"]
    resumed = proxies()
    resumed.load_state_dict(state)
    resumed.load_state_dict(resumed.state_dict())
    assert proxy_passes(resumed, monkeypatch) == [None]
    other = proxies(contrast=True)  # other passes: found anew
    other.load_state_dict(resumed.state_dict())
    assert proxy_passes(other, monkeypatch)[:2] == [2, 2]
    assert other.state_dict()["proxy_micro_batch_size"] == 8


def test_a_cpu_and_a_size_that_is_set_measure_no_proxy(
    proxies: Callable[..., Selector], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proxy_passes(proxies(proxy_micro_batch_size=5), monkeypatch) == [5]
    monkeypatch.undo()
    selector = proxies()
    assert proxy_passes(selector, monkeypatch) == [None]
    assert "proxy_sized_for" not in selector.state_dict()


def test_a_backend_that_knows_no_size_is_not_told_one(
    proxies: Callable[..., Selector], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(self: Any, proxy: Any, length: int | None = None, *, against: Any = None) -> Any:
        return plain(self, proxy, length, against=against)

    plain = ModuleBackend.gradient
    monkeypatch.setattr(ModuleBackend, "gradient", gradient)
    assert proxies().select(candidates(0), 0).notes == []
    with pytest.raises(ValueError, match=r"proxy_micro_batch_size=4: ModuleBackend.gradient takes no micro_batch_size"):
        proxies(proxy_micro_batch_size=4)


# -- ranks -------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "tp2-sp": (ParallelConfig(tp=2, sequence_parallel=True), EngineConfig(device="cpu", precision="fp32")),
    "pp2": (ParallelConfig(pp=2), EngineConfig(device="cpu", precision="fp32")),
    "zero3": (ParallelConfig(), EngineConfig(name="deepspeed", zero_stage=3, device="cpu", precision="fp32")),
}


def sizes(layout: str) -> list[tuple[int, int, bool]]:
    """(size found, that of the proxy, whether utilities are those of these sizes set).

    With much memory on both ranks, and with none on the last.
    """
    parallel, kind = LAYOUTS[layout]
    mesh = Mesh(parallel, "cpu")
    (real, saves), found = (memory.free_bytes, scorer._saves_launches), []
    scorer._saves_launches = lambda device: True
    try:
        engine = tiny_engine(mesh, parallel=parallel, engine=kind, micro_batch_size=1)
        engine.train_step(random_batch(8, 0))
        backend = engine.scoring_backend()
        given = {"num_selected": 4, "proxy": lambda step: random_batch(4, 700 + step), "seed": 7}
        config = {"method": "opus", "redundancy": 0.5, "sketch_dim": 64}  # losses, then a ghost pass
        for last in (10**12, 0):
            memory.free_bytes = lambda device, last=last: last if mesh.rank == 1 else 10**12
            auto = Selector(SelectionConfig(**config), backend, **given)
            utilities = auto.select(random_batch(8, 2), 2).utilities
            size, proxies = (auto.state_dict()[name] for name in ("micro_batch_size", "proxy_micro_batch_size"))
            set_so = {"score_micro_batch_size": size, "proxy_micro_batch_size": proxies}
            explicit = Selector(SelectionConfig(**config, **set_so), backend, **given)
            same = torch.equal(utilities, explicit.select(random_batch(8, 2), 2).utilities)
            found.append((size, proxies, same))
    finally:
        memory.free_bytes, scorer._saves_launches = real, saves
        mesh.close()
    return found


def test_ranks_agree_on_the_size_that_fits_on_all(pool: Pool) -> None:
    found = pool.jobs(dict.fromkeys(LAYOUTS, 2), sizes).begin(LAYOUTS)
    for layout, (parallel, _) in LAYOUTS.items():
        most, proxies = (4, 2) if parallel == ParallelConfig() else (8, 4)
        assert found[layout] == [[(most, proxies, True), (1, 1, True)]] * 2, layout
