"""The verb ``prepare``: documents in, a corpus folder out, whole or not at all."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer

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
)
from megaopus.data.folder import new_folder, refuse_existing
from megaopus.data.sources import Document, Fields, Source, SourceReader
from megaopus.data.split import POOL, Scan, SplitRule, scan
from megaopus.data.tokenizer import EOD, SMALLEST_VOCABULARY, eod_id, load_tokenizer, train_tokenizer, vocabulary_size
from megaopus.errors import DataError

Advance = Callable[[int], None]
_BATCH_CHARACTERS = 1 << 20
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

    Returns:
        ``out`` as a path.

    Raises:
        DataError: any fault of a source, tokenizer, setting or target, before anything is written.
    """
    out, rule = Path(out), rule or SplitRule()
    console = console or Console(quiet=True)
    if not sources:
        raise DataError("no source given; name at least one with --source, or --data NAME, or --demo")
    refuse_existing(out, overwrite, MANIFEST)
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given:
        eod_id(given, eod_token, str(tokenizer))
    elif vocab_size < SMALLEST_VOCABULARY or eod_token != EOD:
        raise DataError(
            f"vocab_size = {vocab_size}, eod token {eod_token!r}: a trained tokenizer needs at least "
            f"{SMALLEST_VOCABULARY} tokens and ends documents with {EOD!r}"
        )
    with _progress(console) as stage:
        sizes = [source.size() for source in sources]
        total = sum(sizes) if all(sizes) else None  # the hub's are not known beforehand
        scanned = scan(sources, rule, stage("reading", total))
        with new_folder(out, console) as folder:
            made = given
            if made is None:
                texts = _pool_texts(sources, scanned, stage("training the tokenizer", total))
                made = train_tokenizer(texts, vocab_size)
            made.save(str(folder / TOKENIZER))
            lengths = _encode(folder, sources, scanned, made, eod_token, stage("encoding", total))
            manifest = _manifest(folder, scanned, lengths, made, eod_token, rule, provenance)
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    console.print(_table(manifest))
    line = f"{out}: {manifest['tokens']:,} tokens, fingerprint {manifest['fingerprint'][:16]}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return out


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int | None], Advance]]:
    """Yield ``stage(name, bytes)``, which starts a line of progress and returns its ``advance(bytes)``."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:

        def stage(name: str, total: int | None) -> Advance:
            task = progress.add_task(name, total=total, rate="")

            def advance(count: int) -> None:
                state = progress.tasks[task]
                progress.update(
                    task, advance=count, rate=f"{(state.speed or state.finished_speed or 0) / 1e6:.1f} MB/s"
                )

            return advance

        yield stage


def _documents(sources: Sequence[Source], scanned: Scan, advance: Advance) -> Iterator[tuple[int, int, Document]]:
    """Read again: ``(index, source number, document)``; raises if a file is no longer what the first pass saw."""
    index = 0
    for number, (source, seen) in enumerate(zip(sources, scanned.sources, strict=True)):
        reader = SourceReader(source, advance)
        for document in reader:
            if reader.documents > seen.documents:
                break
            yield index, number, document
            index += 1
        if (reader.sha256, reader.documents) != (seen.sha256, seen.documents):
            raise DataError(f"{source.path}: changed while it was being read; leave it alone and prepare again")


def _pool_texts(sources: Sequence[Source], scanned: Scan, advance: Advance) -> Iterator[str]:
    for index, _, document in _documents(sources, scanned, advance):
        if scanned.split_codes[index] == POOL:
            yield document.text


def _encode(
    folder: Path, sources: Sequence[Source], scanned: Scan, tokenizer: Tokenizer, eod_token: str, advance: Advance
) -> np.ndarray:
    """Write the token files and the document table; return the documents' lengths in tokens, (D,)."""
    dtype = _token_dtype(tokenizer)
    builder = _indexed_dataset().IndexedDatasetBuilder(str(folder / TOKENS), dtype.type)
    eod = eod_id(tokenizer, eod_token, "tokenizer")
    with (folder / ROWS).open("w", encoding="utf-8") as rows:
        for batch in _batches(_documents(sources, scanned, advance)):
            texts = [document.text for _, _, document in batch]
            for (index, number, document), encoding in zip(
                batch, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
            ):
                ids = np.array([*encoding.ids, eod], dtype=dtype)
                builder.add_document(ids, [len(ids)])
                row = {
                    "index": index,
                    "id": document.id,
                    "domain": document.domain,
                    "source": number,
                    "split": SPLITS[scanned.split_codes[index]],
                    "length": len(ids),
                }
                if document.columns:
                    row["columns"] = dict(document.columns)
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
    builder.finalize(str(folder / INDEX))
    codes = np.empty(len(scanned.split_codes), dtype=CODE_DTYPE)
    codes["domain"], codes["split"] = scanned.domain_codes, scanned.split_codes
    np.save(folder / CODES, codes)
    return np.array(builder.sequence_lengths, dtype=np.int64)


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Megatron's choice: uint16 while the vocabulary allows, else int32."""
    return np.dtype(_indexed_dataset().DType.optimal_dtype(vocabulary_size(tokenizer)))


def _indexed_dataset() -> ModuleType:
    """Megatron's file format; imported late (it takes seconds) and without its remarks on absent GPU libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def _batches(
    documents: Iterator[tuple[int, int, Document]],
) -> Iterator[list[tuple[int, int, Document]]]:
    """Groups of about a million characters: enough to keep the tokenizer's threads busy, little to keep in memory."""
    batch, characters = [], 0
    for item in documents:
        batch.append(item)
        characters += len(item[2].text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
    add("--wanted", action="append", metavar="DOMAIN", help="only this domain gives proxy documents; repeatable")
    add("--proxy-fraction", type=float, help=f"share of the wanted documents (default {rule.proxy_fraction})")
    add("--validation-fraction", type=float, help=f"share of all documents (default {rule.validation_fraction})")
    add("--split-seed", type=int, default=0, help="another seed splits the documents another way (default %(default)s)")
    add("--overwrite", action="store_true", help="replace a corpus that is already in FOLDER")


def run(args: argparse.Namespace, settings: PrepareConfig | None = None) -> Path:
    """Prepare what the command line asks for, showing progress and a table; returns the corpus folder.

    ``settings``: those of ``--data``; what the command line says comes first.
    """
    console = Console()
    if args.demo:
        from megaopus.data.demo_corpus import DEMO_RULE, DEMO_VOCAB_SIZE, build_demo_corpus

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
    )


def _rule(args: argparse.Namespace, default: SplitRule) -> SplitRule:
    """The split rule of the command line, with ``default`` where it says nothing."""
    return SplitRule(
        proxy_fraction=default.proxy_fraction if args.proxy_fraction is None else args.proxy_fraction,
        validation_fraction=default.validation_fraction
        if args.validation_fraction is None
        else args.validation_fraction,
        wanted=tuple(args.wanted) if args.wanted else default.wanted,
        seed=args.split_seed,
    )
