"""The verb ``prepare``: documents in, a corpus folder out, whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer

from megaopus.corpus_tools.encode import CHUNK_CHARACTERS, Chunk, Entry, encode
from megaopus.corpus_tools.progress import Advance, stages
from megaopus.corpus_tools.sources import Fields, Source, SourceReader
from megaopus.corpus_tools.split import POOL, Scan, SplitRule, scan
from megaopus.corpus_tools.workers import cores
from megaopus.data.config import PrepareConfig
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    FILES,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    ROWS,
    SPLITS,
    TOKENIZER,
    TOKENS,
    fingerprint_of,
    sha256_file,
    write_index,
)
from megaopus.data.folder import new_folder, refuse_existing, work_folder
from megaopus.data.tokenizer import EOD, SMALLEST_VOCABULARY, eod_id, load_tokenizer, train_tokenizer, vocabulary_size
from megaopus.errors import DataError

_LITTLE = 1 << 24
"""Bytes of sources below which starting workers takes longer than they save."""
_TOOLS = ("numpy", "tokenizers", "megatron-core")


def prepare(
    sources: Sequence[Source],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 16384,
    eod_token: str = EOD,
    rule: SplitRule | None = None,
    overwrite: bool = False,
    provenance: dict | None = None,
    console: Console | None = None,
    workers: int | None = None,
) -> Path:
    """Write a corpus folder; the same sources and settings give the same fingerprint, wherever and whenever.

    Args:
        sources: read in this order.
        out: folder to make; it appears when it is whole.
        tokenizer: what ``load_tokenizer`` takes; None trains byte-level BPE on the pool split.
        vocab_size: tokens of a trained tokenizer, at most.
        eod_token: the token that ends each document.
        rule: how documents are split; None: ``SplitRule()``.
        overwrite: replace a corpus that is already there.
        provenance: kept in the manifest under ``provenance``.
        console: where progress and the table go; None: nowhere.
        workers: processes that tokenise; None: one for each core, and for little text none but this one.

    Returns:
        ``out`` as a path.

    Raises:
        DataError: any fault of a source, tokenizer, setting or target, before anything is written.
    """
    out, rule = Path(out), rule or SplitRule()
    console = console or Console(quiet=True)
    if not sources:
        raise DataError("no source given; name at least one with --source, or --data NAME, or --demo")
    if workers is not None and workers < 1:
        raise DataError(f"workers = {workers}: must be at least 1; leave it out for one a core")
    refuse_existing(out, overwrite, MANIFEST)
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given:
        eod_id(given, eod_token, str(tokenizer))
    elif vocab_size < SMALLEST_VOCABULARY or eod_token != EOD:
        raise DataError(
            f"vocab_size = {vocab_size}, eod token {eod_token!r}: a trained tokenizer needs at least "
            f"{SMALLEST_VOCABULARY} tokens and ends documents with {EOD!r}"
        )
    sizes = [source.size() for source in sources]
    total = sum(sizes) if all(sizes) else None  # the hub's are not known beforehand
    if workers is None:
        workers = 1 if total is not None and total < _LITTLE else cores()
    plan = _plan(sources, given, vocab_size, eod_token, rule)
    with stages(console) as stage, work_folder(out, plan, console) as work:
        scanned = _scanned(work, sources, rule, lambda: stage("reading", total))
        made = given or _trained(work, sources, scanned, vocab_size, lambda: stage("training the tokenizer", total))
        made.save(str(work / TOKENIZER))
        advance = stage("encoding", scanned.characters, "M characters/s")
        entries = _entries(sources, scanned)
        dtype, eod = _token_dtype(made), eod_id(made, eod_token, "tokenizer")
        parts = encode(entries, work, work / TOKENIZER, eod, dtype.str, workers, scanned.characters, advance)
        with new_folder(out, console) as folder:
            shutil.copyfile(work / TOKENIZER, folder / TOKENIZER)
            lengths = _join(folder, parts, scanned, dtype)
            manifest = _manifest(folder, scanned, lengths, made, eod_token, rule, provenance)
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    console.print(_table(manifest))
    line = f"{out}: {manifest['tokens']:,} tokens, fingerprint {manifest['fingerprint'][:16]}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return out


def _plan(sources: Sequence[Source], given: Tokenizer | None, vocab_size: int, eod_token: str, rule: SplitRule) -> str:
    """What a run that goes on from another's chunks must have in common with it. Files are known by size and age."""
    files = [
        [str(path), path.stat().st_size, path.stat().st_mtime_ns] for source in sources for _, path in source.files()
    ]
    named = [[str(source.path), source.domain, asdict(source.fields)] for source in sources]
    tokenizer = vocab_size if given is None else hashlib.sha256(given.to_str().encode()).hexdigest()
    return json.dumps([FORMAT_VERSION, CHUNK_CHARACTERS, named, files, tokenizer, eod_token, asdict(rule)])


def _scanned(work: Path, sources: Sequence[Source], rule: SplitRule, begin: Callable[[], Advance]) -> Scan:
    """The first pass over the sources, or what an earlier run kept of it."""
    kept = work / "scan.npz"
    if kept.is_file():
        return Scan.load(kept)
    scanned = scan(sources, rule, begin())
    scanned.save(kept)
    return scanned


def _trained(
    work: Path, sources: Sequence[Source], scanned: Scan, vocab_size: int, begin: Callable[[], Advance]
) -> Tokenizer:
    """The tokenizer trained on the pool, or the one that an earlier run trained."""
    if (work / TOKENIZER).is_file():
        return load_tokenizer(work / TOKENIZER)
    advance = begin()
    pool = (entry.document.text for entry in _entries(sources, scanned, advance) if entry.split == POOL)
    return train_tokenizer(pool, vocab_size)


def _entries(sources: Sequence[Source], scanned: Scan, advance: Advance = lambda count: None) -> Iterator[Entry]:
    """Read again; raises if a file is no longer what the first pass saw."""
    index = 0
    for number, (source, seen) in enumerate(zip(sources, scanned.sources, strict=True)):
        reader = SourceReader(source, advance)
        for document in reader:
            if reader.documents > seen.documents:
                break
            yield Entry(index, number, int(scanned.split_codes[index]), document)
            index += 1
        if (reader.sha256, reader.documents) != (seen.sha256, seen.documents):
            raise DataError(f"{source.path}: changed while it was being read; leave it alone and prepare again")


def _join(folder: Path, parts: Sequence[Chunk], scanned: Scan, dtype: np.dtype) -> np.ndarray:
    """Put the chunks together: token file and index, document table; returns the lengths in tokens, (D,)."""
    with (folder / TOKENS).open("wb") as tokens, (folder / ROWS).open("wb") as rows:
        for part in parts:
            for path, joined in ((part.tokens, tokens), (part.rows, rows)):
                with path.open("rb") as stream:
                    shutil.copyfileobj(stream, joined, 1 << 20)
    lengths = np.concatenate([np.load(part.lengths) for part in parts])
    write_index(folder / INDEX, lengths, dtype)
    codes = np.empty(len(scanned.split_codes), dtype=CODE_DTYPE)
    codes["domain"], codes["split"] = scanned.domain_codes, scanned.split_codes
    np.save(folder / CODES, codes)
    return lengths.astype(np.int64)


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Megatron's choice (megatron.core.datasets.indexed_dataset): uint16 below 65,500 token ids, else int32."""
    return np.dtype("<u2" if vocabulary_size(tokenizer) < 65500 else "<i4")


def _manifest(
    folder: Path,
    scanned: Scan,
    lengths: np.ndarray,
    tokenizer: Tokenizer,
    eod_token: str,
    rule: SplitRule,
    provenance: dict | None,
) -> dict:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for code, domain in enumerate(scanned.domains):
        counts[domain] = {}
        for split, name in enumerate(SPLITS):
            here = (scanned.domain_codes == code) & (scanned.split_codes == split)
            counts[domain][name] = {"documents": int(here.sum()), "tokens": int(lengths[here].sum())}
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _TOOLS}
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": "",
        "domains": scanned.domains,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "vocab_size": vocabulary_size(tokenizer),
        "eod_token": eod_token,
        "eod_id": eod_id(tokenizer, eod_token, "tokenizer"),
        "token_dtype": _token_dtype(tokenizer).name,
        "counts": counts,
        "split_rule": asdict(rule),
        "sources": [asdict(source) for source in scanned.sources],
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in FILES
        },
        "versions": versions,
        "provenance": provenance or {},
    }
    manifest["fingerprint"] = fingerprint_of(manifest)
    return manifest


def _table(manifest: dict) -> Table:
    """Domain x split: documents and tokens."""
    table = Table(title="documents / tokens")
    table.add_column("domain")
    for heading in (*SPLITS, "all", "of pool"):
        table.add_column(heading, justify="right")
    counts = manifest["counts"]
    pool = sum(splits["pool"]["tokens"] for splits in counts.values())
    for domain, splits in counts.items():
        table.add_row(escape(domain), *_cells(splits), f"{splits['pool']['tokens'] / pool:.1%}")
    table.add_section()
    sums = {name: _sum([splits[name] for splits in counts.values()]) for name in SPLITS}
    table.add_row("all", *_cells(sums), "100.0%")
    return table


def _cells(splits: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{entry['documents']:,} / {_short(entry['tokens'])}" for entry in [*splits.values(), _sum([*splits.values()])]
    ]


def _sum(entries: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens")}


def _short(count: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)


class _Wanted(argparse.Action):
    """Takes the old name of --target-domains, and tells the new one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print("note: --wanted is now --target-domains", file=sys.stderr, flush=True)
        namespace.target_domains = [*(namespace.target_domains or []), values]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m megaopus prepare``."""
    rule = SplitRule()
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--source",
        action="append",
        metavar="[DOMAIN=]PATH",
        help="a .jsonl file (fields: text, optional id and domain), a .txt or .md file (one document), each also .gz "
        "or .zst, a .parquet file, a folder of such files, or hf:NAME[:CONFIG[:SPLIT]], a data set of the hub; "
        "DOMAIN= names the domain of all its documents; repeat for more sources",
    )
    what.add_argument(
        "--demo", action="store_true", help="no source: real text found in this Python installation, no download"
    )
    add("--data", metavar="NAME", help="fields, and sources if none is given, of configs/data/NAME.yaml (data.prepare)")
    add("--text-field", metavar="NAME", help="field that holds the document (default text)")
    add("--id-field", metavar="NAME", help="field of its id (default id)")
    add("--domain-field", metavar="NAME", help="field of its domain (default domain)")
    add("--keep", action="append", metavar="NAME", help="field to keep in the document table, a score say; repeatable")
    add("--out", required=True, metavar="FOLDER", help="corpus folder to make")
    add(
        "--tokenizer",
        metavar="FILE",
        help="Hugging Face tokenizer.json; a folder with one, or with GPT-2's encoder.json and vocab.bpe; or a name on "
        "the hub; default: train byte-level BPE on the pool",
    )
    add("--vocab-size", type=int, help="tokens of a trained tokenizer (default 16384; 2048 with --demo)")
    add("--eod-token", default=EOD, metavar="TOKEN", help="end-of-document token of --tokenizer (default %(default)s)")
    add(
        "--target-domains",
        action="extend",
        nargs="+",
        metavar="DOMAIN",
        help="only these domains give proxy documents (default: all)",
    )
    add("--wanted", action=_Wanted, dest="target_domains", help=argparse.SUPPRESS)
    add("--proxy-fraction", type=float, help=f"share of the target domains' documents (default {rule.proxy_fraction})")
    add("--validation-fraction", type=float, help=f"share of all documents (default {rule.validation_fraction})")
    add("--split-seed", type=int, default=0, help="another seed splits the documents another way (default %(default)s)")
    add("--workers", type=int, metavar="N", help="processes that tokenise (default: one a core, for little text none)")
    add("--overwrite", action="store_true", help="replace a corpus that is already in FOLDER")


def run(args: argparse.Namespace, settings: PrepareConfig | None = None) -> Path:
    """Prepare what the command line asks for, showing progress and a table; returns the corpus folder.

    ``settings``: those of ``--data``; what the command line says comes first.
    """
    console = Console()
    if args.demo:
        from megaopus.corpus_tools.demo_corpus import DEMO_RULE, DEMO_VOCAB_SIZE, build_demo_corpus

        if args.tokenizer:
            raise DataError("--demo trains its own tokenizer; leave --tokenizer out")
        rule, vocab_size = _rule(args, DEMO_RULE), args.vocab_size or DEMO_VOCAB_SIZE
        return build_demo_corpus(
            Path(args.out), vocab_size=vocab_size, rule=rule, overwrite=args.overwrite, console=console
        )
    given = settings or PrepareConfig()
    fields = Fields(
        args.text_field or given.text_field,
        args.id_field or given.id_field,
        args.domain_field or given.domain_field,
        tuple(args.keep or given.keep),
    )
    return prepare(
        [Source.parse(argument, fields) for argument in args.source or given.sources],
        args.out,
        tokenizer=args.tokenizer or given.tokenizer,
        vocab_size=args.vocab_size or 16384,
        eod_token=args.eod_token,
        rule=_rule(args, SplitRule()),
        overwrite=args.overwrite,
        console=console,
        workers=args.workers,
    )


def _rule(args: argparse.Namespace, default: SplitRule) -> SplitRule:
    """The split rule of the command line, with ``default`` where it says nothing."""
    return SplitRule(
        proxy_fraction=default.proxy_fraction if args.proxy_fraction is None else args.proxy_fraction,
        validation_fraction=default.validation_fraction
        if args.validation_fraction is None
        else args.validation_fraction,
        wanted=tuple(args.target_domains) if args.target_domains else default.wanted,
        seed=args.split_seed,
    )
