"""Makes a corpus of tokens that somebody else made: token files stay where they are, and are read where they lie.

Megatron-LM's (``preprocess_data.py``: PREFIX.bin and PREFIX.idx), datatrove's (NAME.ds and NAME.ds.index), and bare
tokens (nanoGPT's NAME.bin: uint16, documents end with the end-of-document token). Tokens in the rows of a data set
(``token_rows``) are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from megaopus.corpus_tools.blend import blend_of, told, weights_of
from megaopus.corpus_tools.floors import CHARACTERS_A_TOKEN, Documents, fill
from megaopus.corpus_tools.manifest import split_counts, write_manifest
from megaopus.corpus_tools.progress import Advance, stages
from megaopus.corpus_tools.split import refuse_missing_splits
from megaopus.corpus_tools.split_rule import POOL, PROXY, VALIDATION, SplitRule
from megaopus.corpus_tools.token_rows import COLUMN, DOCUMENTS, Block, TokenRows, rows_of
from megaopus.corpus_tools.token_writer import FILE_TOKENS, TokenWriter
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    INDEX,
    MANIFEST,
    SHARDED_VERSION,
    SPLITS,
    TOKENIZER,
)
from megaopus.data.folder import new_folder, refuse_existing
from megaopus.data.index import documents_of, write_index
from megaopus.data.tokenizer import load_tokenizer, vocabulary_size
from megaopus.errors import DataError
from megaopus.settings import address_refusal

LOOKED_AT = 1000
"""Documents of each file whose tokens are looked at before anything is written."""
_BLOCK = 1 << 24
"""Tokens that are read at a time."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """Says where tokens of one domain lie, and where its documents end."""

    domain: str
    path: Path
    """Of the token file, absolute."""
    dtype: np.dtype
    lengths: np.ndarray
    """(D,) int64, tokens of each document."""
    rows: TokenRows | None = None
    """What the tokens are copied from; None: they are read where they lie."""

    def blocks(self) -> Iterator[Block]:
        """Yield the tokens of some whole documents at a time."""
        if self.rows is not None:
            yield from self.rows.blocks()
            return
        tokens, ends = np.memmap(self.path, self.dtype, "r"), np.cumsum(self.lengths)
        for begin, end in _stretches(ends):
            first, last = np.searchsorted(ends, (begin, end), side="right")
            yield np.asarray(tokens[begin:end]), self.lengths[first:last]


def adopt(
    given: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str | Path,
    eod: int,
    column: str = COLUMN,
    kind: str = DOCUMENTS,
    rule: SplitRule | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a corpus folder for tokens that lie ready, and return it; token files are read once, and not copied.

    A document's place depends on its tokens and the seed alone, as by its text where a corpus is prepared. What is
    copied, of data sets, comes last.

    Args:
        given: [DOMAIN=]PATH each; the domain is the file's name where none is given. With numbers before them, as
            Megatron-LM's ``--data-path`` has them, a blend.
        out: folder to make; it appears when it is whole.
        tokenizer: what the tokens were made with, as ``load_tokenizer`` takes it.
        eod: the token that every document ends with.
        column: of a data set, that has the tokens of each row.
        kind: what a row of a data set is, of ``token_rows``.
        rule: how documents are split; None: ``SplitRule()``.
        overwrite: replace a corpus that is already there.
        console: where progress goes; None: nowhere.

    Raises:
        DataError: a file is missing, not what its index says, of other tokens than the tokenizer has, or its documents
            do not end with ``eod``; before anything is written.
    """
    out, rule, console = Path(out), rule or SplitRule(), console or Console(quiet=True)
    refuse_existing(out, overwrite, MANIFEST)
    made = load_tokenizer(tokenizer)
    vocabulary = vocabulary_size(made)
    if not 0 <= eod < vocabulary:
        raise DataError(f"--eod {eod}: the tokenizer {tokenizer} has tokens 0 to {vocabulary - 1:,}")
    places, weights = blend_of(given)
    found = [_opened(place, eod, vocabulary, column, kind) for place in places]
    blend, files = weights_of([each.domain for each in found], weights), _in_order(found, vocabulary, eod)
    domains = sorted({each.domain for each in files})
    if missing := [name for name in rule.wanted if name not in domains]:
        raise DataError(f"wanted domain {missing[0]!r}: no file has it; the files have: {', '.join(domains)}")
    lengths = np.concatenate([each.lengths for each in files])
    codes = np.empty(len(lengths), CODE_DTYPE)
    codes["domain"] = np.repeat([domains.index(each.domain) for each in files], [len(each.lengths) for each in files])
    with stages(console) as stage:
        advance = stage("reading", int(lengths.sum()), "M tokens/s")
        codes["split"], notes = _split(files, codes["domain"], lengths, domains, rule, vocabulary, advance)
    with new_folder(out, console) as folder:
        made.save(str(folder / TOKENIZER))
        write_index(folder / INDEX, lengths, files[0].dtype)
        np.save(folder / CODES, codes)
        shards = [str(each.path) for each in files if each.rows is None] + _copied(folder, files)
        facts = _facts(files, shards, lengths, codes, domains, made, eod, rule)
        facts["provenance"] |= {"blend": blend} if blend else {}
        write_manifest(folder, {**facts, "notes": [*notes, *told(blend)]})
    return out


def _in_order(files: Sequence[Adopted], vocabulary: int, eod: int) -> list[Adopted]:
    """Put what is copied last, and give it the type of what is not, which is looked at.

    Raises DataError if there are several types still, or as ``_look_at``.
    """
    files, wide = sorted(files, key=lambda each: each.rows is not None), np.dtype("<i4")
    if any(each.dtype == wide for each in files):
        files = [each if each.rows is None else replace(each, dtype=wide) for each in files]
    if len({each.dtype for each in files}) > 1:
        kinds = ", ".join(f"{each.path} {each.dtype}" for each in files[:3])
        raise DataError(f"tokens of different types ({kinds}): adopt them as corpora of their own")
    for each in files:
        if each.rows is None:
            _look_at(each, vocabulary, eod)
    return files


def _copied(folder: Path, files: Sequence[Adopted]) -> list[str]:
    """Write the tokens that lie in rows into files of the folder; returns their names."""
    rows = [each for each in files if each.rows is not None]
    if not rows:
        return []
    with TokenWriter(folder, FILE_TOKENS) as writer:
        for each in rows:
            for tokens, lengths in each.blocks():
                writer.write(tokens.astype(each.dtype), lengths)
    return writer.names


def _opened(argument: str, eod: int, vocabulary: int, column: str, kind: str) -> Adopted:
    """Find the tokens that [DOMAIN=]PATH names, and where their documents end."""
    if refusal := address_refusal(argument):
        raise DataError(f"--adopt {argument}: {refusal[0]}; {refusal[1]}")
    domain, _, place = argument.rpartition("=")
    path = Path(place)
    if (of_rows := rows_of(path)) is not None:
        return _of_rows(domain or path.stem, path, TokenRows(of_rows, column, kind, eod), vocabulary)
    for ending in (".bin", ".idx", ".ds"):
        if path.name.endswith(ending):
            path = path.with_name(path.name.removesuffix(ending))
    tokens, index, ends = (path.with_name(path.name + end) for end in (".bin", ".idx", ".ds.index"))
    found: tuple[Path, np.dtype, np.ndarray]
    if tokens.is_file() and index.is_file():
        found = tokens, *documents_of(index)
    elif ends.is_file():
        found = _datatrove(path.with_name(f"{path.name}.ds"), ends)
    elif tokens.is_file():
        found = tokens, np.dtype("<u2"), _cut(tokens, eod)
    else:
        raise DataError(f"{place}: no token file: there is neither {tokens.name} nor {path.name}.ds with its .ds.index")
    size, total = found[0].stat().st_size, int(found[2].sum()) * found[1].itemsize
    if size != total or not total:
        raise DataError(f"{found[0]}: {size:,} bytes, but its index has {total:,}; copy both again")
    return Adopted(domain or path.name, found[0].absolute(), found[1], found[2])


def _of_rows(domain: str, path: Path, rows: TokenRows, vocabulary: int) -> Adopted:
    """Read all rows, for the lengths of the documents. Raises DataError as ``_look_at``, of every one."""
    found, count = [], 0
    for tokens, lengths in rows.blocks():
        _refuse_unknown(path, tokens, vocabulary)
        last = tokens[np.cumsum(lengths) - 1]
        if len(without := np.flatnonzero(last != rows.eod)):
            raise DataError(
                f"{path}: rows do not end with the token {rows.eod} (row {count + int(without[0]):,} with tokens ends"
                f" with {last[without[0]]}): name the token that ends documents with --eod; or say what rows are:"
                " --append-eod if each is a document without its end, --packed if they are cut out of a stream"
            )
        found.append(lengths)
        count += len(lengths)
    if not count:
        raise DataError(f"{path}: no tokens in column {rows.column!r}; name another with --column")
    dtype = np.dtype("<u2" if vocabulary < 65500 else "<i4")  # as Megatron chooses
    return Adopted(domain, path.absolute(), dtype, np.concatenate(found), rows)


def _datatrove(tokens: Path, ends: Path) -> tuple[Path, np.dtype, np.ndarray]:
    """Read where the documents of a file of datatrove's end: uint64 each; tokens are of 2 or 4 bytes by their sizes."""
    if not tokens.is_file():
        raise DataError(f"{tokens}: missing beside {ends.name}; copy both")
    found = np.fromfile(ends, "<u8").astype(np.int64)
    lengths = np.diff(found, prepend=0)
    total = int(found[-1]) if len(found) else 0
    size = tokens.stat().st_size
    width = size // total if total else 0
    if width not in (2, 4) or width * total != size or (lengths <= 0).any():
        raise DataError(f"{tokens}: {size:,} bytes do not fit the {total:,} tokens of {ends.name}; copy both again")
    return tokens, np.dtype("<u2" if width == 2 else "<i4"), lengths


def _cut(tokens: Path, eod: int) -> np.ndarray:
    """Cut bare uint16 tokens where documents end."""
    if not tokens.stat().st_size or tokens.stat().st_size % 2:
        raise DataError(f"{tokens}: {tokens.stat().st_size:,} bytes are no uint16 tokens; give a file of such")
    mapped, found = np.memmap(tokens, "<u2", "r"), []
    for first in range(0, len(mapped), _BLOCK):
        found.append(first + np.flatnonzero(mapped[first : first + _BLOCK] == eod) + 1)
    ends = np.concatenate(found)
    if not len(ends) or ends[-1] != len(mapped):
        raise DataError(f"{tokens}: does not end with the token {eod} that ends documents; name the right one: --eod")
    return np.diff(ends, prepend=0)


def _look_at(given: Adopted, vocabulary: int, eod: int) -> None:
    """Raise DataError unless some documents, evenly spread, end with ``eod`` and have tokens of the vocabulary."""
    tokens = np.memmap(given.path, given.dtype, "r")
    ends, count = np.cumsum(given.lengths), len(given.lengths)
    some = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64))
    without = [number for number in some.tolist() if tokens[ends[number] - 1] != eod]
    if without:
        last = int(tokens[ends[without[0]] - 1])
        raise DataError(
            f"{given.path}: {len(without):,} of {len(some):,} documents do not end with the token {eod} (document"
            f" {without[0]:,} ends with {last}): name the token that ends them with --eod, or make the files with it"
            " (Megatron-LM's --append-eod)"
        )
    for number in some.tolist():
        _refuse_unknown(given.path, tokens[ends[number] - given.lengths[number] : ends[number]], vocabulary)


def _refuse_unknown(path: Path, tokens: np.ndarray, vocabulary: int) -> None:
    if len(bad := np.flatnonzero((tokens < 0) | (tokens >= vocabulary))):
        raise DataError(
            f"{path}: has the token {int(tokens[bad[0]])}, the tokenizer 0 to {vocabulary - 1:,}; name the tokenizer"
            " that made it"
        )


def _split(
    files: Sequence[Adopted],
    domains: np.ndarray,
    lengths: np.ndarray,
    names: Sequence[str],
    rule: SplitRule,
    vocabulary: int,
    advance: Advance,
) -> tuple[np.ndarray, list[str]]:
    """Send each document where its tokens say, equal ones to one split: ((D,) uint8 splits, notes)."""
    draws, held = np.empty(len(lengths)), np.empty(len(lengths), "<u8")
    number = 0
    for each in files:
        for block, counts in each.blocks():
            _refuse_unknown(each.path, block, vocabulary)
            block = block.astype(each.dtype, copy=False)
            start = 0
            for count in counts.tolist():
                draw, digest = rule.draw(block[start : start + count].tobytes())
                draws[number], held[number] = draw, int.from_bytes(digest[:8], "little")
                number, start = number + 1, start + count
            advance(len(block))
    splits = np.full(len(lengths), POOL, np.uint8)
    splits[draws < rule.validation_fraction + rule.proxy_fraction] = PROXY
    splits[draws < rule.validation_fraction] = VALIDATION
    if rule.wanted:  # what an unwanted domain has too stays in the pool
        unwanted = ~np.isin(domains, [names.index(name) for name in rule.wanted])
        proxies = splits == PROXY
        splits[proxies & np.isin(held, held[proxies & unwanted])] = POOL
    sizes = np.minimum(lengths * CHARACTERS_A_TOKEN, 2**32 - 1).astype(np.uint32)
    filled = fill(Documents(domains, splits, (draws * 2**32).astype(np.uint32), sizes), names, rule, may_cut=False)
    refuse_missing_splits(filled.splits, rule)
    moved = {SPLITS[split]: count for split, count in filled.moved.items() if count}
    return filled.splits, [f"{name}: {count:,} documents more than the hash gave it" for name, count in moved.items()]


def _stretches(ends: np.ndarray) -> list[tuple[int, int]]:
    """Cut documents that end at ``ends`` into stretches of about ``_BLOCK`` tokens, of whole ones."""
    found, begin = [], 0
    while begin < ends[-1]:
        place = int(np.searchsorted(ends, begin + _BLOCK, side="right"))
        end = int(ends[max(place - 1, int(np.searchsorted(ends, begin, side="right")))])
        found.append((begin, end))
        begin = end
    return found


def _facts(
    files: Sequence[Adopted],
    shards: Sequence[str],
    lengths: np.ndarray,
    codes: np.ndarray,
    domains: Sequence[str],
    tokenizer: Tokenizer,
    eod: int,
    rule: SplitRule,
) -> dict[str, Any]:
    """Give what the manifest says."""
    sources = [
        {"name": f"{each.domain}={each.path}", "documents": len(each.lengths), "empty": 0, "files": 1} for each in files
    ]
    return {
        "format_version": SHARDED_VERSION,
        "shards": list(shards),
        "domains": list(domains),
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "vocab_size": vocabulary_size(tokenizer),
        "eod_token": tokenizer.id_to_token(eod),
        "eod_id": eod,
        "token_dtype": files[0].dtype.name,
        "counts": split_counts(domains, codes, lengths, None, SPLITS),
        "split_rule": asdict(rule),
        "sources": sources,
        "provenance": {"adopted": [str(each.path) for each in files]},
    }
