"""Write a checkpoint as a Hugging Face model folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = (
    "Write a run's newest checkpoint, or one that is named, as a folder that transformers'\n"
    "AutoModelForCausalLM.from_pretrained reads: safetensors, config.json, tokenizer. From any layout and engine,\n"
    "on one process, without a GPU; one tensor at a time is in memory."
)
EXAMPLES = (
    "  python -m megaopus export runs/first --out exported\n"
    "  python -m megaopus export runs/first/checkpoints/step_00001000 --out exported --dtype bf16"
)
_UNITS = {"MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is exported, where to, and how."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a folder that is not there yet")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the numbers written (default: what the run computed in)"
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of one file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    from megaopus.export import export
    from megaopus.record.console import progress

    with progress("numbers written", stream=sys.stderr) as advance:
        done = export(args.run, args.out, dtype=args.dtype, most_bytes=args.max_shard_size, advance=advance)
    print(f"{done.checkpoint}: {done.parameters:,} parameters, {done.dtype}, as {done.architecture}")
    return 0


def closing(args: argparse.Namespace) -> str:
    """Say where the model lies."""
    return f"model in {args.out} | next: AutoModelForCausalLM.from_pretrained('{args.out}')"


def _size(text: str) -> int:
    """Bytes of 500MB or 5GB."""
    for unit, factor in _UNITS.items():
        if text.upper().endswith(unit):
            try:
                value = float(text[: -len(unit)])
            except ValueError:
                break
            if value > 0:
                return int(value * factor)
    raise argparse.ArgumentTypeError(f"{text!r}: write it as 500MB or 5GB")
