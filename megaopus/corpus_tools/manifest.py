"""Writes what a corpus folder holds: counts of its splits, digests of its files, its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.data.corpus import MANIFEST, files_of, fingerprint_of, sampled_sha256, sha256_file

Counts = dict[str, dict[str, dict[str, int]]]
"""Domain -> split -> documents, tokens, and with a loss mask those that count in it."""


def split_counts(
    domains: Sequence[str], codes: np.ndarray, lengths: np.ndarray, counted: np.ndarray | None, splits: Sequence[str]
) -> Counts:
    """Count documents and tokens of each domain and split.

    Args:
        domains: their names.
        codes: (D,) of ``CODE_DTYPE``, domain and split of each document.
        lengths: (D,) tokens of each.
        counted: (D,) tokens of each that count in the loss; None: all.
        splits: names of the splits to count, in the order of their codes.
    """
    counts: Counts = {}
    for code, domain in enumerate(domains):
        counts[domain] = {}
        for split, name in enumerate(splits):
            here = (codes["domain"] == code) & (codes["split"] == split)
            counts[domain][name] = {"documents": int(here.sum()), "tokens": int(lengths[here].sum())}
            if counted is not None:
                counts[domain][name]["loss_tokens"] = int(counted[here].sum())
    return counts


def _entry(folder: Path, name: str) -> dict[str, Any]:
    """Describe a file; one that lies elsewhere, and may be of any size, by blocks of it."""
    path, elsewhere = folder / name, Path(name).is_absolute()
    digest = sampled_sha256(path) if elsewhere else sha256_file(path)
    return {"bytes": path.stat().st_size, "sha256": digest} | ({"sampled": True} if elsewhere else {})


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder whose other files are there: ``facts``, with its files and fingerprint.

    Returns the manifest.
    """
    files = {name: _entry(folder, name) for name in files_of(facts)}
    manifest = {**facts, "fingerprint": "", "files": files}
    manifest["fingerprint"] = fingerprint_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest
