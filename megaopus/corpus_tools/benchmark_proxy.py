"""Makes the documents nearest to benchmark items a corpus's proxy; they leave its pool.

As arXiv 2602.05400 builds its Bench-Proxy: embed items and documents with a frozen encoder, take the documents of the
largest cosine similarity with any item up to a budget of tokens. Tokens stay where they are: the new corpus differs
from the old one in which split each document belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megaopus.corpus_tools.nearest_documents import CHUNK, HASHED, OVERLAP_WORDS, Found, Item, search
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.corpus_tools.workers import cores
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    INDEX,
    LEFT_OUT,
    MANIFEST,
    ROWS,
    SPLIT_NAMES,
    SPLITS,
    TOKENIZER,
    TOKENS,
    Corpus,
    fingerprint_of,
    sha256_file,
)
from megaopus.data.folder import new_folder, refuse_existing, work_folder
from megaopus.errors import DataError

POOL, PROXY, VALIDATION = range(len(SPLITS))


@dataclass(frozen=True, slots=True)
class ProxyCorpus:
    """Says what a new proxy is made of."""

    path: Path
    """The new corpus."""
    found: Found
    """Every candidate document with the item it is nearest to."""
    chosen: np.ndarray
    """(P,) places in ``found`` of the documents of the proxy, nearest first."""
    summary: dict[str, Any]
    """What the manifest keeps: settings, shares of the domains, overlaps."""


def read_items(sources: Sequence[Source], fields: Sequence[str]) -> list[Item]:
    """Read the texts under ``fields`` of every row, joined; values may be texts, lists or mappings of them.

    Raises:
        DataError: no items, or a row without any of the fields.
    """
    items = []
    for source in sources:
        for place, row in SourceReader(source).table():
            texts = [text for name in fields for text in _texts(row.get(name))]
            if not texts:
                has = ", ".join(sorted(map(str, row)))
                raise DataError(f"{place}: no text under {', '.join(fields)} (fields: {has}); name them: --item-fields")
            items.append(Item(place, " ".join(texts)))
    if not items:
        raise DataError("no benchmark items: name a file with rows with --items")
    return items


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            if name not in ("label", "labels"):
                yield from _texts(each)


def build(
    corpus: Corpus,
    items: Sequence[Item],
    out: Path,
    *,
    tokens: int,
    encoder: str = HASHED,
    drop_overlap: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> ProxyCorpus:
    """Write the corpus with its new proxy to ``out``; a killed run goes on where it was.

    Documents of the old proxy are candidates like those of the pool; validation stays. Copies of a chosen document
    leave the pool too. ``drop_overlap``: so do documents that share OVERLAP_WORDS words in a row with an item.
    ``workers``: processes that search; None: one for each core with the hashed encoder, else this one.

    Raises:
        DataError: a budget that no document fits, or that leaves no pool; anything wrong with ``out``.
    """
    console = console or Console(quiet=True)
    workers = workers or (cores() if encoder == HASHED else 1)
    refuse_existing(out, overwrite, MANIFEST)
    plan = json.dumps(
        [
            corpus.fingerprint,
            encoder,
            OVERLAP_WORDS,
            CHUNK,
            [hashlib.sha256(i.text.encode()).hexdigest() for i in items],
        ]
    )
    with work_folder(out, plan, console) as work:
        found = search(corpus, items, encoder, work, workers, CHUNK, console)
        splits, chosen = assign(corpus, found, tokens, drop_overlap)
        summary = _summary(corpus, items, found, splits, encoder, tokens, drop_overlap)
        with new_folder(out, console) as folder:
            _write(corpus, splits, summary, folder)
    return ProxyCorpus(out, found, chosen, summary)


def assign(corpus: Corpus, found: Found, tokens: int, drop_overlap: bool) -> tuple[np.ndarray, np.ndarray]:
    """Choose the proxy: (split of every document (D,) uint8, chosen places in ``found``, nearest first)."""
    usable = ~found.overlaps if drop_overlap else np.ones(len(found.documents), dtype=bool)
    order = np.lexsort((found.documents, -found.similarity))
    order = order[usable[order]]
    first = np.sort(np.unique(found.digest[order], return_index=True)[1])  # one of each, nearest first
    order = order[first]
    fits = np.cumsum(corpus.lengths[found.documents[order]]) <= tokens
    chosen = order[fits]
    if not len(chosen):
        raise DataError(f"no document fits a proxy of {tokens:,} tokens; use more --tokens")
    splits = corpus.split_codes.copy()
    splits[found.documents] = POOL
    splits[found.documents[~usable]] = LEFT_OUT
    copies = np.isin(found.digest, found.digest[chosen])
    splits[found.documents[copies]] = LEFT_OUT
    splits[found.documents[chosen]] = PROXY
    proxy, pool = (int(corpus.lengths[splits == code].sum()) for code in (PROXY, POOL))
    if proxy > pool:
        raise DataError(f"a proxy of {proxy:,} tokens is larger than the pool it leaves, {pool:,}; use fewer --tokens")
    return splits, chosen


def _summary(
    corpus: Corpus,
    items: Sequence[Item],
    found: Found,
    splits: np.ndarray,
    encoder: str,
    tokens: int,
    drop_overlap: bool,
) -> dict[str, Any]:
    """Sum up for the manifest: settings, shares of the domains, overlaps."""
    here = splits[found.documents]
    overlapping = {SPLIT_NAMES[code]: int((found.overlaps & (here == code)).sum()) for code in (POOL, PROXY, LEFT_OUT)}
    return {
        "from": corpus.fingerprint,
        "encoder": encoder,
        "items": len(items),
        "items_sha256": hashlib.sha256("\0".join(item.text for item in items).encode()).hexdigest(),
        "tokens": tokens,
        "drop_overlap": drop_overlap,
        "proxy_share": _shares(corpus, splits == PROXY),
        "pool_share": _shares(corpus, splits == POOL),
        "overlap_words": OVERLAP_WORDS,
        "overlapping_documents": overlapping,
        "overlapping_items": int(found.items_met.sum()),
    }


def _shares(corpus: Corpus, members: np.ndarray) -> dict[str, float]:
    counts = np.bincount(corpus.domain_codes[members], corpus.lengths[members], minlength=len(corpus.domains))
    return dict(zip(corpus.domains, (counts / max(1, counts.sum())).round(4).tolist(), strict=True))


def _write(corpus: Corpus, splits: np.ndarray, summary: dict[str, Any], folder: Path) -> None:
    for name in (TOKENS, INDEX, TOKENIZER):
        try:
            os.link(corpus.path / name, folder / name)
        except OSError:  # another file system
            shutil.copyfile(corpus.path / name, folder / name)
    with (corpus.path / ROWS).open(encoding="utf-8") as old, (folder / ROWS).open("w", encoding="utf-8") as new:
        for line, split in zip(old, splits.tolist(), strict=True):
            new.write(json.dumps({**json.loads(line), "split": SPLIT_NAMES[split]}, ensure_ascii=False) + "\n")
    codes = np.empty(len(splits), dtype=CODE_DTYPE)
    codes["domain"], codes["split"] = corpus.domain_codes, splits
    np.save(folder / CODES, codes)
    counts: dict[str, Any] = {}
    for code, domain in enumerate(corpus.domains):
        counts[domain] = {}
        for split, name in enumerate(SPLIT_NAMES):
            here = (corpus.domain_codes == code) & (splits == split)
            counts[domain][name] = {"documents": int(here.sum()), "tokens": int(corpus.lengths[here].sum())}
    provenance = {**corpus.manifest.get("provenance", {}), "proxy": summary}
    manifest = {**corpus.manifest, "counts": counts, "provenance": provenance}
    manifest["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in corpus.manifest["files"]
    }
    manifest["fingerprint"] = fingerprint_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
