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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

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
from megaopus.data.permutation import permute
from megaopus.data.sources import Source, SourceReader
from megaopus.errors import DataError

POOL, PROXY, VALIDATION = range(len(SPLITS))
HASHED = "hashed"
"""The encoder that needs no download; another name is a sentence-transformers model's."""
OVERLAP_WORDS = 13
"""Words in a row that an item and a document must share to overlap (as GPT-3's, arXiv 2005.14165, appendix C)."""
_CHUNK = 1024
"""Documents between two files of a run that may be killed."""
_SAMPLE = 20_000
"""Documents that inverse document frequencies are taken from."""
_SHOWN = 10


class Item(NamedTuple):
    """A benchmark item: what it is called and all its text."""

    name: str
    text: str


@dataclass
class Found:
    """What was found of each candidate document, (n,) each, in the order of ``documents``."""

    documents: np.ndarray
    """Numbers in the corpus: all of the pool and the old proxy."""
    similarity: np.ndarray
    item: np.ndarray
    overlaps: np.ndarray
    """Whether a run of words is shared with any item."""
    digest: np.ndarray
    """Of the tokens, equal for equal documents."""
    items_met: np.ndarray
    """(items,) whether the item shares a run of words with any candidate."""


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
    console: Console | None = None,
) -> Path:
    """Write the corpus with its new proxy to ``out``; a killed run goes on where it was.

    Documents of the old proxy are candidates like those of the pool; validation stays. Copies of a chosen document
    leave the pool too. ``drop_overlap``: so do documents that share OVERLAP_WORDS words in a row with an item.

    Raises:
        DataError: a budget that no document fits, or that leaves no pool; anything wrong with ``out``.
    """
    console = console or Console(quiet=True)
    refuse_existing(out, overwrite, MANIFEST)
    plan = json.dumps(
        [
            corpus.fingerprint,
            encoder,
            OVERLAP_WORDS,
            _CHUNK,
            [hashlib.sha256(i.text.encode()).hexdigest() for i in items],
        ]
    )
    with work_folder(out, plan, console) as work:
        found = _search(corpus, items, encoder, work, console)
        splits, chosen = assign(corpus, found, tokens, drop_overlap)
        summary = _summary(corpus, items, found, splits, encoder, tokens, drop_overlap)
        with new_folder(out, console) as folder:
            _write(corpus, splits, summary, folder)
    show(corpus, items, found, chosen, summary, console)
    return out


def _search(corpus: Corpus, items: Sequence[Item], encoder: str, work: Path, console: Console) -> Found:
    """Chunk by chunk, each kept in ``work`` when it is done."""
    from megaopus.data.nearness import HashedTfidf, SentenceEncoder, shared_runs

    documents = np.flatnonzero(corpus.split_codes != VALIDATION)
    runs = [shared_runs(item.text, OVERLAP_WORDS) for item in items]
    known = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64)
    encoding: HashedTfidf | SentenceEncoder | None = None
    files = [work / f"near-{number:06d}.npz" for number in range(-(-len(documents) // _CHUNK))]
    for number, file in enumerate(track(files, "finding the nearest", console=console, disable=console.quiet)):
        if file.is_file():
            continue
        if encoding is None:
            count = min(_SAMPLE, len(documents))
            sampled = np.sort(permute(np.arange(count), len(documents), "bench proxy"))
            parts = np.array_split(documents[sampled], -(-count // _CHUNK))
            sample = (text for part in parts for text in corpus.texts(part))
            asked = [item.text for item in items]
            encoding = HashedTfidf(asked, sample) if encoder == HASHED else SentenceEncoder(encoder, asked)
        here = documents[number * _CHUNK : (number + 1) * _CHUNK]
        content = corpus.texts(here)
        similarity, item = encoding.nearest(content)
        met = [_among(shared_runs(text, OVERLAP_WORDS), known) for text in content]
        partial = file.with_name(f"{file.name}.partial")
        with partial.open("wb") as stream:
            np.savez(
                stream,
                similarity=similarity,
                item=item,
                overlaps=np.array([len(each) > 0 for each in met]),
                digest=np.array([_digest(corpus, n) for n in here], dtype=np.uint64),
                met=np.unique(np.concatenate(met)),
            )
        os.replace(partial, file)
    kept = [dict(np.load(file, allow_pickle=False)) for file in files]
    joined = {
        name: np.concatenate([part[name] for part in kept]) for name in ("similarity", "item", "overlaps", "digest")
    }
    met_anywhere = np.unique(np.concatenate([part["met"] for part in kept]))
    items_met = np.array([bool(np.isin(run, met_anywhere).any()) for run in runs])
    return Found(documents, items_met=items_met, **joined)


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Those of ``values`` that are in ``known``, which is sorted."""
    if not len(known):
        return values[:0]
    return values[known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values]


def _digest(corpus: Corpus, document: int) -> int:
    start = corpus.offsets[document]
    content = np.ascontiguousarray(corpus.tokens[start : start + corpus.lengths[document]]).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


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
    if not (splits == POOL).any():
        raise DataError(f"a proxy of {tokens:,} tokens leaves no pool; use fewer --tokens")
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
    add("--out", required=True, metavar="FOLDER", help="corpus folder to make; it shares the token file where it can")
    add("--overwrite", action="store_true", help="replace a corpus that is already in FOLDER")


def run(args: argparse.Namespace) -> Path:
    """Do what the command line asks for; returns the corpus folder."""
    fields = [name.strip() for name in args.item_fields.split(",") if name.strip()]
    items = read_items([Source.parse(argument) for argument in args.items], fields)
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
        console=Console(),
    )
