"""Finds and shows the layouts of a plan, and how to start the first of them."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from megaopus.cli._plan_settings import Planned, planned, wide
from megaopus.cli.check import two_columns
from megaopus.errors import EngineError
from megaopus.planning import calibration, machine
from megaopus.planning.calibration import Measured
from megaopus.planning.estimate import format_bytes, launch_command
from megaopus.planning.layouts import Candidate, Choice, Job, Layout, Miss, allowed, closest, ranks_that_fit
from megaopus.planning.machine import Machine, verdict
from megaopus.planning.search import Search
from megaopus.planning.step_time import tokens_per_step
from megaopus.planning.whole_run import WholeRun
from megaopus.record.formatting import format_bytes as short_bytes
from megaopus.record.formatting import format_count, format_duration

_OF_SELECTION = ("scor", "prox", "candidates")
"""Words in the rows of memory that selection takes."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Is the first choice of a plan."""

    job: Job
    candidate: Candidate
    step_s: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, without validation and checkpoints."""
        return self.step_s * self.job.config.train.steps


def show(args: argparse.Namespace) -> Chosen | None:
    """Plan and print; None: nothing fits. Raises ConfigError, DataError or EngineError for what cannot be planned."""
    console = wide()
    plan = planned(args)
    job = plan.job
    refused: Counter[str] = Counter()
    candidates = allowed(job, refused)
    if not candidates:
        console.print(_nothing_allowed(job, refused), soft_wrap=True, markup=False)
        return None
    if job.memory is not None and (miss := closest(job, candidates)) is not None:
        console.print(_nothing_fits(job, miss), soft_wrap=True, markup=False)
        return None
    search = Search(job, candidates, _machine(args, job, console))
    if args.measure:
        _measure(args, plan, search, console)
    choices, without = search.best(args.top)
    if not choices:
        raise EngineError("every layout that was timed failed, as is said above: none is left to choose")
    whole = WholeRun.of(job.config, job.vocab_size, plan.pool)
    console.print(two_columns("The run", whole.rows(job.config)))
    for warning in whole.warnings(job.config):
        console.print(f"WARNING {warning}", soft_wrap=True, markup=False, style="yellow")
    console.print(_layouts(search, choices))
    console.print(_left_out(job, refused, without, len(candidates)), soft_wrap=True, markup=False)
    for line in _assumed(search.machine, job):
        console.print(line, soft_wrap=True, markup=False)
    return _closing(args, plan, search, choices[0], console)


def _machine(args: argparse.Namespace, job: Job, console: Console) -> Machine:
    """Describe the machine: by a calibration where there is one of it, else by what is told and assumed."""
    assumed = _assumed_machine(args, job)
    found = calibration.load(args.calibration)
    if found is None or args.measure:
        return assumed
    if found.device != device_name(job.device) or found.precision != job.precision:
        where = f"{args.calibration} is of {found.device} in {found.precision}: not used"
        console.print(f"note: {where}", soft_wrap=True, markup=False)
        return assumed
    if args.tflops is not None or args.mfu is not None:
        console.print(f"note: {args.calibration} is not used, as --tflops or --mfu is given", markup=False)
        return assumed
    told = f"{found.machine.told}, model of {format_count(found.parameters)} parameters ({args.calibration})"
    return replace(found.machine, told=told)


def _assumed_machine(args: argparse.Namespace, job: Job) -> Machine:
    if job.device == "cpu":
        return machine.cpu(len(os.sched_getaffinity(0)), args.tflops, args.mfu or 1.0)
    inside, between = args.inside_gbs, args.between_gbs
    return machine.gpu(
        args.tflops or machine.TFLOPS,
        args.mfu or machine.MFU,
        inside * 1e9 if inside else machine.NVLINK_BYTES,
        between * 1e9 if between else machine.NETWORK_BYTES,
    )


def device_name(device: str) -> str:
    """Name the device that a calibration is of: what this machine has, else what was planned for."""
    if device == "cpu":
        return f"{len(os.sched_getaffinity(0))} CPU core(s)"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a GPU that is not here"


def _measure(args: argparse.Namespace, plan: Planned, search: Search, console: Console) -> None:
    """Time the best few layouts here, and keep what that says."""
    from megaopus.record.console import progress
    from megaopus.timed_layouts import time_layouts

    job = plan.job
    _refuse_absent_devices(job)

    def timed(candidates: Sequence[Candidate]) -> Mapping[Layout, Measured]:
        runs = [[*args.overrides, *plan.stands, *plan.overrides(each.layout)] for each in candidates]
        with progress("timing layouts", len(runs)) as advance:
            timings = time_layouts(runs, args.config_dir, job.world_size, advance)
        found = {}
        for candidate, timing in zip(candidates, timings, strict=True):
            told = candidate.layout.told(job.world_size)
            if timing.failed:
                console.print(f"WARNING {told} failed and is left out: {timing.failed}", soft_wrap=True, markup=False)
                continue
            rest = timing.step_s - timing.selection_s
            found[candidate.layout] = Measured(layout=told, training_s=rest, selection_s=timing.selection_s)
        return found

    assumed = search.machine
    search.measure(timed)
    if not search.measured:
        return
    rows = [(candidate.work, measured) for candidate, measured in search.rows()]
    found = calibration.calibrate(
        assumed,
        rows,
        device=device_name(job.device),
        ranks=job.world_size,
        parameters=WholeRun.of(job.config, job.vocab_size, None).parameters,
        precision=job.precision,
    )
    search.machine = found.machine
    calibration.save(found, args.calibration)
    console.print(
        f"calibration: {args.calibration}, of {len(rows)} layouts; their seconds are predicted within"
        f" {found.error:.0%} after it",
        soft_wrap=True,
        markup=False,
    )


def _refuse_absent_devices(job: Job) -> None:
    """Raise EngineError where the ranks of the plan are not on this machine."""
    if job.device == "cpu":
        return
    import torch

    if (here := torch.cuda.device_count()) < job.world_size:
        raise EngineError(
            f"--measure needs the {job.world_size} GPUs of the plan on this machine, which has {here}: leave it out,"
            " plan for one node, or time CPU ranks with engine=cpu"
        )


def _layouts(search: Search, choices: Sequence[Choice]) -> Table:
    """Lay out the choices; what was measured is marked."""
    job, config = search.job, search.job.config
    table = Table(title=f"Layouts on {job.world_size} ranks, the fastest first", title_justify="left", padding=(0, 1))
    table.add_column("", justify="right")
    table.add_column("layout", max_width=36)
    of_ranks = "GPU-hours" if job.device == "cuda" else "rank-hours"
    for name in ("tok/s", "step", "idle", "memory", "", "hours", of_ranks):
        table.add_column(name, justify="right", no_wrap=True)
    for number, choice in enumerate(choices, start=1):
        candidate = choice.candidate
        step_s = search.seconds(candidate)
        hours = step_s * config.train.steps / 3600
        measured = candidate.layout in search.measured
        table.add_row(
            str(number),
            candidate.layout.told(job.world_size),
            format_count(tokens_per_step(config) / step_s),
            f"{step_s:.3g} s" + "*" * measured,
            f"{candidate.work.idle(search.machine):.0%}",
            short_bytes(choice.peak),
            "" if job.memory is None else verdict(choice.peak, job.memory),
            f"{hours:.3g}",
            f"{hours * job.world_size:,.4g}",
        )
    if search.measured:
        table.caption, table.caption_justify = "* measured here", "left"
    return table


def _left_out(job: Job, refused: Counter[str], without: int, allowed_count: int) -> str:
    """Say how many layouts there are, and what was left out for what."""
    parts = [f"{allowed_count:,} layouts are allowed"]
    if refused:
        often = ", ".join(f"{key} ({count:,})" for key, count in refused.most_common(3))
        parts.append(f"{refused.total():,} are refused, most for {often}")
    if job.memory is None:
        parts.append("none is left out for its memory, which --memory would tell")
    elif without:
        parts.append(f"{without:,} faster ones need more than {format_bytes(job.memory)} of memory")
    return "; ".join(parts)


def _assumed(found: Machine, job: Job) -> list[str]:
    """Say what the seconds rest on."""
    if found.told != "assumed":
        return [f"seconds: {found.told}"]
    if job.device == "cpu":
        return [
            f"ASSUMED, not measured: {1 / found.flop_s / 1e9:,.0f} GFLOP/s of a core, {found.cores} core(s), memory and"
            " messages of a common server. --measure times layouts here"
        ]
    return [
        f"ASSUMED, not measured: {1 / found.flop_s / 1e12:,.0f} TFLOP/s of a GPU's products (--tflops x --mfu),"
        f" {1e-9 / found.inside_s:,.0f} GB/s inside a node, {1e-9 / found.between_s:,.0f} GB/s of each GPU between"
        f" nodes, {1e6 * found.pass_s:,.0f} us of launches a layer and pass. Validation and saving are not counted"
    ]


def _closing(args: argparse.Namespace, plan: Planned, search: Search, choice: Choice, console: Console) -> Chosen:
    """Say what was chosen, and how to start it."""
    job, layout = plan.job, choice.candidate.layout
    step_s = search.seconds(choice.candidate)
    chosen = Chosen(job, choice.candidate, step_s)
    how = "measured" if layout in search.measured else "predicted"
    seconds = format_duration(chosen.seconds)
    where = "" if job.memory is None else f" of {format_bytes(job.memory)}"
    console.print(
        f"chosen: {layout.told(job.world_size)} | {how} {step_s:.3g} s a step, {seconds} in all |"
        f" {format_bytes(choice.peak)}{where} a rank",
        soft_wrap=True,
        markup=False,
        style="bold",
    )
    overrides = [*args.overrides, *plan.stands, *plan.overrides(layout)]
    on_cpu = job.device == "cpu"
    told, command = launch_command(
        job.world_size, overrides, args.config_dir, per_node=args.gpus_per_node, on_cpu=on_cpu
    )
    console.print(told, soft_wrap=True, markup=False)
    console.print(f"  {command}", soft_wrap=True, markup=False)
    return chosen


def _nothing_allowed(job: Job, refused: Counter[str]) -> str:
    often = ", ".join(f"{key} ({count:,} times)" for key, count in refused.most_common(4))
    batch = job.config.train.global_batch_size
    why = f"none divides both the ranks and train.global_batch_size = {batch}"
    if refused:
        why = f"the settings refuse every layout that divides the ranks: {often}"
    remedy = "-> another --gpus (or batch size) with common divisors, or fewer settings of the layout that are fixed"
    return f"no layout on {job.world_size} ranks is allowed: {why}\n  {remedy}"


def _nothing_fits(job: Job, miss: Miss) -> str:
    """Say by how much the best misses, and what would help."""
    assert job.memory is not None
    largest = ", ".join(f"{what} {format_bytes(size)}" for what, size in miss.largest)
    lines = [
        f"nothing fits: the smallest, {miss.candidate.layout.told(job.world_size)}, needs {format_bytes(miss.peak)} of"
        f" {format_bytes(job.memory)} a rank, {format_bytes(miss.peak - job.memory)} too much",
        f"  most of it: {largest}",
    ]
    more = ranks_that_fit(job)
    helps = [f"--gpus {more}, the fewest of twice, four times, ... as many on which a layout fits"] if more else []
    helps += [f"GPUs of more than {format_bytes(miss.peak)}"]
    if job.kept:
        helps += ["leaving open what is fixed: " + ", ".join(sorted(job.kept))]
    if any(word in what for what, _ in miss.largest for word in _OF_SELECTION):
        helps += ["a smaller selection.proxy_batch_size, rho nearer to 1, or selection=uniform"]
    helps += ["a shorter data.seq_len, or a smaller model"]
    return "\n".join([*lines, "  what would help: " + "; ".join(helps)])
