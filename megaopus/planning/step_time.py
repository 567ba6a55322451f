"""Predicts the seconds of a step at a layout: work, messages and the idle time of a pipeline. Torch is not imported.

What is not in it: kernels whose speed depends on the shape, overlap of tensor-parallel messages, validation, saving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megaopus.config.run_config import RunConfig
from megaopus.models.flops import padded_vocab
from megaopus.planning.activations import WIDTH
from megaopus.planning.machine import Machine
from megaopus.planning.rank import Rank
from megaopus.planning.scorer_cost import online

STEP_MESSAGES = 6
"""Of an update, over all ranks or a part of them: losses, the gradient's norm, whether it is finite, and so on."""
_OVERLAPPED = 2 / 3
"""Share of a micro-batch's seconds that its backward pass takes."""


@dataclass(slots=True)
class Work:
    """Counts what a rank does of one kind of thing."""

    flops: float = 0.0
    passes: float = 0.0
    """Forward and backward passes of a layer."""
    numbers: float = 0.0
    """Parameters that are updated."""
    updates: float = 0.0
    inside: float = 0.0
    """Bytes sent to ranks of the same node."""
    between: float = 0.0
    """Bytes sent to other nodes."""
    messages: float = 0.0

    def seconds(self, machine: Machine) -> float:
        """Seconds of all of it, one after the other."""
        found = self.flops * machine.flop_s + self.passes * machine.pass_s + self.numbers * machine.number_s
        found += self.inside * machine.inside_s + self.between * machine.between_s
        return found + self.messages * machine.message_s + self.updates * machine.update_s

    def send(self, each: float, times: float, link: int) -> None:
        """Count ``times`` messages of ``each`` bytes; ``link``: 0 inside a node, else what shares the way to others."""
        self.messages += times
        if link:
            self.between += each * times / link
        else:
            self.inside += each * times


@dataclass(slots=True)
class StepWork:
    """Counts the work of a step at one layout."""

    ranks: int
    micro_batches: int
    vpp: int
    omega: float
    """FLOPs of selection over those of training, in a step that selects."""
    selecting: float
    """Share of the run's steps that select."""
    stages: list[Work] = field(default_factory=list)
    """Of each pipeline stage, for one micro-batch."""
    reduced: list[Work] = field(default_factory=list)
    """Of each stage, sums of gradients, which a backward pass may hide."""
    update: list[Work] = field(default_factory=list)
    """Of each stage, once a step."""
    overlaps: bool = False

    def seconds(self, machine: Machine, *, scores: float | None = None) -> float:
        """Predict a step's seconds; ``scores``: share of steps that select (None: the run's)."""
        share = self.selecting if scores is None else scores
        return self.training(machine) + share * self.selection(machine)

    def training(self, machine: Machine) -> float:
        """Seconds of a step's passes, sums and update."""
        hidden = _OVERLAPPED * max(work.seconds(machine) for work in self.stages) if self.overlaps else 0.0
        reduced = [max(0.0, work.seconds(machine) - hidden) for work in self.reduced]
        once = [work.seconds(machine) + extra for work, extra in zip(self.update, reduced, strict=True)]
        return self._pipelined(machine) + self._shared(max(once), sum(once), machine)

    def selection(self, machine: Machine) -> float:
        """Seconds of the selection of a step that selects: as training's passes, by FLOPs."""
        return self.omega * machine.scoring * self._pipelined(machine)

    def idle(self, machine: Machine) -> float:
        """Share of the passes' seconds in which the slowest stage waits for others."""
        times = [work.seconds(machine) for work in self.stages]
        return 1 - self.micro_batches * max(times) / self._path(times)

    def _pipelined(self, machine: Machine) -> float:
        """Seconds of all micro-batches through the stages."""
        times = [work.seconds(machine) for work in self.stages]
        return self._shared(self._path(times), self.micro_batches * sum(times), machine)

    def _path(self, times: Sequence[float]) -> float:
        """Seconds of the slowest stage's micro-batches, and of filling and draining the others.

        (pp - 1) / (micro-batches x vpp) of the work where stages are equal (Narayanan et al., arXiv 2104.04473).
        """
        return self.micro_batches * max(times) + (sum(times) - max(times)) / self.vpp

    def _shared(self, path: float, of_stages: float, machine: Machine) -> float:
        """Lengthen the longest rank's seconds where ranks share cores: what waits leaves its core to another."""
        if machine.cores is None:
            return path
        return max(path, of_stages * self.ranks / len(self.stages) / machine.cores)


class WorkCounter:
    """Counts the work of steps of one model at any layout on so many ranks, ``per_node`` to a node."""

    def __init__(self, vocab_size: int, world_size: int, precision: str, device: str, per_node: int):
        self._size = vocab_size, world_size, precision
        self._device, self._per_node = device, per_node
        self._sums: dict[tuple, _Sums] = {}

    def count(self, config: RunConfig) -> StepWork:
        """Count the work of a step of ``config``; of every call the model is the same."""
        parallel, train = config.parallel, config.train
        vocab_size, world_size, precision = self._size
        cost = online(config)
        found = StepWork(
            ranks=world_size,
            micro_batches=train.global_batch_size // (world_size // parallel.model_ranks * train.micro_batch_size),
            vpp=parallel.vpp,
            omega=cost.omega,
            selecting=cost.share,
            overlaps=parallel.overlaps(self._device == "cpu"),
        )
        alike: dict[tuple, tuple[Work, Work, Work]] = {}  # of stages between the ends there are many
        for stage in range(parallel.pp):
            rank = Rank(config, vocab_size, world_size, precision, stage, self._device)
            layers = rank.layers()
            kind = (stage == 0, rank.last, layers[False], layers[True])
            if kind not in alike:
                if (key := (*kind, parallel.ep)) not in self._sums:
                    self._sums[key] = _Sums.of(rank)
                of_stage = _Stage(rank, layers, self._sums[key], self._per_node)
                alike[kind] = of_stage.micro_batch(), *of_stage.once()
            for listed, work in zip((found.stages, found.reduced, found.update), alike[kind], strict=True):
                listed.append(work)
        return found


@dataclass(slots=True)
class _Sums:
    """Adds up the parameters of a stage, before tensor parallelism splits them; of experts those of one rank."""

    multiplied: float
    """Numbers of blocks' matrices that a token is multiplied with."""
    split: dict[bool, int]
    """Of experts or not: those that tensor-parallel ranks split."""
    whole: dict[bool, int]
    """Those that each of them has."""

    @classmethod
    def of(cls, rank: Rank) -> _Sums:
        model, ep = rank.config.model, rank.config.parallel.ep
        found = cls(0.0, {False: 0, True: 0}, {False: 0, True: 0})
        for weight in rank.weights():
            (found.split if weight.sharded else found.whole)[weight.expert] += weight.numel
            if weight.matrix:
                share = model.experts_per_token * ep / (model.num_experts or 1) if weight.expert else 1.0
                found.multiplied += weight.numel * share
        return found

    def own(self, expert: bool, parts: int) -> float:
        """Numbers that one of ``parts`` tensor-parallel ranks holds."""
        return self.split[expert] / parts + self.whole[expert]


class _Stage:
    """Counts what a rank of one pipeline stage does."""

    def __init__(self, rank: Rank, layers: Mapping[bool, int], sums: _Sums, per_node: int):
        self.rank, self.layers, self.sums, self.per_node = rank, layers, sums, per_node
        self.config, self.parallel, self.width = rank.config, rank.config.parallel, WIDTH[rank.precision]
        self.depth = layers[False] + layers[True]

    def micro_batch(self) -> Work:
        """Count forward and backward pass of one micro-batch through the stage's layers."""
        config, parallel, rank = self.config, self.parallel, self.rank
        positions = config.train.micro_batch_size * config.data.seq_len / parallel.cp
        work = Work(flops=self._flops(positions), passes=(2 + config.engine.recompute) * self.depth)
        stream = positions * config.model.hidden_size * self.width  # bytes of the residual stream
        if parallel.tp > 1:
            self._tensor_parallel(work, stream, self.depth)
        if parallel.cp > 1:
            heads = config.model.derived_kv_heads() / parallel.tp
            gathered = 2 * positions * heads * config.model.derived_head_dim() * self.width * (parallel.cp - 1)
            times = (2 + config.engine.recompute) * self.depth
            work.send(gathered, times, self._link(parallel.tp, parallel.cp))
        if parallel.pp > 1:
            split = parallel.tp if parallel.sequence_parallel else 1
            ends = (rank.stage == 0) + rank.last
            times = 2 * parallel.vpp - ends  # of a chunk its output, and the gradient of its input
            work.send(stream / split, times, self._link(rank.world_size // parallel.pp, parallel.pp))
        if parallel.ep > 1 and self.layers[True]:
            self._experts(work, stream, self.layers[True])
        return work

    def once(self) -> tuple[Work, Work]:
        """Count the sums of gradients, and the rest of an update."""
        rank, parallel = self.rank, self.parallel
        reduced, update = Work(), Work(updates=1, messages=STEP_MESSAGES if rank.world_size > 1 else 0)
        sharded = self.config.engine.spec().shards_optimizer(parallel)
        for expert in (False, True):
            parts = parallel.derived_expert_tp() if expert else parallel.tp
            numbers, apart = self.sums.own(expert, parts), parts * (parallel.ep if expert else 1)
            copies = rank.world_size // (apart * parallel.pp)
            update.numbers += numbers / rank.sharing(expert)
            if not numbers or copies == 1:
                continue
            link, part = self._link(apart, copies), (copies - 1) / copies
            if sharded:
                reduced.send(part * 4 * numbers, 1, link)
                update.send(part * self.width * numbers, 1, link)
            else:
                reduced.send(2 * part * 4 * numbers, 1, link)
        ends = parallel.pp > 1 and (rank.stage == 0 or rank.last)
        if ends and self.config.model.tied:
            table = padded_vocab(rank.vocab_size) * self.config.model.hidden_size / parallel.tp
            update.send(4 * table, 1, self._link(rank.world_size // parallel.pp, parallel.pp))
        if self.config.engine.name == "deepspeed" and self.config.engine.zero_stage == 3:
            numbers = self.sums.own(False, parallel.tp)
            micro_batches = self.config.train.global_batch_size // (rank.dp * self.config.train.micro_batch_size)
            gathers = (2 + self.config.engine.recompute) * micro_batches
            update.send((rank.dp - 1) / rank.dp * self.width * numbers, gathers, self._link(parallel.tp, rank.dp))
        return reduced, update

    def _flops(self, positions: float) -> float:
        """FLOPs of forward and backward; a recomputed layer's forward pass once more."""
        model, rank = self.config.model, self.rank
        attention = 2 * model.num_heads * model.derived_head_dim() * self.config.data.seq_len * rank.layers().total()
        head = padded_vocab(rank.vocab_size) * model.hidden_size if rank.last else 0
        passes = 4 if self.config.engine.recompute else 3  # forwards: a backward pass is two
        return positions * 2 * (passes * (self.sums.multiplied + attention) + 3 * head) / self.parallel.tp

    def _tensor_parallel(self, work: Work, stream: float, layers: int) -> None:
        tp, forwards = self.parallel.tp, 1 + self.config.engine.recompute
        link, part = self._link(1, tp), (tp - 1) / tp
        if self.parallel.sequence_parallel:  # gathered and scattered; inputs once more for the weights' gradients
            work.send(part * stream, (4 * forwards + 6) * layers, link)
        else:
            work.send(2 * part * stream, (2 * forwards + 2) * layers, link)
        if self.rank.stage == 0:
            work.send(2 * part * stream, 1, link)
        if self.rank.last:
            work.send(2 * part * stream, 1, link)
            work.send(8 * part * stream / (self.config.model.hidden_size * self.width), 3, link)

    def _experts(self, work: Work, stream: float, layers: int) -> None:
        """Tokens go to their experts and back, once for each expert; on a CPU every rank of them is given all."""
        parallel, model = self.parallel, self.config.model
        ranks, mine = parallel.ep * parallel.derived_expert_tp(), stream / parallel.tp
        times = 2 * (2 + self.config.engine.recompute) * layers
        copies = 1.0 if self.rank.device == "cpu" else model.experts_per_token / ranks
        each = mine * copies * (ranks - 1)
        work.send(each, times, min(1, self._link(1, ranks)))  # to each other rank something else

    def _link(self, stride: int, size: int) -> int:
        """Find over what ``size`` ranks, each ``stride`` after the other, send: 0 if one node has them all.

        Else how many of a node's are among them: a ring goes to the next node once, over the adapters of all these.
        """
        return 0 if stride * size <= self.per_node else max(1, self.per_node // stride)


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of an update."""
    return config.train.global_batch_size * config.data.seq_len
