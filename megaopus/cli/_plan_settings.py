"""Composes the settings of a run whose layout is not chosen yet, with or without its corpus."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megaopus.cli._notes import tell
from megaopus.config.aliases import current_override, notes
from megaopus.config.compose import compose
from megaopus.config.run_config import RunConfig
from megaopus.errors import ConfigError, Problem
from megaopus.planning.layouts import KEYS, Job, Layout
from megaopus.planning.memory import precisions

WIDTH = 100
CORPUS = "CORPUS"
"""What stands for a corpus that is not named."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Holds a job to plan, and what the command line leaves open of it."""

    job: Job
    pool: int | None
    """Sequences that candidates are drawn from; None: not known."""
    stands: list[str]
    """Overrides that stand for what was not told."""
    given: Layout | None
    """The layout that the settings have without a plan; None: they are none that could be started."""

    def overrides(self, layout: Layout) -> list[str]:
        """Write what the settings must say besides for this layout."""
        return [
            f"{key}={_written(value)}"
            for name, key in KEYS.items()
            for value in [getattr(layout, name)]
            if name not in self.job.kept and (self.given is None or value != getattr(self.given, name))
        ]


def planned(args: argparse.Namespace) -> Planned:
    """Compose what is to be planned.

    Raises ConfigError for settings that no layout could make right, DataError if the corpus cannot be read.
    """
    tell(notes(args.overrides))
    kept, off = _kept(args.overrides), Layout()
    neutral = [f"{key}={_written(getattr(off, name))}" for name, key in KEYS.items() if name not in kept]
    stands, corpora = [], not args.no_corpora
    if _names_no_corpus([*args.overrides, *neutral], args.config_dir):
        stands, corpora = [f"data.path={CORPUS}"], False
        tell(["no corpus is named (data.path): what it would tell is taken from model.vocab_size and --pool-tokens"])
    elif corpora and args.pool_tokens is not None:
        reason, remedy = "the corpus that is named has its own size", "leave it out, or give --no-corpora too"
        raise ConfigError([Problem("--pool-tokens", args.pool_tokens, reason, remedy)])
    config = compose([*args.overrides, *neutral, *stands], args.config_dir, corpora=corpora)
    vocab_size, pool = _opened(config) if corpora else _told(config, args.pool_tokens)
    on_cpu = config.engine.device == "cpu"
    device = "cpu" if on_cpu else "cuda"
    job = Job(
        config=config,
        vocab_size=vocab_size,
        world_size=args.gpus,
        per_node=args.gpus if on_cpu else _per_node(args),
        precision=precisions(config, device)[0],
        device=device,
        memory=args.memory,
        kept=frozenset(kept),
    )
    return Planned(job, pool, stands, _given([*args.overrides, *stands], args.config_dir))


def _given(overrides: list[str], config_dir: Path | None) -> Layout | None:
    try:
        return Layout.of(compose(overrides, config_dir, corpora=False))
    except ConfigError:  # of a layout that no plan has touched
        return None


def wide() -> Console:
    """Open the console of a plan: at most ``WIDTH`` columns, and as many where it is no terminal."""
    console = Console(highlight=False)
    return Console(highlight=False, width=min(WIDTH, console.width) if console.is_terminal else WIDTH)


def _per_node(args: argparse.Namespace) -> int:
    from megaopus.planning.estimate import nodes_of

    return nodes_of(args.gpus, args.gpus_per_node, False)[1]


def _kept(overrides: list[str]) -> set[str]:
    """Find the fields of ``Layout`` that overrides set, under whatever name."""
    keys = {current_override(text).lstrip("+").partition("=")[0] for text in overrides}
    return {name for name, key in KEYS.items() if key in keys}


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names_no_corpus(overrides: list[str], config_dir: Path | None) -> bool:
    """Say whether settings leave the corpus open; other problems are for the next look at them."""
    try:
        compose(overrides, config_dir, corpora=False)
    except ConfigError as error:
        return any(problem.key == "data.path" and not problem.value for problem in error.problems)
    return False


def _opened(config: RunConfig) -> tuple[int, int | None]:
    """(tokens that the model knows, sequences of the pool), as the corpus has it."""
    from megaopus.data.run_data import RunData

    data = RunData.describe(config.data, config.data_needs())
    return config.model.derived_vocab_size(data.vocab_size), data.sequences["pool"]


def _told(config: RunConfig, pool_tokens: int | None) -> tuple[int, int | None]:
    """(tokens that the model knows, sequences of the pool or None), as the command line has it. Raises ConfigError."""
    problems = []
    if config.model.vocab_size is None:
        remedy = "set model.vocab_size=50257, or as many as your tokenizer has, or name a corpus with data.path"
        problems.append(Problem("model.vocab_size", None, "no corpus says how many tokens the model knows", remedy))
    train = config.train
    if train.epochs is not None and train.tokens is None:
        if pool_tokens is None:
            remedy = "give --pool-tokens, or the length as train.tokens or train.steps"
            problems.append(Problem("train.epochs", train.epochs, "no corpus says how long an epoch is", remedy))
        else:
            train.steps = max(1, round(train.epochs * pool_tokens / (train.global_batch_size * config.data.seq_len)))
    if problems:
        raise ConfigError(problems)
    assert config.model.vocab_size is not None
    return config.model.vocab_size, None if pool_tokens is None else max(1, pool_tokens // config.data.seq_len)
