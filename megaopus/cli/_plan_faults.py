"""Shows what failures leave of a long run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from megaopus.cli._plan_settings import wide
from megaopus.planning.goodput import Faults, best_interval, best_simulated, expected_goodput, of_job, simulate
from megaopus.record.formatting import format_duration

if TYPE_CHECKING:
    from megaopus.cli._plan_layouts import Chosen

NODE_BYTES, HOST_BYTES = 2e9, 25e9
"""Bytes a second that a node writes, and that a GPU copies to its host's memory: assumed."""


def show(args: argparse.Namespace, chosen: Chosen | None) -> None:
    """Print goodput at several intervals, and the best of them; ``chosen``: of which layout, None: of any job."""
    console = wide()
    work = args.days * 86400 if chosen is None or args.days is not None else chosen.seconds
    one = Faults(
        mtbf=3600 * args.mtbf,
        restart=args.restart_seconds,
        straggler_mtbf=float("inf") if args.straggler_mtbf is None else 3600 * args.straggler_mtbf,
        slowdown=args.slowdown,
        spell=60 * args.spell_minutes,
        **_saving(args, chosen),
    )
    faults = of_job(one, args.gpus)
    young, daly = best_interval(faults.save, faults.mtbf)
    best, outcome = best_simulated(work, faults, args.seed)
    rows = {"best simulated": best, "Daly": daly, "Young": young}
    if chosen is not None and (set_ := _as_set(chosen)):
        rows["as set"] = set_
    console.print(_about(args, faults, work, chosen), soft_wrap=True, markup=False)
    table = Table(title="Goodput: work over time", title_justify="left")
    for name in ("interval", "work", "simulated", "formula", "lost", "saves", "starts", "failures"):
        table.add_column(name, justify="left" if name == "interval" else "right", no_wrap=True)
    for name, interval in rows.items():
        found = outcome if interval == best else simulate(work, interval, faults, args.seed)
        closed = expected_goodput(interval, faults) * (1 - faults.straggling)
        cells = [f"{found.goodput:.1%} ± {found.spread:.1%}", f"{closed:.1%}"]
        shares = [f"{share:.1%}" for share in (found.lost, found.saving, found.restarting)]
        table.add_row(name, format_duration(interval), *cells, *shares, f"{found.failures:,.0f}")
    console.print(table)
    every = max(1, round(best / chosen.step_s)) if chosen is not None else None
    setting = f"checkpoint.every={every}" if every else f"checkpoint.every={max(1, round(best))}s"
    wall = format_duration(work / max(outcome.goodput, 1e-9))
    console.print(
        f"best: a checkpoint every {format_duration(best)} of work, goodput {outcome.goodput:.1%}:"
        f" {format_duration(work)} of work take {wall}. Set {setting}",
        soft_wrap=True,
        markup=False,
        style="bold",
    )


def _saving(args: argparse.Namespace, chosen: Chosen | None) -> dict[str, float]:
    """Tell how long training waits for a checkpoint, and until one counts after that."""
    if args.checkpoint_seconds is not None:
        return {"save": args.checkpoint_seconds}
    if chosen is None:
        raise argparse.ArgumentError(None, "without the settings of a run --mtbf needs --checkpoint-seconds")
    from megaopus.planning.disk import checkpoint_bytes

    job = chosen.job
    size = checkpoint_bytes(job.config, job.vocab_size, job.precision)
    written = size / (NODE_BYTES * -(-job.world_size // job.per_node))
    if job.config.checkpoint.background:
        return {"save": size / job.world_size / HOST_BYTES, "lag": written}
    return {"save": written}


def _as_set(chosen: Chosen) -> float:
    """Seconds of work between checkpoints, as the settings have it; 0: none but at the end."""
    rule = chosen.job.config.checkpoint
    return rule.every_seconds or rule.every_steps * chosen.step_s


def _about(args: argparse.Namespace, faults: Faults, work: float, chosen: Chosen | None) -> str:
    """Say what the simulation is given."""
    guessed = " (assumed: its bytes at 2 GB/s of each node)" if args.checkpoint_seconds is None else ""
    lag = f", whole {format_duration(faults.lag)} later" if faults.lag else ""
    slow = ""
    if args.straggler_mtbf is not None:
        often = format_duration(faults.straggler_mtbf)
        slow = f"; every {often} one is slow: {faults.slowdown:.0%} for {format_duration(faults.spell)}"
    return (
        f"{format_duration(work)} of work on {args.gpus:,} GPUs, of which each fails every {args.mtbf:,.0f} h: one does"
        f" every {format_duration(faults.mtbf)}. A checkpoint takes {faults.save:.3g} s{guessed}{lag}, a restart"
        f" {format_duration(faults.restart)}{slow}. Seed {args.seed}"
    )
