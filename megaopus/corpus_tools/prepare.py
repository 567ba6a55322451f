"""Turns documents into a corpus folder, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from megaopus.corpus_tools.by_tasks import TaskReadings
from megaopus.corpus_tools.copies import COPIES, MINHASH
from megaopus.corpus_tools.encode import CHUNK_CHARACTERS, Chunk, Entry, encode
from megaopus.corpus_tools.manifest import split_counts, write_manifest
from megaopus.corpus_tools.piece_work import changed
from megaopus.corpus_tools.progress import Advance, Stage, stages
from megaopus.corpus_tools.readers.stored import FaultyError
from megaopus.corpus_tools.signatures import sign_pool
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.corpus_tools.split import HereReadings, Readings, Scan, scan
from megaopus.corpus_tools.split_rule import POOL, PROXY, VALIDATION, SplitRule
from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.corpus_tools.tasks.workers import Workers
from megaopus.corpus_tools.text_loss import counted_loss, described, refuse, sampled_loss, unknown_id
from megaopus.corpus_tools.token_writer import FILE_TOKENS, TokenWriter
from megaopus.corpus_tools.workers import cores
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    FORMAT_VERSION,
    INDEX,
    LOSS_MASK,
    MANIFEST,
    MASKED_VERSION,
    ROWS,
    SHARDED_VERSION,
    SPLITS,
    TOKENIZER,
)
from megaopus.data.folder import new_folder, refuse_existing, work_folder
from megaopus.data.index import write_index
from megaopus.data.tokenizer import EOD, SMALLEST_VOCABULARY, eod_id, load_tokenizer, train_tokenizer, vocabulary_size
from megaopus.errors import DataError

_LITTLE = 1 << 24
"""Bytes of sources below which starting workers takes longer than they save."""
MAX_LOST = 0.01
_TOOLS = ("numpy", "tokenizers", "megatron-core")


def prepare(
    sources: Sequence[Source],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 16384,
    eod_token: str = EOD,
    rule: SplitRule | None = None,
    max_lost: float = MAX_LOST,
    overwrite: bool = False,
    provenance: dict | None = None,
    console: Console | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    dedup: str | None = None,
    file_tokens: int = FILE_TOKENS,
) -> Path:
    """Write a corpus folder, and return it; the same sources and settings give the same fingerprint anywhere.

    Args:
        sources: read in this order.
        out: folder to make; it appears when it is whole.
        tokenizer: what ``load_tokenizer`` takes; None trains byte-level BPE of ``vocab_size`` tokens on the pool split.
        eod_token: the token that ends each document.
        rule: how documents are split; None: ``SplitRule()``.
        max_lost: largest share of any domain's text that the tokenizer may lose (``text_loss``).
        overwrite: replace a corpus that is already there.
        provenance: kept in the manifest under ``provenance``.
        console: where progress goes; None: nowhere.
        workers: processes that tokenise; None: one for each core, and for little text none but this one.
        executor: who reads and tokenises, by tasks over pieces of the sources; None: this process and ``workers``.
        dedup: which copies are left out, of ``COPIES``; None: none are.
        file_tokens: of a token file, at most; a corpus of more has several, of whole documents each.

    Raises:
        DataError: any fault of a source, tokenizer, setting or target, before anything is written.
    """
    out, rule, console = Path(out), rule or SplitRule(), console or Console(quiet=True)
    given = _checked(sources, out, tokenizer, vocab_size, eod_token, overwrite, workers, max_lost, file_tokens)
    _check_tasks(out, executor, dedup)
    total = _bytes(sources)
    workers = workers or (1 if total is not None and total < _LITTLE else cores())
    plan = _plan(sources, given, vocab_size, eod_token, rule, dedup)
    with stages(console) as stage, work_folder(out, plan, console) as work, Workers() as processes:
        hands = _hands(sources, rule, executor, processes, work, plan, stage, workers, dedup)
        scanned = _scanned(work, sources, rule, hands, dedup)
        made = given or _trained(work, sources, scanned, vocab_size, lambda: stage("training the tokenizer", total))
        made.save(str(work / TOKENIZER))
        refuse(sampled := sampled_loss(made, scanned.sample), max_lost)
        dtype, eod = _token_dtype(made), eod_id(made, eod_token, "tokenizer")
        parts = hands.encode(scanned, work / TOKENIZER, eod, dtype.str)
        with new_folder(out, console) as folder:
            shutil.copyfile(work / TOKENIZER, folder / TOKENIZER)
            lengths, unknown, files = _join(folder, parts, scanned, dtype, unknown_id(made), file_tokens)
            refuse(losses := counted_loss(scanned.domains, scanned.domain_codes, lengths, unknown, sampled), max_lost)
            facts: dict[str, Any] = {"tokenization": described(losses), "notes": _notes(scanned, lengths, rule)}
            facts |= {"provenance": provenance or {}} | _told(sources, scanned) | _shards(files)
            _write_manifest(folder, scanned, lengths, _join_masks(folder, parts), made, eod_token, rule, facts)
            sign_pool(folder, rule.seq_len, workers, lambda count: stage("signatures", count, "sequences/s", 1))
    return out


def _checked(
    sources: Sequence[Source],
    out: Path,
    tokenizer: str | Path | None,
    vocab_size: int,
    eod_token: str,
    overwrite: bool,
    workers: int | None,
    max_lost: float,
    file_tokens: int,
) -> Tokenizer | None:
    """Load the tokenizer that is given, if one is. Raises DataError for settings that cannot be used."""
    if not sources:
        raise DataError("no source given; name at least one with --source, or --data NAME, or --demo")
    if workers is not None and workers < 1:
        raise DataError(f"workers = {workers}: must be at least 1; leave it out for one a core")
    if file_tokens < 1:
        raise DataError(f"file_tokens = {file_tokens}: must be at least 1; leave it out for {FILE_TOKENS:,}")
    if not 0 <= max_lost <= 1:
        raise DataError(f"max_lost = {max_lost}: must lie in [0, 1]; 0.01 is usual")
    refuse_existing(out, overwrite, MANIFEST)
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given:
        eod_id(given, eod_token, str(tokenizer))
    elif vocab_size < SMALLEST_VOCABULARY or eod_token != EOD:
        raise DataError(
            f"vocab_size = {vocab_size}, eod token {eod_token!r}: a trained tokenizer needs at least "
            f"{SMALLEST_VOCABULARY} tokens and ends documents with {EOD!r}"
        )
    return given


def _check_tasks(out: Path, executor: Executor | None, dedup: str | None) -> None:
    """Raise DataError for tasks that cannot be, and copies that cannot be found."""
    if executor is not None:
        executor.check(out)
    if dedup is not None and dedup not in COPIES:
        raise DataError(f"dedup = {dedup!r}: no such way to find copies; give one of {', '.join(COPIES)}")
    if dedup == MINHASH and executor is None:
        raise DataError("--dedup minhash: compared by tasks; add --executor local, or give --dedup exact")


@dataclass(frozen=True)
class _Here(HereReadings):
    """Reads in this process, and tokenises in others."""

    work: Path
    workers: int
    stage: Stage

    def encode(self, scanned: Scan, tokenizer: Path, eod: int, dtype: str) -> list[Chunk]:
        """Tokenise in chunks. Returns their files, in order."""
        advance = self.stage("encoding", scanned.characters, "M characters/s")
        entries = _entries(self.sources, scanned)
        return encode(entries, self.work, tokenizer, eod, dtype, self.workers, scanned.characters, advance)


def _hands(
    sources: Sequence[Source],
    rule: SplitRule,
    executor: Executor | None,
    processes: Workers,
    work: Path,
    plan: str,
    stage: Stage,
    workers: int,
    dedup: str | None,
) -> TaskReadings | _Here:
    """Return who reads and tokenises."""
    if executor is not None:
        begin = partial(stage, unit="pieces/s", scale=1)
        return TaskReadings(sources, rule, executor, processes, work, plan, begin, dedup is not None)
    total = _bytes(sources)
    return _Here(sources, rule, lambda name: stage(name, total), dedup is not None, work, workers, stage)


def _shards(files: list[str]) -> dict[str, Any]:
    """Name the token files, where there are several."""
    return {"shards": files} if len(files) > 1 else {}


def _told(sources: Sequence[Source], scanned: Scan) -> dict[str, Any]:
    """Return what the manifest says of the sources, and of copies, if they were looked for."""
    told = [
        asdict(totals) | ({"sha256": source.listed_sha256()} if source.remote else {})
        for source, totals in zip(sources, scanned.sources, strict=True)
    ]
    return {"sources": told} | ({} if scanned.duplicates is None else {"duplicates": scanned.duplicates})


def _bytes(sources: Sequence[Source]) -> int | None:
    """Size of the sources as stored; None: one is of the hub, whose size is not known beforehand."""
    sizes = [source.size() for source in sources]
    return sum(sizes) if all(sizes) else None


def _plan(
    sources: Sequence[Source],
    given: Tokenizer | None,
    vocab_size: int,
    eod_token: str,
    rule: SplitRule,
    dedup: str | None,
) -> str:
    """Return what a run that goes on from another's chunks has in common with it. Files are known by size and age."""
    files = [stamp for source in sources for stamp in source.stamps()]
    named = [asdict(source) | {"path": str(source.path)} for source in sources]
    tokenizer = vocab_size if given is None else hashlib.sha256(given.to_str().encode()).hexdigest()
    return json.dumps([FORMAT_VERSION, CHUNK_CHARACTERS, named, files, tokenizer, eod_token, asdict(rule), dedup])


def _scanned(work: Path, sources: Sequence[Source], rule: SplitRule, readings: Readings, dedup: str | None) -> Scan:
    """The first pass over the sources, or what an earlier run kept of it; tasks keep what they do by themselves."""
    kept = work / "scan.npz"
    if kept.is_file() and isinstance(readings, HereReadings):
        return Scan.load(kept)
    try:
        scanned = scan(sources, rule, readings, dedup)
    except FaultyError as error:
        raise DataError(f"{error}; --on-error skip leaves such out and counts them") from error
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

    def compare(number: int, reader: SourceReader, documents: int) -> None:
        seen = scanned.sources[number]
        if (seen.sha256 and reader.sha256 != seen.sha256) or documents != seen.documents:
            raise changed(sources[number])

    for index, (number, document) in enumerate(scanned.reading.documents(sources, advance, compare)):
        if index == len(scanned.split_codes):
            raise changed(sources[number])
        yield Entry(index, number, int(scanned.split_codes[index]), document)


def _join(
    folder: Path, parts: Sequence[Chunk], scanned: Scan, dtype: np.dtype, unknown: int | None, most: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Put the chunks together: token files and index, document table.

    ``unknown``: the token to count, if there is such; ``most``: tokens of a file. Returns lengths and unknown tokens of
    each document, (D,) each, and the names of the token files.
    """
    lengths_of, unknown_of = [], []
    with TokenWriter(folder, most) as tokens, (folder / ROWS).open("wb") as rows:
        for part in parts:
            found, lengths = np.fromfile(part.tokens, dtype), np.load(part.lengths)
            tokens.write(found, lengths)
            lengths_of.append(lengths)
            starts = np.cumsum(lengths) - lengths
            met = np.zeros(len(found), bool) if unknown is None else found == unknown
            unknown_of.append(np.add.reduceat(met, starts, dtype=np.int32))
            with part.rows.open("rb") as stream:
                shutil.copyfileobj(stream, rows, 1 << 20)
    lengths = np.concatenate(lengths_of)
    write_index(folder / INDEX, lengths, dtype)
    codes = np.empty(len(scanned.split_codes), dtype=CODE_DTYPE)
    codes["domain"], codes["split"] = scanned.domain_codes, scanned.split_codes
    np.save(folder / CODES, codes)
    return lengths.astype(np.int64), np.concatenate(unknown_of), tokens.names


def _join_masks(folder: Path, parts: Sequence[Chunk]) -> np.ndarray | None:
    """Put the chunks' loss masks together, a bit for each token, if there is one.

    Returns how many tokens of each document count in the loss, (D,); None: all of every one.
    """
    if not any(part.mask.is_file() for part in parts):
        return None
    found, rest = [], np.empty(0, dtype=np.uint8)
    with (folder / LOSS_MASK).open("wb") as stream:
        for part in parts:
            lengths = np.load(part.lengths)
            mask = np.fromfile(part.mask, np.uint8) if part.mask.is_file() else np.ones(int(lengths.sum()), np.uint8)
            found.append(np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64))
            bits = np.concatenate([rest, mask])
            whole = len(bits) // 8 * 8
            np.packbits(bits[:whole], bitorder="little").tofile(stream)
            rest = bits[whole:]
        np.packbits(rest, bitorder="little").tofile(stream)
    return np.concatenate(found)


def _notes(scanned: Scan, lengths: np.ndarray, rule: SplitRule) -> list[str]:
    """Say what is odd about the splits, and which hold no sequence of the length that is asked for.

    Raises DataError if one holds none of any length.
    """
    notes = list(scanned.notes)
    asked = {POOL: True, VALIDATION: rule.validation_fraction > 0, PROXY: rule.proxy_fraction > 0}
    for split in (code for code, wanted in asked.items() if wanted):
        here = scanned.split_codes == split
        tokens = np.bincount(scanned.domain_codes[here], lengths[here], minlength=len(scanned.domains))
        longest = int(tokens.max()) - 1  # a sequence is of one domain, and its last label is one token further on
        if longest < 2:
            raise DataError(f"the split {SPLITS[split]} has {longest + 1} tokens, too few for any run; add text")
        if longest < rule.seq_len:
            lacks = f"{SPLITS[split]}: too little text for a sequence of {rule.seq_len} tokens"
            notes.append(f"{lacks}; runs need data.seq_len={longest} or less")
    return notes


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Megatron's choice (megatron.core.datasets.indexed_dataset): uint16 below 65,500 token ids, else int32."""
    return np.dtype("<u2" if vocabulary_size(tokenizer) < 65500 else "<i4")


def _write_manifest(
    folder: Path,
    scanned: Scan,
    lengths: np.ndarray,
    counted: np.ndarray | None,
    tokenizer: Tokenizer,
    eod_token: str,
    rule: SplitRule,
    facts: dict,
) -> None:
    """Write what the corpus holds and how it came to be; ``facts`` are its further entries.

    ``counted``: tokens of each document that count in the loss; None: all.
    """
    version = FORMAT_VERSION if counted is None else MASKED_VERSION
    if "shards" in facts:
        version = SHARDED_VERSION
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _TOOLS}
    codes = np.load(folder / CODES)
    manifest = {
        "format_version": version,
        "domains": scanned.domains,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "vocab_size": vocabulary_size(tokenizer),
        "eod_token": eod_token,
        "eod_id": eod_id(tokenizer, eod_token, "tokenizer"),
        "token_dtype": _token_dtype(tokenizer).name,
        "counts": split_counts(scanned.domains, codes, lengths, counted, SPLITS),
        "split_rule": asdict(rule),
        "versions": versions,
        **facts,
    }
    if version == SHARDED_VERSION:  # which of the files that may be missing are there
        manifest["files"] = dict.fromkeys([ROWS] if counted is None else [ROWS, LOSS_MASK])
    write_manifest(folder, manifest)
