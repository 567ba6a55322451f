"""Choose the layout of a run by predicted speed, and say how long it takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaopus.cli._paths import local_path
from megaopus.cli._settings import add_settings
from megaopus.cli.check import GPUS_PER_NODE, memory_size

DESCRIPTION = (
    "Lay a run out on so many GPUs in every way that its settings and engine allow, leave out what does not fit their\n"
    "memory, and sort the rest by predicted tokens per second; then how long the run takes and how to start it. What\n"
    "OVERRIDES say of parallel.*, train.micro_batch_size and engine.recompute stays. Needs no GPU and no corpus; with\n"
    "--measure the best few are timed here, for three steps each. With --mtbf: what failures leave of a long run."
)
EXAMPLES = (
    "  python -m megaopus plan model=gpt2_xl data.path=corpus train.global_batch_size=512 --gpus 64 --memory 80GB\n"
    "  python -m megaopus plan model=tiny data.path=corpus engine=cpu --gpus 2 --measure\n"
    "  python -m megaopus plan --gpus 16384 --mtbf 50000 --days 54 --checkpoint-seconds 30"
)
CALIBRATION = Path("runs/plan_calibration.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the run, the GPUs, and what is known of them."""
    add_settings(parser)
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="ranks of the run")
    parser.add_argument("--gpus-per-node", type=_count, default=GPUS_PER_NODE, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--memory", type=memory_size, metavar="SIZE", help="of a GPU, as 80GB (10^9 bytes each) or 80GiB"
    )
    parser.add_argument("--top", type=_count, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    parser.add_argument("--no-corpora", action="store_true", help="do not look at the corpora, which lie elsewhere")
    parser.add_argument("--pool-tokens", type=_quantity, metavar="N", help="of the pool, without a corpus: 300B")
    _add_machine(parser.add_argument_group("what the GPUs do: assumed where it is not told"))
    _add_measuring(parser.add_argument_group("timing layouts on this machine"))
    _add_faults(parser.add_argument_group("failures of a long run"))


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tflops", type=_positive, metavar="X", help="peak of a GPU in bf16 (default: 989, an H100's)")
    mfu = "share of the peak that its products reach, messages and idle time apart (default: 0.4)"
    group.add_argument("--mfu", type=_share, metavar="X", help=mfu)
    group.add_argument("--inside-gbs", type=_positive, metavar="X", help="GB/s each way inside a node (default: 450)")
    group.add_argument("--between-gbs", type=_positive, metavar="X", help="GB/s of a GPU between nodes (default: 50)")


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    measure = "time three steps of the best few here, and keep what that says of the machine"
    group.add_argument("--measure", action="store_true", help=measure)
    kept = "where that is kept, and read by later plans (default: %(default)s)"
    group.add_argument("--calibration", type=local_path, default=CALIBRATION, metavar="FILE", help=kept)


def _add_faults(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mtbf", type=_positive, metavar="HOURS", help="between failures of one GPU, all about it")
    group.add_argument("--days", type=_positive, metavar="X", help="of work (default: those of the first choice)")
    save = "that training waits for a checkpoint (default: its bytes at an assumed 2 GB/s of each node)"
    group.add_argument("--checkpoint-seconds", type=_positive, metavar="X", help=save)
    restart = "from a failure to the next update (default: %(default)s, assumed)"
    group.add_argument("--restart-seconds", type=_positive, default=600.0, metavar="X", help=restart)
    slow = "between spells in which one GPU is slow, of one GPU (default: none)"
    group.add_argument("--straggler-mtbf", type=_positive, metavar="HOURS", help=slow)
    group.add_argument("--slowdown", type=_share, default=0.2, metavar="X", help="lost in a spell (%(default)s)")
    group.add_argument("--spell-minutes", type=_positive, default=60.0, metavar="X", help="of one (%(default)s)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the simulation (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 2 where nothing fits."""
    from megaopus.cli import _plan_faults, _plan_layouts

    _refuse_mixtures(args)
    if args.mtbf is not None and args.days is not None and not args.overrides:
        _plan_faults.show(args, None)
        return 0
    chosen = _plan_layouts.show(args)
    if chosen is None:
        return 2
    if args.mtbf is not None:
        _plan_faults.show(args, chosen)
    return 0


def _refuse_mixtures(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.mtbf is None:
        for name in ("days", "checkpoint_seconds", "straggler_mtbf"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise argparse.ArgumentError(None, f"{option} is about failures: give --mtbf HOURS too")
    if args.measure and (args.no_corpora or args.pool_tokens is not None):
        option = "--no-corpora" if args.no_corpora else "--pool-tokens"
        raise argparse.ArgumentError(None, f"--measure trains, on a corpus that is here: leave {option} out")


_LETTERS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _quantity(text: str) -> int:
    """Read how many tokens: 300B, 1e12."""
    number, factor = (text[:-1], _LETTERS[text[-1]]) if text[-1:] in _LETTERS else (text, 1)
    return max(1, int(factor * _positive(number)))


def _positive(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: not a number above 0")
    return found


def _share(text: str) -> float:
    found = _positive(text)
    if found > 1:
        raise argparse.ArgumentTypeError(f"{text}: not a share, above 0 and at most 1")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: not a whole number above 0")
    return int(text)
