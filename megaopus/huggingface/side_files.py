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


def copy_side_files(source: Path, target: Path) -> None:
    """Copy those of ``source`` into ``target``, which is made; what is there already stays."""
    target.mkdir(parents=True, exist_ok=True)
    for path in side_files(source):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
