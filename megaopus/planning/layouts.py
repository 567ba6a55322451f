"""Enumerates the layouts of a run on so many ranks, leaves out what is refused, and sorts the rest by speed."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from megaopus.config.run_config import RunConfig
from megaopus.config.validation import layout_problems
from megaopus.planning.machine import Machine
from megaopus.planning.memory import memory, peak, rows_at_peak
from megaopus.planning.step_time import StepWork, WorkCounter, tokens_per_step

MOST_MICRO_BATCH, MOST_CHUNKS = 32, 4
"""Sequences of a micro-batch, and model chunks of a stage, that are tried at most."""
LEAST_PART = 1024
"""Positions of a sequence that a GPU is given at least, where context parallelism is tried."""
_FURTHER = 64
"""Times as many ranks that are tried at most where nothing fits."""


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """Names the settings that ``plan`` chooses."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    micro_batch_size: int = 1
    recompute: bool = False

    def settings(self) -> dict[str, object]:
        """Dotted key -> value."""
        return {key: getattr(self, name) for name, key in KEYS.items()}

    def told(self, world_size: int) -> str:
        """Say it in short words; what is off is left out."""
        degrees = {"dp": world_size // (self.tp * self.cp * self.pp)}
        degrees |= {name: getattr(self, name) for name in ("tp", "cp", "pp", "vpp", "ep") if getattr(self, name) > 1}
        told = " ".join(f"{name}{degree}" for name, degree in degrees.items())
        told += " sp" * self.sequence_parallel + " sharded" * self.distributed_optimizer
        return told + f" mb{self.micro_batch_size}" + " recompute" * self.recompute

    @classmethod
    def of(cls, config: RunConfig) -> Layout:
        """Read the layout of a run."""
        return cls(**{name: getattr(_section(config, key), key.rpartition(".")[2]) for name, key in KEYS.items()})

    def put(self, config: RunConfig) -> RunConfig:
        """Copy a run's settings, at this layout."""
        found = copy.copy(config)
        found.parallel, found.train = copy.copy(config.parallel), copy.copy(config.train)
        found.engine = copy.copy(config.engine)
        for name, key in KEYS.items():
            setattr(_section(found, key), key.rpartition(".")[2], getattr(self, name))
        return found


KEYS = {
    **{name: f"parallel.{name}" for name in ("tp", "cp", "pp", "vpp", "ep")},
    "sequence_parallel": "parallel.sequence_parallel",
    "distributed_optimizer": "parallel.distributed_optimizer",
    "micro_batch_size": "train.micro_batch_size",
    "recompute": "engine.recompute",
}
"""Field of ``Layout`` -> the setting that it is."""
assert [each.name for each in fields(Layout)] == list(KEYS)


def _section(config: RunConfig, key: str) -> object:
    return getattr(config, key.partition(".")[0])


@dataclass(frozen=True, slots=True)
class Job:
    """Says what is to be planned, and for what."""

    config: RunConfig
    vocab_size: int
    world_size: int
    per_node: int
    precision: str
    device: str
    memory: int | None
    """Bytes of a device; None: not told, nothing is left out for it."""
    kept: frozenset[str] = frozenset()
    """Fields of ``Layout`` that stay as ``config`` has them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Is a layout that nothing refuses, and the work of its steps."""

    layout: Layout
    config: RunConfig
    work: StepWork

    def speed(self, machine: Machine) -> float:
        """Tokens per second that are predicted, over the whole run."""
        return tokens_per_step(self.config) / self.work.seconds(machine)


def allowed(job: Job, refused: Counter[str]) -> list[Candidate]:
    """List every layout that validation and the engine take; ``refused`` counts the others by the setting at fault."""
    found: list[Candidate] = []
    counter = WorkCounter(job.vocab_size, job.world_size, job.precision, job.device, job.per_node)
    for layout in _frames(job):
        config = layout.put(job.config)
        share = config.train.global_batch_size // (job.world_size // config.parallel.model_ranks)
        fixed = "micro_batch_size" in job.kept
        for size in [layout.micro_batch_size] if fixed else _divisors(share, MOST_MICRO_BATCH):
            config.train.micro_batch_size = size
            if problems := layout_problems(config, job.world_size):
                refused[problems[0].key] += 1
            else:
                for recompute in [layout.recompute] if "recompute" in job.kept else [False, True]:
                    chosen = replace(layout, micro_batch_size=size, recompute=recompute)
                    found.append(Candidate(chosen, each := chosen.put(job.config), counter.count(each)))
    return found


def _frames(job: Job) -> Iterator[Layout]:
    """Yield the arrangements of the ranks that divide what they must, before any rule is asked."""
    config, world, given = job.config, job.world_size, Layout.of(job.config)
    layers, experts, on_cpu = config.model.num_layers, config.model.num_experts, job.device == "cpu"

    def degrees(name: str, whole: int, most: int) -> list[int]:
        return [getattr(given, name)] if name in job.kept else _divisors(whole, most)

    def sharded(ranks: int) -> list[bool]:
        """List whether optimizers are sharded: the megatron engine's choice, where some rank holds the same."""
        possible = ranks > 1 and config.engine.name == "megatron"
        return [given.distributed_optimizer] if "distributed_optimizer" in job.kept else [False, True][: 1 + possible]

    parts = world if on_cpu else max(1, config.data.seq_len // LEAST_PART)
    for tp, cp, pp in itertools.product(
        degrees("tp", world, min(job.per_node, config.model.num_heads)),
        degrees("cp", world, parts),
        degrees("pp", world, layers),
    ):
        dp = world // (tp * cp * pp)
        if world % (tp * cp * pp) or config.train.global_batch_size % dp or layers % pp:
            continue
        sequence = tp > 1 and (experts is not None or not on_cpu)  # on GPUs it costs nothing and takes less memory
        sequence = given.sequence_parallel if "sequence_parallel" in job.kept else sequence
        for vpp, ep, shards in itertools.product(
            degrees("vpp", layers // pp, MOST_CHUNKS if pp > 1 else 1),
            degrees("ep", experts or 1, world // pp),
            sharded(dp * cp),
        ):
            ranks = replace(given, tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep)
            yield replace(ranks, sequence_parallel=sequence, distributed_optimizer=shards)


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def rank_peak(job: Job, config: RunConfig) -> tuple[int, int]:
    """(bytes that the stage which needs most takes at its peak, that stage)."""
    stages = list(range(config.parallel.pp))
    if config.model.num_experts is None:  # those between hold fewer passes than the first, and no table
        stages = sorted({0, config.parallel.pp - 1})
    peaks = {stage: peak(_rows(job, config, stage))[1] for stage in stages}
    stage = max(peaks, key=lambda each: peaks[each])
    return peaks[stage], stage


def _rows(job: Job, config: RunConfig, stage: int) -> dict:
    return memory(config, job.vocab_size, job.world_size, job.precision, stage, job.device)


@dataclass(frozen=True, slots=True)
class Choice:
    """Is a layout that fits, with its peak in bytes."""

    candidate: Candidate
    peak: int


def fastest(
    job: Job,
    candidates: Sequence[Candidate],
    seconds: Callable[[Candidate], float],
    count: int,
) -> tuple[list[Choice], int]:
    """(the ``count`` fastest that fit, by ``seconds`` of a step; how many faster ones do not fit).

    Memory is worked out in the order of speed, as far as is needed. Of equal speed the smaller peak comes first.
    """
    found: list[Choice] = []
    without = 0
    for candidate in sorted(candidates, key=lambda each: (seconds(each), each.layout)):
        if len(found) >= count:
            break
        needed, _ = rank_peak(job, candidate.config)
        if job.memory is None or needed <= job.memory:
            found.append(Choice(candidate, needed))
        else:
            without += 1
    return sorted(found, key=lambda each: (seconds(each.candidate), each.peak)), without


@dataclass(frozen=True, slots=True)
class Miss:
    """Says what comes closest where nothing fits."""

    candidate: Candidate
    peak: int
    stage: int
    largest: list[tuple[str, int]]
    """What takes most at its peak, and the bytes."""


def closest(job: Job, candidates: Sequence[Candidate]) -> Miss | None:
    """Find the layout of the smallest peak; None: one fits."""
    assert job.memory is not None
    smallest: Miss | None = None
    for candidate in _smallest_kinds(candidates):
        needed, stage = rank_peak(job, candidate.config)
        if needed <= job.memory:
            return None
        if smallest is None or needed < smallest.peak:
            smallest = Miss(candidate, needed, stage, [])
    if smallest is None:
        return None
    rows = rows_at_peak(_rows(job, smallest.candidate.config, smallest.stage))
    largest = sorted(((what, size) for what, (size, _) in rows.items()), key=lambda each: -each[1])
    return replace(smallest, largest=largest[:3])


def _smallest_kinds(candidates: Sequence[Candidate]) -> Collection[Candidate]:
    """Of each arrangement of ranks keep the smallest micro-batch, recomputed: no other of it takes less."""
    best: dict[Layout, Candidate] = {}
    for each in candidates:
        key = replace(each.layout, micro_batch_size=1, recompute=False)
        rank = (each.layout.micro_batch_size, not each.layout.recompute)
        if key not in best or rank < (best[key].layout.micro_batch_size, not best[key].layout.recompute):
            best[key] = each
    return best.values()


def ranks_that_fit(job: Job) -> int | None:
    """Find, by doubling, the ranks on which something fits; None: not on 64 times as many."""
    factor = 2
    while factor <= _FURTHER:
        larger = replace(job, world_size=factor * job.world_size)
        candidates = allowed(larger, Counter())
        if candidates and closest(larger, candidates) is None:
            return larger.world_size
        factor *= 2
    return None
