"""Look at a Hugging Face model folder: what it is, and whether it can be trained here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = (
    "Look at a model folder without reading its weights: family, shape, how its tensors match ours, what is not\n"
    "supported, its tokenizer, and the model settings as YAML. Nothing is written; training reads the folder itself."
)
EXAMPLES = "  python -m megaopus import Qwen3-0.6B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with config.json and safetensors")


def run(args: argparse.Namespace) -> int:
    """Print what the folder holds. Raises ModelError, by name, for what cannot be used."""
    from rich.console import Console
    from rich.table import Table

    from megaopus.config.model_shape import shape_yaml
    from megaopus.data.tokenizer import load_tokenizer, vocabulary_size
    from megaopus.errors import DataError
    from megaopus.huggingface.families import family_of, model_config
    from megaopus.huggingface.folder import ModelFolder
    from megaopus.huggingface.start import checked

    folder = ModelFolder.open(args.folder)
    model = model_config(folder.config)
    used = {piece.name for recipe in checked(folder, model).values() for piece in recipe.pieces}
    files = len({each.file for each in folder.tensors.values()})
    numbers = sum(_count(each.shape) for name, each in folder.tensors.items() if name in used)
    try:
        tokenizer = f"{vocabulary_size(load_tokenizer(args.folder)):,} tokens"
    except DataError as error:
        tokenizer = f"none that can be read ({error})"
    table = Table(title=str(args.folder), title_justify="left", show_header=False)
    rows = {
        "family": family_of(folder.config).architecture,
        "weights": f"{numbers:,} numbers, {_kinds(folder)}, in {files} file(s)",
        "tensors": f"{len(used)} of {len(folder.tensors)} used, none missing",
        "vocabulary": f"{model.vocab_size:,} rows",
        "tokenizer": tokenizer,
    }
    for row in rows.items():
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print("model settings that differ from the defaults:")
    for line in shape_yaml(model).splitlines():
        console.print(f"  {line}", highlight=False, markup=False)
    return 0


def closing(args: argparse.Namespace) -> str:
    """Say how it is trained."""
    return f"it can be trained | next: train model=hf model.hf={args.folder} init.path={args.folder} data.path=CORPUS"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _kinds(folder: Any) -> str:
    return " and ".join(sorted({each.dtype for each in folder.tensors.values()}))
