"""Judges the engine by a CUDA device in at most eight minutes; or, with --fake, estimates for an H100 without one.

On one GPU it runs phases, each in a process of its own that ends by a deadline, and writes a line of JSON for each row
as it comes: what is there; whether losses, utilities and picks are the CPU's, by precision and kernels; training and
scoring of real models (time, MFU, kernels, host reads, memory beside what ``check`` says) beside a plain GPT with
compiled blocks; what each estimator costs over its FLOPs; the command itself, stopped by SIGTERM and gone on; whether
the same gives the same bits again, with and without engine.deterministic, and what that costs. Under
torchrun the models of as many ranks as the job has are trained and score. With --fake the real engine runs on fake CUDA
tensors (benchmarks/fake_cuda), which needs g++ and no GPU: every operation that it asks for is counted, and times are
the least that an H100's data sheet allows for them. Every number of it is an estimate.

    python benchmarks/gpu.py --json gpu.jsonl               # on a GPU; --only PHASE ... for some of it
    python benchmarks/gpu.py --wheels wheels --json gpu.jsonl    # without megatron-core, hydra, omegaconf installed:
    #   pip download --no-deps --python-version 3.12 --only-binary :all: -d wheels megatron-core==0.16.1 hydra-core
    #   omegaconf; pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3
    python benchmarks/gpu.py --device cpu --quick           # a rehearsal of every phase, which says nothing of a GPU
    python benchmarks/gpu.py --fake --json fake.json        # anywhere
    python benchmarks/gpu.py --fake --only gpt2_small --json fake.json
    python benchmarks/gpu.py --fake --only gpt2_xl --micro 1 --proxy-micro 8    # other sizes of passes
    python benchmarks/gpu.py --fake --eager                 # torch's own kernels, messages after the work
    python benchmarks/gpu.py --fake --deterministic         # kernels that repeat themselves
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from rich.console import Console
from rich.table import Table

import benchmarks.carried  # noqa: F401 - before what the wheels of --wheels hold
from benchmarks.fake_cuda.device import missing
from benchmarks.gpu_measure import measured_rows, no_device
from benchmarks.gpu_phases import MINUTES, PHASES, Setup, run_phase, run_phases
from benchmarks.gpu_shapes import CASES, PRESET, Case

COLUMNS: Mapping[str, str] = {
    "shape": "shape",
    "layout": "layout",
    "train_peak_gib": "train GiB",
    "score_peak_gib": "score GiB",
    "train_launches": "train kernels",
    "score_launches": "score kernels",
    "score_pass_launches": "of passes",
    "train_host_reads": "train reads",
    "score_host_reads": "score reads",
    "train_sent_gib": "train sent GiB",
    "score_sent_gib": "score sent GiB",
    "mfu_ceiling": "MFU at most",
}
"""Field of a row -> what the table calls it."""


def fake_stage(case: Case, stage: int) -> dict[str, Any]:
    """Estimate what one rank of a pipeline stage of a case takes and asks of its device."""
    from benchmarks.fake_cuda.estimate import estimate

    warnings.simplefilter("ignore")
    return estimate(case, stage)


def fake_rows(cases: Mapping[str, Case]) -> list[dict[str, Any]]:
    """Estimate a row for each case, of the fuller of its first and last stage; two processes at a time."""
    from benchmarks.fake_cuda.device import install
    from benchmarks.fake_cuda.estimate import row

    if not missing():
        install()  # compiled once, before two processes do
    stages = {name: sorted({0, case.config().parallel.pp - 1}) for name, case in cases.items()}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=spawn) as pool:
        largest_first = sorted(cases, key=lambda name: -cases[name].model["num_layers"])
        found = {
            name: [pool.submit(fake_stage, cases[name], stage) for stage in stages[name]] for name in largest_first
        }
        return [row(name, case, [each.result() for each in found[name]]) for name, case in cases.items()]


def table(rows: Sequence[Mapping[str, Any]], fake: bool) -> Table:
    """Lay out rows for a person."""
    how = "ESTIMATES for an H100 80GB SXM by fake tensors and data sheet; nothing was run on a GPU"
    made = Table(title=how if fake else "measured", title_justify="left")
    columns = {key: name for key, name in COLUMNS.items() if any(key in row for row in rows)}
    if not fake:
        columns |= {"train_tokens_per_s": "tokens/s", "train_s": "train s", "score_s": "score s", "mfu": "MFU"}
    for name in columns.values():
        made.add_column(name, justify="left" if name in ("shape", "layout") else "right")
    for row in rows:
        made.add_row(*(_readable(row.get(key)) for key in columns))
    return made


def parts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out what a training step consists of, in ms, the largest part first."""
    made = Table(title="ms of a training step by part, a pipeline's bubble aside", title_justify="left")
    made.add_column("part")
    for row in rows:
        made.add_column(row["shape"], justify="right")
    most = {part: max(row["train_parts"].get(part, 0.0) for row in rows) for row in rows for part in row["train_parts"]}
    for part in sorted(most, key=lambda part: -most[part]):
        made.add_row(part, *(f"{1e3 * row['train_parts'].get(part, 0.0):.2f}" for row in rows))
    made.add_row("all", *(f"{1e3 * sum(row['train_parts'].values()):.2f}" for row in rows))
    return made


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "-")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PHASES, *(name for name in CASES if name not in PHASES)]
    parser.add_argument("--fake", action="store_true", help="estimate without a GPU")
    parser.add_argument(
        "--only", nargs="*", choices=names, metavar="NAME", help=f"phases or shapes: {', '.join(names)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows here: a line each; --fake: one array")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all phases together (%(default)s)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="what phases share (a temporary folder)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages that this Python lacks, as wheels")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, with --quick")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--phase", choices=PHASES, help="one, in this process; rows to the standard output")
    parser.add_argument("--eager", action="store_true", help="with --fake: engine.kernels=eager, and nothing overlaps")
    parser.add_argument("--deterministic", action="store_true", help="with --fake: engine.deterministic=true")
    parser.add_argument("--micro", type=int, help="with --fake: sequences of a training pass, of as many batches")
    parser.add_argument("--proxy-micro", type=int, help="with --fake: of a pass of the proxy; else as in training")
    args = parser.parse_args(arguments)
    alone = not args.fake and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if wrong := [name for name in args.only or () if name not in (PHASES if alone else CASES)]:
        parser.error(f"--only {' '.join(wrong)}: {'no phase on one device' if alone else 'no shape'}")
    if args.phase and args.work is None:
        parser.error("--phase needs --work FOLDER, which phases share")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or estimate, print and write; returns the exit status."""
    args = _arguments(arguments)
    console = Console(width=200)
    if args.phase:
        run_phase(args.phase, Setup(args.device, args.quick, args.work), sys.stdout)
        return 0
    if args.fake:
        return _estimate(args, console)
    if args.device == "cuda" and (why := no_device()):
        console.print(f"{why}: use --fake for estimates", style="red", highlight=False)
        return 2
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rows = measured_rows(args.only or list(CASES), console)
        if int(os.environ.get("RANK", "0")) == 0:
            console.print(table(rows, fake=False))
            _write(args.json, json.dumps(rows, indent=1) + "\n", console)
        return 0
    return _measure(args, console)


def _estimate(args: argparse.Namespace, console: Console) -> int:
    if why := missing():
        console.print(f"--fake cannot run here: {why}", style="red", highlight=False)
        return 2
    sizes = {"micro": args.micro, "proxy_micro": args.proxy_micro}
    given = {key: size for key, size in sizes.items() if size is not None}
    cases = {name: CASES[name] for name in args.only or CASES}
    given |= {"eager": args.eager, "deterministic": args.deterministic}
    rows = fake_rows({name: replace(case, **given) for name, case in cases.items()})
    console.print(table(rows, fake=True))
    console.print(parts_table(rows))
    console.print(f"estimator and batches are those of selection={PRESET}; times and MFU: the data sheet's peaks")
    _write(args.json, json.dumps(rows, indent=1) + "\n", console)
    return 0


def _measure(args: argparse.Namespace, console: Console) -> int:
    """Run the phases; 1 where one of them ended by an error."""
    rows: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        told = {key: _readable(value) for key, value in row.items() if key not in ("phase", "commit", "device_kind")}
        console.print(f"{row['phase']}: " + ", ".join(f"{key} {value}" for key, value in told.items()), highlight=False)
        if args.json:
            with args.json.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        names = [name for name in PHASES if name in (args.only or PHASES)]
        run_phases(names, Setup(args.device, args.quick, work), write, minutes=args.minutes)
    console.print(table([row for row in rows if "shape" in row], fake=False))
    if args.json:
        console.print(f"rows: {args.json}", highlight=False, soft_wrap=True)
    return int(any("error" in row for row in rows))


def _write(path: Path | None, text: str, console: Console) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
    console.print(f"rows: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
