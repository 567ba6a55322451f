"""Estimates what a run writes into its folder, before it writes anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megaopus.config.run_config import RunConfig
from megaopus.distributed.config import ParallelConfig
from megaopus.models.flops import count_parameters
from megaopus.planning.memory import memory

CHOICE_BYTES = 17
"""Of a row of choices/ with utilities or prescreen scores, compressed: 16.3 measured (24 with both, 6 with neither)."""
LAYER_BYTES = 1 << 16
"""Of a layer's names, shapes and paddings in a checkpoint: little, but of a toy model a quarter."""
STEP_BYTES = 1024
"""Of an update in metrics.jsonl and selection.jsonl."""


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Says what the rest of a run writes, in bytes."""

    checkpoint: int
    """Of one checkpoint: weights, optimizer state, running proxy gradient."""
    sure: int
    """Checkpoints that the run adds in any case, at most at a time: fewer than ``most`` if it may end before."""
    most: int
    """Checkpoints that it may add, at most at a time."""
    record: int
    """Of metrics and choices."""


def disk_use(config: RunConfig, vocab_size: int, precision: str, first_step: int = 0, there: int = 0) -> DiskUse:
    """Estimate what a run writes from update ``first_step`` on, beside the ``there`` checkpoints that it has."""
    steps, rule = config.train.steps, config.checkpoint
    kept = steps // rule.keep_every - first_step // rule.keep_every if rule.keep_every else 0
    every = rule.every_steps
    saves = (-(-steps // every) - first_step // every) if every else 1  # and one at the end
    room = max(0, rule.keep + 1 - there)  # the oldest is removed when the newest is whole
    return DiskUse(
        checkpoint=checkpoint_bytes(config, vocab_size, precision),
        sure=kept + min(room, max(0, saves - kept)),
        most=kept + room,
        record=choice_rows(config, first_step)[1] + STEP_BYTES * (steps - first_step),
    )


def checkpoint_bytes(config: RunConfig, vocab_size: int, precision: str) -> int:
    """Estimate the bytes of a checkpoint: its tensors, and what describes them."""
    return tensor_bytes(config, vocab_size, precision) + LAYER_BYTES * (config.model.num_layers + 1)


def tensor_bytes(config: RunConfig, vocab_size: int, precision: str) -> int:
    """Bytes of a checkpoint's tensors, which are those of the whole model at every layout."""
    state = memory(replace(config, parallel=ParallelConfig()), vocab_size, 1, precision, 0)["optimizer state"].size
    average = config.selection.needs_proxy and config.selection.proxy_half_life > 0
    copies = precision == "bf16" and config.engine.name == "megatron"  # beside the main weights
    width = 4 + 4 * average + 2 * copies
    return width * count_parameters(config.model, vocab_size, config.data.seq_len) + state


def choice_rows(config: RunConfig, first_step: int = 0) -> tuple[int, int]:
    """(rows, bytes) of choices/ from update ``first_step`` on; nothing where it is not kept."""
    if not config.logging.selection:
        return 0, 0
    every, picked, steps = config.logging.selection_every, config.train.global_batch_size, config.train.steps
    whole = _multiples(first_step, steps, every)
    rows = whole * config.buffer_size() + (steps - first_step - whole) * picked
    size = rows * CHOICE_BYTES
    overlaps = 8 * config.buffer_size() * picked * config.selection.score_every
    if config.selection.redundancy > 0 and overlaps <= config.logging.overlaps_mb * 1e6:
        size += overlaps * _multiples(first_step, steps, math.lcm(every, config.selection.score_every))
    return rows, size


def _multiples(start: int, stop: int, every: int) -> int:
    """Multiples of ``every`` in [start, stop)."""
    return -(-stop // every) - -(-start // every)
