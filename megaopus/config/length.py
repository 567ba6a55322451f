"""Turns a length in tokens or epochs into steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from megaopus.config.corpus_rules import read_manifest
from megaopus.config.run_config import RunConfig


def set_steps(config: RunConfig, refuse: Callable[[str, object, str, str], None]) -> None:
    """Set ``train.steps`` where ``train.tokens`` or ``train.epochs`` is given: as few as make that many update tokens.

    An epoch is as many update tokens as the pool has. ``refuse``: key, value, reason, remedy of what cannot be.
    """
    train, tokens = config.train, config.train.tokens
    if train.epochs is not None and tokens is None:
        counts = read_manifest(config.data.path).get("counts")
        if config.data.filter.column is not None:
            reason = "how many tokens data.filter keeps is not known beforehand"
            refuse("train.epochs", train.epochs, reason, "give the length as train.tokens or train.steps")
        elif isinstance(counts, dict):  # else a rule of the corpus says what is wrong with it
            pool = sum(splits.get("pool", {}).get("tokens", 0) for splits in counts.values())
            tokens = math.ceil(train.epochs * pool)
    if tokens is not None and train.global_batch_size > 0 and config.data.seq_len > 0:
        train.steps = max(1, math.ceil(tokens / (train.global_batch_size * config.data.seq_len)))
