"""Show what a run would be, without training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megaopus.cli._settings import add_settings, composed
from megaopus.errors import ConfigError, MegaopusError

if TYPE_CHECKING:
    from megaopus.config.run_config import RunConfig

DESCRIPTION = (
    "Compose and validate the settings of a run, open its data, and print layout, parameters, FLOPs, memory and\n"
    "the launch command. Needs no GPU and writes nothing."
)
EXAMPLES = (
    "  python -m megaopus check experiment=small_opus data.path=corpus\n"
    "  python -m megaopus check model=gpt2_xl parallel=tp2 data.path=corpus --world-size 8"
)
GPUS_PER_NODE = 8
LARGEST_TABLE = 16
"""Ranks up to which the groups of the mesh are listed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the run, and the ranks to lay it out on."""
    add_settings(parser)
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks to lay the run out on (default: tp x cp x pp)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=GPUS_PER_NODE,
        metavar="N",
        help="for the launch command (default: %(default)s)",
    )
    parser.add_argument(
        "--memory", type=memory_size, metavar="SIZE", help="of a GPU, as 80GB: says whether the run fits"
    )
    parser.add_argument(
        "--scorer-parameters",
        type=_parameters,
        metavar="N",
        help="of a model that may score the corpus ahead of time, as 125M (default: only the run's own is considered)",
    )
    only = "compose and validate the settings, with what the manifests of the corpora say, and end there"
    parser.add_argument("--settings-only", action="store_true", help=only)
    parser.add_argument("--no-corpora", action="store_true", help="the same without the corpora, which lie elsewhere")


def run(args: argparse.Namespace) -> int:
    """Print what the run of these settings would be."""
    if args.world_size is not None and args.world_size < 1:
        raise argparse.ArgumentError(None, "--world-size must be at least 1")
    if args.gpus_per_node < 1:
        raise argparse.ArgumentError(None, "--gpus-per-node must be at least 1")
    config = composed(args, args.world_size, corpora=not args.no_corpora)
    if args.settings_only or args.no_corpora:
        print(f"the settings fit {args.world_size or config.parallel.model_ranks} rank(s)")
        return 0
    refused = show(
        config,
        args.world_size,
        args.overrides,
        args.config_dir,
        per_node=args.gpus_per_node,
        scorer_parameters=args.scorer_parameters,
        memory_size=args.memory,
    )
    return 2 if refused else 0


def show(
    config: RunConfig,
    world_size: int | None = None,
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
    console: Console | None = None,
    per_node: int = GPUS_PER_NODE,
    scorer_parameters: float | None = None,
    memory_size: int | None = None,
) -> list[str]:
    """Print everything that follows from ``config`` on ``world_size`` ranks (None: tp x cp x pp, the fewest possible).

    ``overrides`` and ``config_dir`` are repeated in the launch command, for nodes of ``per_node`` GPUs.
    ``scorer_parameters``: of a model that may score ahead of time; ``memory_size``: bytes of a device, to say whether
    the run fits. Returns why the run could not start here, as it was printed.
    Raises ConfigError if the settings do not fit the ranks, DataError if a corpus cannot be read.
    """
    from megaopus.config.run_config import differences
    from megaopus.config.validation import validate
    from megaopus.data.run_data import RunData
    from megaopus.planning import estimate, scorer_cost
    from megaopus.planning.memory import precisions

    console = console or Console()
    world_size = world_size if world_size is not None else config.parallel.model_ranks
    if problems := validate(config, world_size):
        raise ConfigError(problems)
    data = RunData.describe(config.data, config.data_needs())
    vocab_size = config.model.derived_vocab_size(data.vocab_size)
    console.print(two_columns("Derived", estimate.derived(config, world_size, data)))
    if data.kept is not None:
        console.print(two_columns("Documents of the pool that the filter keeps", data.kept))
    changed = {key: f"{value!r}  (default {default!r})" for key, (value, default) in differences(config).items()}
    console.print(two_columns("Settings that differ from the default", changed or {"none": ""}))
    console.print(_mesh_table(config, world_size))
    console.print(two_columns("Parameters", estimate.parameter_rows(config, vocab_size)))
    console.print(two_columns("Cost", estimate.cost(config, vocab_size)))
    when = "When scoring pays (an estimate)"
    console.print(two_columns(when, scorer_cost.pays(config, data, scorer_parameters)))
    for precision in precisions(config):
        console.print(_memory_table(config, vocab_size, world_size, precision, memory_size))
    refused = missing(config)
    for why in refused:
        console.print(f"The run would be refused here: {why}", soft_wrap=True, markup=False, highlight=False)
    on_cpu = config.engine.device == "cpu"
    where, command = estimate.launch_command(world_size, overrides, config_dir, per_node=per_node, on_cpu=on_cpu)
    console.print(where, soft_wrap=True)
    console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)
    return refused


def missing(config: RunConfig) -> list[str]:
    """Say what the run would be refused for on this machine though its settings are right: what is not installed."""
    found = []
    for check in (config.engine.spec().check_installed, config.optim.spec().check_installed):
        try:
            if check is not None:
                check()
        except MegaopusError as error:
            found.append(str(error))
    return found


def memory_size(text: str) -> int:
    """Read the memory of a device."""
    from megaopus.planning.machine import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_LETTERS = {"K": 1e3, "M": 1e6, "B": 1e9}


def _parameters(text: str) -> float:
    """Read how many: 125M, 1.5B, 1e8."""
    try:
        found = float(text[:-1]) * _LETTERS[text[-1]] if text[-1:] in _LETTERS else float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: not a number of parameters, as 125M or 1.5B")
    return found


def _mesh_table(config: RunConfig, world_size: int) -> Table:
    from megaopus.planning.estimate import groups

    parallel = config.parallel
    table = Table(title=f"Mesh of {world_size} ranks", title_justify="left")
    for heading in ("axis", "degree", "groups of ranks"):
        table.add_column(heading, overflow="fold")
    degrees = {"tp": parallel.tp, "cp": parallel.cp, "pp": parallel.pp, "dp": world_size // parallel.model_ranks}
    if parallel.ep > 1:
        of_experts = parallel.ep * parallel.derived_expert_tp() * parallel.pp
        degrees |= {"ep": parallel.ep, "expert_dp": world_size // of_experts}
    listed = groups(parallel, world_size) if world_size <= LARGEST_TABLE else None
    for axis, degree in degrees.items():
        text = " ".join(str(group) for group in listed[axis]) if listed else f"{world_size // degree} of {degree}"
        table.add_row(axis, str(degree), text, end_section=axis == "dp")
    return table


def two_columns(title: str, rows: Mapping[str, str]) -> Table:
    """Lay out what has a name in two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory_table(
    config: RunConfig, vocab_size: int, world_size: int, precision: str, memory_size: int | None
) -> Table:
    """Lay out the memory of the stage that needs most, and whether that goes into a device's."""
    from megaopus.planning.estimate import format_bytes
    from megaopus.planning.machine import TIGHT, verdict
    from megaopus.planning.memory import PHASES, memory, peak

    stages = [memory(config, vocab_size, world_size, precision, stage) for stage in range(config.parallel.pp)]
    peaks = [peak(rows) for rows in stages]
    phase, total = max(peaks, key=lambda each: each[1])
    stage = peaks.index((phase, total))
    where = f", stage {stage} (the largest)" if config.parallel.pp > 1 else ""
    table = Table(title=f"Memory per rank in {precision}{where}", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("assumption", overflow="fold")
    for name, row in stages[stage].items():
        times = "" if row.phases == PHASES else f"{', '.join(row.phases)}: "
        same = "" if not row.whole else "; " + ("" if row.whole == row.size else f"{format_bytes(row.whole)} of it ")
        told = f"{times}{row.how}{same}{'the same on every rank' if same else ''}"
        table.add_row(name, format_bytes(row.size), told)
    table.add_section()
    what = f"in {phase}, of tensors and process; the allocator's fragments come on top"
    table.add_row("peak", format_bytes(total), what)
    if memory_size is not None:
        of = f"{total / memory_size:.0%} of {format_bytes(memory_size)} (--memory); tight above {TIGHT:.0%}"
        table.add_row("verdict", verdict(total, memory_size), of)
    return table
