"""Tokenising in chunks of documents, by worker processes, so that a killed run loses no chunk that was finished.

Chunks are cut by the text alone: their number, content and order do not depend on who works on them. This process
reads; workers tokenise and write. A chunk's files appear under their names when they are whole.
"""

from __future__ import annotations

import json
import os
import secrets
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from megaopus.corpus_tools.sources import Document
from megaopus.corpus_tools.text_loss import cannot_encode
from megaopus.corpus_tools.workers import worker_pool
from megaopus.data.corpus import SPLITS
from megaopus.data.folder import StoppedError
from megaopus.data.tokenizer import load_tokenizer

CHUNK_CHARACTERS = 1 << 20
"""Of text in one chunk, at least: some tenths of a second of work."""
_MOST_CHUNKS = 1 << 14
"""About: longer texts have longer chunks."""
_BATCH_CHARACTERS = 1 << 20
"""Tokenised in one call: enough to keep threads busy, little to hold in memory."""
_AHEAD = 2
"""Chunks per worker that are read before they are asked for."""
_CODES = {2: "H", 4: "i"}
"""Of ``array``, by the bytes of a token: it takes lists in a third of numpy's time."""


class Entry(NamedTuple):
    """A document and its place."""

    position: int
    source: int
    split: int
    document: Document


class Chunk(NamedTuple):
    """Files of one finished chunk: tokens, lengths in tokens (n,) int32, rows of the document table."""

    tokens: Path
    lengths: Path
    rows: Path

    @property
    def mask(self) -> Path:
        """A byte for each token: whether it counts in the loss. Not there: all do."""
        return self.tokens.with_suffix(".mask")


def chunk_files(folder: Path, number: int) -> Chunk:
    """Return what chunk ``number`` is called."""
    name = f"chunk-{number:06d}"
    return Chunk(folder / f"{name}.tokens", folder / f"{name}.npy", folder / f"{name}.rows")


def runs(entries: Iterable[Entry], characters: int) -> Iterator[list[Entry]]:
    """Documents in groups of so many characters of text; the last may have fewer."""
    found: list[Entry] = []
    size = 0
    for entry in entries:
        found.append(entry)
        size += len(entry.document.text)
        if size >= characters:
            yield found
            found, size = [], 0
    if found:
        yield found


def encode(
    entries: Iterator[Entry],
    folder: Path,
    tokenizer: Path,
    eod: int,
    dtype: str,
    workers: int,
    characters: int,
    advance: Callable[[int], None],
) -> list[Chunk]:
    """Tokenise ``entries`` into chunks in ``folder``; those that are there already are left as they are.

    ``characters``: of all of them. ``advance(characters)`` is called as chunks are finished. Raises StoppedError if a
    worker dies.
    """
    found: list[Chunk] = []
    size_of_chunk = max(CHUNK_CHARACTERS, characters // _MOST_CHUNKS)
    waiting: list[tuple[Future[None], int]] = []
    pool: ProcessPoolExecutor | None = None
    alone: Tokenizer | None = None
    try:
        for number, part in enumerate(runs(entries, size_of_chunk)):
            files = chunk_files(folder, number)
            found.append(files)
            size = sum(len(entry.document.text) for entry in part)
            if files.rows.is_file():  # written last
                advance(size)
            elif workers == 1:
                alone = alone or load_tokenizer(tokenizer)
                write_chunk(part, files, alone, eod, dtype, advance)
            else:
                pool = pool or worker_pool(workers, _start, tokenizer)
                waiting.append((pool.submit(_work, part, files, eod, dtype), size))
                if len(waiting) >= workers * _AHEAD:
                    _finish(waiting, advance)
        while waiting:
            _finish(waiting, advance)
    except BrokenProcessPool as error:
        raise StoppedError(
            "a worker process died while it tokenised, for want of memory perhaps; start again with fewer --workers:"
            " what is finished is kept"
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
    return found


def _finish(waiting: list[tuple[Future[None], int]], advance: Callable[[int], None]) -> None:
    future, size = waiting.pop(0)
    future.result()
    advance(size)


def write_chunk(
    part: list[Entry],
    files: Chunk,
    tokenizer: Tokenizer,
    eod: int,
    dtype: str,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Tokenise documents and write their chunk; the rows last, whose file says that all is there."""
    masked = any(entry.document.loss_spans is not None for entry in part)
    write_entries(part, masked, files, tokenizer, eod, dtype, advance)


def write_entries(
    entries: Iterable[Entry],
    masked: bool,
    files: Chunk,
    tokenizer: Tokenizer,
    eod: int,
    dtype: str,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Tokenise documents as they come, no more than a batch in memory, and write their files; returns their tokens.

    ``masked``: whether some documents may have context that counts in no loss.
    """
    lengths: list[int] = []
    masks: list[np.ndarray] = []
    unique = f"{os.getpid()}.{secrets.token_hex(4)}.partial"  # another machine may have the same process numbers
    temporary = [path.with_name(f"{path.name}.{unique}") for path in files]
    with temporary[0].open("wb") as tokens, temporary[2].open("w", encoding="utf-8") as rows:
        for batch in runs(entries, _BATCH_CHARACTERS):
            texts = [entry.document.text for entry in batch]
            encodings = _encoded(tokenizer, batch)
            ids = array(_CODES[np.dtype(dtype).itemsize])
            for entry, encoding in zip(batch, encodings, strict=True):
                before = len(ids)
                ids.fromlist(encoding.ids)
                ids.append(eod)
                lengths.append(len(ids) - before)
                if masked:
                    masks.append(_mask(entry.document, encoding))
                rows.write(json.dumps(_row(entry, lengths[-1]), ensure_ascii=False) + "\n")
            np.asarray(ids).astype(dtype, copy=False).tofile(tokens)
            advance(sum(map(len, texts)))
    if not all(mask.all() for mask in masks):
        np.concatenate(masks).astype(np.uint8).tofile(files.mask)  # read only if the rows are there
    with temporary[1].open("wb") as stream:
        np.save(stream, np.array(lengths, dtype="<i4"))
    for made, path in zip(temporary, files, strict=True):
        os.replace(made, path)
    return sum(lengths)


def _encoded(tokenizer: Tokenizer, batch: list[Entry]) -> list[Encoding]:
    """Tokenise documents of one batch, with the places of tokens where some document needs them."""
    found: dict[int, Encoding] = {}
    for markup in (False, True):
        part = {n: entry.document for n, entry in enumerate(batch) if entry.document.markup == markup}
        places = any(document.loss_spans is not None for document in part.values())
        plain, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, not markup
        encode = tokenizer.encode_batch if places else tokenizer.encode_batch_fast
        try:
            encodings = encode([document.text for document in part.values()], add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise cannot_encode(error) from error
        finally:
            tokenizer.encode_special_tokens = plain
        found |= dict(zip(part, encodings, strict=True))
    return [found[number] for number in range(len(batch))]


def _mask(document: Document, encoding: Encoding) -> np.ndarray:
    """Say which of a document's tokens count in the loss: those with a character in a range; (n + 1,) bool.

    The token that ends the document counts if the last range goes to the end of the text.
    """
    spans, count = document.loss_spans, len(encoding.ids)
    if spans is None:
        return np.ones(count + 1, dtype=bool)
    counted = np.zeros(len(document.text) + 1, dtype=np.int64)
    for first, last in spans:
        counted[first + 1 : last + 1] = 1
    before = counted.cumsum()  # of the characters up to each place
    places = np.array(encoding.offsets, dtype=np.int64).reshape(count, 2)
    ends = bool(spans) and spans[-1][1] == len(document.text)
    return np.append(before[places[:, 1]] > before[places[:, 0]], ends)


def _row(entry: Entry, length: int) -> dict[str, Any]:
    document = entry.document
    row = {
        "index": entry.position,
        "id": document.id,
        "domain": document.domain,
        "source": entry.source,
        "split": SPLITS[entry.split],
        "length": length,
    }
    return {**row, "columns": dict(document.columns)} if document.columns else row


# -- in the workers ----------------------------------------------------------------------------------------------------

_tokenizer: Tokenizer | None = None


def _start(path: Path) -> None:
    """One thread for each worker."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_tokenizer(path)


def _work(part: list[Entry], files: Chunk, eod: int, dtype: str) -> None:
    assert _tokenizer is not None
    write_chunk(part, files, _tokenizer, eod, dtype)
