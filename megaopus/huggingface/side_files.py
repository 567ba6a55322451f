"""Keeps what lies beside the weights of a model (settings, tokenizer, chat template) with a run that begins at it."""

from __future__ import annotations

import shutil
from pathlib import Path

PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
FOLDER = "hugging_face"
"""In the run folder."""


def side_files(folder: Path) -> list[Path]:
    """List them, sorted by name."""
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def side_folder(start: Path) -> Path:
    """Say where they lie for a start: in the folder itself, or kept with the run that it is, or is a checkpoint of."""
    for run in (start, start.parent.parent):
        if (run / FOLDER).is_dir():
            return run / FOLDER
    return start


def copy_side_files(source: Path, target: Path) -> None:
    """Copy those of ``source`` into ``target``, made if there are any; what is there already stays."""
    for path in side_files(source):
        target.mkdir(parents=True, exist_ok=True)
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
