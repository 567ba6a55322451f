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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megaopus.corpus_tools.near_duplicates import NearDuplicates
from megaopus.corpus_tools.nearest_documents import CHUNK, HASHED, OVERLAP_WORDS, Found, Item, search
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.corpus_tools.workers import cores
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    LEFT_OUT,
    MANIFEST,
    ROWS,
    SPLIT_NAMES,
    SPLITS,
    Corpus,
    fingerprint_of,
    sha256_file,
)
from megaopus.data.folder import new_folder, refuse_existing, work_folder
from megaopus.errors import DataError

POOL, PROXY, VALIDATION = range(len(SPLITS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Says which of the nearest documents are passed over; 0: no limit."""

    min_tokens: int = 0
    """Documents with fewer: words count for more in short ones, and a page of a line teaches little."""
    per_item: int = 0
    """Documents whose nearest item is the same."""
    per_near_duplicate: int = 0
    """Documents that share most of their words (``near_duplicates``); the others leave the pool too, as copies do."""


USUAL = Limits(min_tokens=256, per_item=10, per_near_duplicate=1)
"""Limits that the verb takes where nothing else is said."""


@dataclass(slots=True)
class Chosen:
    """Says which documents become the proxy, and which of the nearer ones do not."""

    places: np.ndarray
    """(P,) in ``Found`` of the proxy's documents, nearest first."""
    splits: np.ndarray
    """(D,) uint8 split of every document of the corpus."""
    passed_over: dict[str, int]
    """Limit -> documents nearer than the last one chosen that it kept out."""


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
    limits: Limits = USUAL,
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
        chosen = assign(corpus, found, tokens, limits, drop_overlap)
        asked = {"encoder": encoder, "tokens": tokens, "limits": asdict(limits), "drop_overlap": drop_overlap}
        summary = asked | _summary(corpus, items, found, chosen)
        with new_folder(out, console) as folder:
            _write(corpus, chosen.splits, summary, folder)
    return ProxyCorpus(out, found, chosen.places, summary)


def assign(corpus: Corpus, found: Found, tokens: int, limits: Limits, drop_overlap: bool) -> Chosen:
    """Choose the proxy, nearest first. Raises DataError if no document fits, or no pool is left."""
    usable = ~found.overlaps if drop_overlap else np.ones(len(found.documents), dtype=bool)
    order = np.lexsort((found.documents, -found.similarity))
    order = order[usable[order]]
    first = np.sort(np.unique(found.digest[order], return_index=True)[1])  # one of each, nearest first
    order = order[first]
    chosen, alike, passed_over = _within(limits, corpus, found, order, tokens)
    if not len(chosen):
        long, shorter = "", ""
        if limits.min_tokens:
            long, shorter = f" of documents of at least {limits.min_tokens}", ", or fewer --min-tokens"
        raise DataError(f"no document fits a proxy of {tokens:,} tokens{long}; use more --tokens{shorter}")
    splits = corpus.split_codes.copy()
    splits[found.documents] = POOL
    splits[found.documents[~usable]] = LEFT_OUT
    copies = np.isin(found.digest, found.digest[np.concatenate([chosen, alike])])
    splits[found.documents[copies]] = LEFT_OUT
    splits[found.documents[chosen]] = PROXY
    proxy, pool = (int(corpus.lengths[splits == code].sum()) for code in (PROXY, POOL))
    if proxy > pool:
        raise DataError(f"a proxy of {proxy:,} tokens is larger than the pool it leaves, {pool:,}; use fewer --tokens")
    return Chosen(chosen, splits, passed_over)


def _within(
    limits: Limits, corpus: Corpus, found: Found, order: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(places of the proxy's documents, places of near-duplicates of them, ``Chosen.passed_over``), in ``order``."""
    chosen: list[int] = []
    alike: list[int] = []
    passed_over = dict.fromkeys(asdict(limits), 0)
    of_item = np.zeros(len(found.items_met), dtype=np.int64)
    known, total = NearDuplicates(), 0
    for place in order.tolist():
        document, item = found.documents[place], found.item[place]
        length = int(corpus.lengths[document])
        if length < limits.min_tokens:
            passed_over["min_tokens"] += 1
            continue
        if limits.per_item and of_item[item] >= limits.per_item:
            passed_over["per_item"] += 1
            continue
        text = corpus.texts([document])[0] if limits.per_near_duplicate else ""
        if limits.per_near_duplicate and known.count(text) >= limits.per_near_duplicate:
            passed_over["per_near_duplicate"] += 1
            alike.append(place)
            continue
        total += length
        if total > tokens:
            break
        chosen.append(place)
        of_item[item] += 1
        known.add(text)
    return np.array(chosen, dtype=np.int64), np.array(alike, dtype=np.int64), passed_over


def _summary(corpus: Corpus, items: Sequence[Item], found: Found, chosen: Chosen) -> dict[str, Any]:
    """Sum up for the manifest: what was taken and passed over, shares of the domains, overlaps."""
    splits = chosen.splits
    here = splits[found.documents]
    of_item = np.bincount(found.item[chosen.places], minlength=len(items))
    overlapping = {SPLIT_NAMES[code]: int((found.overlaps & (here == code)).sum()) for code in (POOL, PROXY, LEFT_OUT)}
    return {
        "from": corpus.fingerprint,
        "items": len(items),
        "items_sha256": hashlib.sha256("\0".join(item.text for item in items).encode()).hexdigest(),
        "documents": len(chosen.places),
        "passed_over": chosen.passed_over,
        "items_with_documents": int((of_item > 0).sum()),
        "most_documents_of_an_item": int(of_item.max()),
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
    for name in sorted(set(corpus.manifest["files"]) - {ROWS, CODES}):
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
    counted = corpus.loss_tokens() if corpus.masked else None
    for code, domain in enumerate(corpus.domains):
        counts[domain] = {}
        for split, name in enumerate(SPLIT_NAMES):
            here = (corpus.domain_codes == code) & (splits == split)
            counts[domain][name] = {"documents": int(here.sum()), "tokens": int(corpus.lengths[here].sum())}
            if counted is not None:
                counts[domain][name]["loss_tokens"] = int(counted[here].sum())
    provenance = {**corpus.manifest.get("provenance", {}), "proxy": summary}
    manifest = {**corpus.manifest, "counts": counts, "provenance": provenance}
    manifest["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in corpus.manifest["files"]
    }
    manifest["fingerprint"] = fingerprint_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
