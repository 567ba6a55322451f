"""Makes the documents nearest to benchmark items a corpus's proxy; they leave its pool.

As arXiv 2602.05400 builds its Bench-Proxy: embed items and documents with a frozen encoder, take the documents of the
largest cosine similarity with any item up to a budget of tokens. Tokens stay where they are: the new corpus differs
from the old one in which split each document belongs to. A share of the items and of the nearest documents is held out
as a target to measure by (``held_out``): no document is looked for by the ones, and the others are in no other split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megaopus.corpus_tools.held_out import USUAL_SHARE, divide, is_held_out, share_file, write_target
from megaopus.corpus_tools.manifest import split_counts, write_manifest
from megaopus.corpus_tools.near_duplicates import NearDuplicates
from megaopus.corpus_tools.nearest_documents import CHUNK, HASHED, OVERLAP_WORDS, Found, Item, search
from megaopus.corpus_tools.progress import stages
from megaopus.corpus_tools.signatures import sign_pool
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.corpus_tools.tasks.hands import Hands
from megaopus.corpus_tools.workers import cores
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    HELD_OUT,
    LEFT_OUT,
    MANIFEST,
    ROWS,
    SPLIT_NAMES,
    SPLITS,
    TARGET,
    Corpus,
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
    """Documents that share most of their words (``near_duplicates``); the others leave the pool too, as copies do.
    With any limit the proxy has none of a document that is held out, and the other way round."""


USUAL = Limits(min_tokens=256, per_item=10, per_near_duplicate=1)
"""Limits that the verb takes where nothing else is said."""


@dataclass(slots=True)
class Chosen:
    """Says which documents become the proxy, and which of the nearer ones do not."""

    places: np.ndarray
    """(P,) in ``Found`` of the proxy's documents, nearest first."""
    held_out: np.ndarray
    """(H,) in ``Found`` of those of the held-out target, nearest first."""
    splits: np.ndarray
    """(D,) uint8 split of every document of the corpus."""
    passed_over: dict[str, int]
    """Limit -> documents nearer than the last one chosen that it kept out."""


@dataclass(frozen=True, slots=True)
class ProxyCorpus:
    """Says what a new proxy is made of."""

    path: Path
    """The new corpus."""
    items: list[Item]
    """Those that documents were looked for by."""
    found: Found
    """Every candidate document with the item of ``items`` it is nearest to."""
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
    held_out: float = USUAL_SHARE,
    overwrite: bool = False,
    workers: int | None = None,
    console: Console | None = None,
    hands: Hands | None = None,
) -> ProxyCorpus:
    """Write the corpus with its new proxy to ``out``; a killed run goes on where it was.

    Documents of the old proxy are candidates like those of the pool; validation stays. Copies of a chosen document
    leave the pool too. ``drop_overlap``: so do documents that share OVERLAP_WORDS words in a row with an item.
    ``held_out``: share of the items, and of the documents that would be the proxy, that become ``Corpus.target``
    instead, by a hash of their texts; what shares such words with a held-out item leaves the pool in any case.
    ``workers``: processes that search; None: one for each core with the hashed encoder, else this one. ``hands``: who
    searches in their place.

    Raises:
        DataError: a budget that no document fits, or that leaves no pool; a share that leaves no item; anything wrong
            with ``out``.
    """
    console = console or Console(quiet=True)
    workers = workers or (cores() if encoder == HASHED else 1)
    refuse_existing(out, overwrite, MANIFEST)
    searched, kept = divide(items, held_out)
    told = [[hashlib.sha256(item.text.encode()).hexdigest() for item in part] for part in (searched, kept)]
    plan = json.dumps([corpus.fingerprint, encoder, OVERLAP_WORDS, CHUNK, *told])
    with work_folder(out, plan, console) as work:
        found = search(corpus, searched, kept, encoder, work, workers, CHUNK, console, hands)
        chosen = assign(corpus, found, tokens, limits, drop_overlap, held_out)
        asked = {"encoder": encoder, "tokens": tokens, "limits": asdict(limits), "drop_overlap": drop_overlap}
        summary = asked | {"held_out": held_out} | _summary(corpus, searched, kept, found, chosen)
        with new_folder(out, console) as folder:
            target = None
            if kept or len(chosen.held_out):
                target = write_target(corpus, found.documents[chosen.held_out], kept, folder / TARGET)
            _write(corpus, chosen.splits, summary, target, folder)
            if seq_len := corpus.manifest.get("split_rule", {}).get("seq_len"):
                with stages(console) as stage:
                    line = partial(stage, "signatures", unit="sequences/s", scale=1)
                    sign_pool(folder, seq_len, cores(), line)
    return ProxyCorpus(out, searched, found, chosen.places, summary)


def assign(
    corpus: Corpus, found: Found, tokens: int, limits: Limits, drop_overlap: bool, held_out: float = 0.0
) -> Chosen:
    """Choose the proxy, nearest first. Raises DataError if no document fits, or no pool is left.

    A share ``held_out`` of what would be chosen is held out instead; its tokens do not count among ``tokens``.
    """
    usable = ~found.overlaps if drop_overlap else ~found.overlaps_held_out
    order = np.lexsort((found.documents, -found.similarity))
    order = order[usable[order]]
    first = np.sort(np.unique(found.digest[order], return_index=True)[1])  # one of each, nearest first
    order = order[first]
    chosen, held, alike, passed_over = _within(limits, corpus, found, order, tokens, held_out)
    if not len(chosen):
        long, shorter = "", ""
        if limits.min_tokens:
            long, shorter = f" of documents of at least {limits.min_tokens}", ", or fewer --min-tokens"
        if len(held):
            long += f" beside the {len(held):,} documents held out"
            shorter += ", or a smaller --held-out"
        raise DataError(f"no document fits a proxy of {tokens:,} tokens{long}; use more --tokens{shorter}")
    splits = corpus.split_codes.copy()
    splits[found.documents] = POOL
    splits[found.documents[~usable]] = LEFT_OUT
    copies = np.isin(found.digest, found.digest[np.concatenate([chosen, held, alike])])
    splits[found.documents[copies]] = LEFT_OUT
    splits[found.documents[chosen]] = PROXY
    splits[found.documents[held]] = HELD_OUT
    proxy, pool = (int(corpus.lengths[splits == code].sum()) for code in (PROXY, POOL))
    if proxy > pool:
        raise DataError(f"a proxy of {proxy:,} tokens is larger than the pool it leaves, {pool:,}; use fewer --tokens")
    return Chosen(chosen, held, splits, passed_over)


def _within(
    limits: Limits, corpus: Corpus, found: Found, order: np.ndarray, tokens: int, held_out: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """(places of the proxy, places held out, places of near-duplicates of them, ``Chosen.passed_over``), in order."""
    chosen: list[int] = []
    held: list[int] = []
    alike: list[int] = []
    passed_over = dict.fromkeys(asdict(limits), 0)
    of_item = np.zeros(len(found.items_met), dtype=np.int64)
    known, known_held, total = NearDuplicates(), NearDuplicates(), 0
    for place in order.tolist():
        document, item = found.documents[place], found.item[place]
        length = int(corpus.lengths[document])
        if length < limits.min_tokens:
            passed_over["min_tokens"] += 1
            continue
        if limits.per_item and of_item[item] >= limits.per_item:
            passed_over["per_item"] += 1
            continue
        text = corpus.texts([document])[0] if limits.per_near_duplicate or held_out else ""
        holds = is_held_out(text, held_out)
        own, other = (known_held, known) if holds else (known, known_held)
        most = limits.per_near_duplicate
        if most and (other.count(text) or own.count(text) >= most):
            passed_over["per_near_duplicate"] += 1
            alike.append(place)
            continue
        if not holds:
            total += length
            if total > tokens:
                break
        (held if holds else chosen).append(place)
        of_item[item] += 1
        own.add(text)
    first, second, third = (np.array(places, dtype=np.int64) for places in (chosen, held, alike))
    return first, second, third, passed_over


def _summary(
    corpus: Corpus, searched: Sequence[Item], kept: Sequence[Item], found: Found, chosen: Chosen
) -> dict[str, Any]:
    """Sum up for the manifest: what was taken, passed over and held out, shares of the domains, overlaps."""
    splits, items = chosen.splits, [*searched, *kept]
    here = splits[found.documents]
    of_item = np.bincount(found.item[chosen.places], minlength=len(searched))
    overlapping = {
        SPLIT_NAMES[code]: int((found.overlaps & (here == code)).sum())
        for code in (POOL, PROXY, LEFT_OUT, *([HELD_OUT] if len(chosen.held_out) else []))
    }
    return {
        "from": corpus.fingerprint,
        "items": len(items),
        "items_sha256": hashlib.sha256("\0".join(item.text for item in items).encode()).hexdigest(),
        "items_held_out": len(kept),
        "documents": len(chosen.places),
        "documents_held_out": len(chosen.held_out),
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


def _write(corpus: Corpus, splits: np.ndarray, summary: dict[str, Any], target: str | None, folder: Path) -> None:
    """Write the files of the new corpus into ``folder``; ``target``: the fingerprint of what lies in it held out."""
    files = corpus.manifest["files"]
    for name in sorted(set(files) - {ROWS, CODES}):
        if not Path(name).is_absolute():  # else it is somebody else's, and stays where it is
            share_file(corpus.path / name, folder / name)
    if ROWS in files:
        with corpus.table().open(encoding="utf-8") as old, (folder / ROWS).open("w", encoding="utf-8") as new:
            for line, split in zip(old, splits.tolist(), strict=True):
                new.write(json.dumps({**json.loads(line), "split": SPLIT_NAMES[split]}, ensure_ascii=False) + "\n")
    codes = np.empty(len(splits), dtype=CODE_DTYPE)
    codes["domain"], codes["split"] = corpus.domain_codes, splits
    np.save(folder / CODES, codes)
    counted = corpus.loss_tokens() if corpus.masked else None
    facts = {name: value for name, value in corpus.manifest.items() if name != TARGET}
    facts["counts"] = split_counts(corpus.domains, codes, corpus.lengths, counted, SPLIT_NAMES)
    facts["provenance"] = {**corpus.manifest.get("provenance", {}), "proxy": summary}
    if target is not None:
        facts[TARGET] = {"fingerprint": target}
    write_manifest(folder, facts)
