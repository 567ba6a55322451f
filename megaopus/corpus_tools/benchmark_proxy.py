"""The verb ``proxy``: the documents nearest to benchmark items become a corpus's proxy, and leave its pool.

As arXiv 2602.05400 builds its Bench-Proxy: embed items and documents with a frozen encoder, take the documents of the
largest cosine similarity with any item up to a budget of tokens. Tokens stay where they are: the new corpus differs
from the old one in which split each document belongs to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
_SHOWN = 10


def read_items(sources: Sequence[Source], fields: Sequence[str]) -> list[Item]:
    """The texts under ``fields`` of every row, joined; values may be texts, lists or mappings of them.

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
) -> Path:
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
    show(corpus, items, found, chosen, summary, console)
    return out


def assign(corpus: Corpus, found: Found, tokens: int, drop_overlap: bool) -> tuple[np.ndarray, np.ndarray]:
    """(split of every document of the corpus (D,) uint8, chosen places in ``found``, nearest first)."""
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
    """What is kept in the manifest: settings, shares of the domains, overlaps."""
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


def show(
    corpus: Corpus, items: Sequence[Item], found: Found, chosen: np.ndarray, summary: dict[str, Any], console: Console
) -> None:
    """Shares of the domains, the nearest documents with their items, overlaps."""
    table = Table(title="shares of tokens")
    for name in ("domain", "proxy", "pool left"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain in corpus.domains:
        shares = (summary["proxy_share"][domain], summary["pool_share"][domain])
        table.add_row(escape(domain), *(f"{share:.1%}" for share in shares))
    console.print(table)
    nearest = Table(title=f"the {min(_SHOWN, len(chosen))} nearest documents", show_lines=True)
    for name in ("similarity", "domain", "document", "item"):
        nearest.add_column(name)
    for place in chosen[:_SHOWN]:
        document = found.documents[place]
        text = corpus.texts([document], 80)[0]
        cells = (corpus.domains[corpus.domain_codes[document]], _short(text), _short(items[found.item[place]].text))
        nearest.add_row(f"{found.similarity[place]:.3f}", *map(escape, cells))
    console.print(nearest)
    overlaps = ", ".join(f"{name} {count:,}" for name, count in summary["overlapping_documents"].items())
    console.print(
        f"documents that share {OVERLAP_WORDS} words in a row with an item: {overlaps};"
        f" items met: {summary['overlapping_items']:,} of {len(items):,}",
        highlight=False,
    )


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m megaopus proxy``."""
    add = parser.add_argument
    add("--corpus", required=True, metavar="FOLDER", help="prepared corpus to take documents from")
    add(
        "--items",
        required=True,
        action="append",
        metavar="PATH",
        help="benchmark items, as --source of prepare; repeatable",
    )
    add(
        "--item-fields", default="query,choices", metavar="NAMES", help="fields of an item's text (default %(default)s)"
    )
    add("--tokens", required=True, type=int, metavar="N", help="tokens of the proxy, at most")
    add(
        "--encoder",
        default=HASHED,
        metavar="NAME",
        help="hashed, or a sentence-transformers model (default %(default)s)",
    )
    add(
        "--drop-overlap",
        action="store_true",
        help=f"leave out documents sharing {OVERLAP_WORDS} words in a row with an item",
    )
    add("--workers", type=int, metavar="N", help="processes that search (default: one a core; with a model, this one)")
    add("--out", required=True, metavar="FOLDER", help="corpus folder to make; it shares the token file where it can")
    add("--overwrite", action="store_true", help="replace a corpus that is already in FOLDER")


def run(args: argparse.Namespace) -> Path:
    """Do what the command line asks for; returns the corpus folder."""
    fields = [name.strip() for name in args.item_fields.split(",") if name.strip()]
    items = read_items([Source.parse(argument) for argument in args.items], fields)
    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers {args.workers}: must be at least 1; leave it out for one a core")
    if args.tokens < 1:
        raise DataError(f"--tokens {args.tokens}: must be at least 1")
    return build(
        Corpus.open(args.corpus),
        items,
        Path(args.out),
        tokens=args.tokens,
        encoder=args.encoder,
        drop_overlap=args.drop_overlap,
        overwrite=args.overwrite,
        workers=args.workers,
        console=Console(),
    )
