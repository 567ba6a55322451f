"""Holds out a share of benchmark items, and of the documents near to the others: the target that nothing has seen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaopus.corpus_tools.manifest import split_counts, write_manifest
from megaopus.corpus_tools.nearest_documents import Item
from megaopus.corpus_tools.text_loss import cannot_encode
from megaopus.data.corpus import (
    CODE_DTYPE,
    CODES,
    FORMAT_VERSION,
    HELD_OUT,
    INDEX,
    LOSS_MASK,
    MASKED_VERSION,
    ROWS,
    SPLIT_NAMES,
    TARGET,
    TOKENIZER,
    TOKENS,
    Corpus,
)
from megaopus.data.index import write_index
from megaopus.errors import DataError

USUAL_SHARE = 0.1
DOMAINS = ("items", "nearest")


def is_held_out(text: str, share: float) -> bool:
    """Say whether a text is of the share that is held out: it depends on the text alone, so equal ones go together."""
    return _draw(text) < share


def _draw(text: str) -> float:
    return int.from_bytes(hashlib.sha256(b"target:" + text.encode()).digest()[:8], "big") / 2**64


def divide(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Return the items that documents are looked for by, and those that are held out.

    Where all of a few would be held out, the text that is the last to be stays. Raises DataError for a share outside
    [0, 1).
    """
    if not 0 <= share < 1:
        raise DataError(f"held-out share {share}: must lie in [0, 1); {USUAL_SHARE} is usual, 0 holds nothing out")
    share = min(share, max((_draw(item.text) for item in items), default=share))
    held = [item for item in items if is_held_out(item.text, share)]
    return [item for item in items if not is_held_out(item.text, share)], held


def write_target(corpus: Corpus, documents: np.ndarray, items: Sequence[Item], folder: Path) -> str:
    """Write the held-out target as a corpus of its own; returns its fingerprint.

    Args:
        corpus: where the documents lie; the target has its tokenizer and its end of documents.
        documents: (H,) their numbers.
        items: what is tokenised beside them, one document each.
        folder: does not exist yet.
    """
    folder.mkdir()
    numbers, dtype = np.sort(documents), corpus.tokens.dtype
    encoded = _encoded(corpus, items)
    ends = np.concatenate([*(np.append(each, corpus.eod_id) for each in encoded), np.empty(0)]).astype(dtype)
    taken = corpus.read(corpus.offsets[numbers], corpus.lengths[numbers])
    np.concatenate([ends, taken]).astype(dtype).tofile(folder / TOKENS)
    lengths = np.concatenate([[len(each) + 1 for each in encoded], corpus.lengths[numbers]]).astype(np.int64)
    write_index(folder / INDEX, lengths, dtype)
    codes = np.empty(len(lengths), dtype=CODE_DTYPE)
    codes["domain"], codes["split"] = np.arange(len(lengths)) >= len(items), HELD_OUT
    np.save(folder / CODES, codes)
    names = [item.name for item in items] + [corpus.ids[number] for number in numbers]
    with (folder / ROWS).open("w", encoding="utf-8") as rows:
        for index, (name, code, length) in enumerate(zip(names, codes["domain"], lengths.tolist(), strict=True)):
            row = {"index": index, "id": name, "domain": DOMAINS[code], "split": TARGET, "length": length}
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
    share_file(corpus.path / TOKENIZER, folder / TOKENIZER)
    counted = None
    if corpus.masked:
        mask = corpus.read_mask(corpus.offsets[numbers], corpus.lengths[numbers])
        whole = np.concatenate([np.ones(len(ends), dtype=bool), mask])
        np.packbits(whole, bitorder="little").tofile(folder / LOSS_MASK)
        counted = np.add.reduceat(whole, np.cumsum(lengths) - lengths, dtype=np.int64)
    same = ("vocab_size", "eod_token", "eod_id", "token_dtype")
    facts = {
        "format_version": FORMAT_VERSION if counted is None else MASKED_VERSION,
        "domains": list(DOMAINS),
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        **{name: corpus.manifest[name] for name in same if name in corpus.manifest},
        "counts": split_counts(DOMAINS, codes, lengths, counted, SPLIT_NAMES),
        "provenance": {"from": corpus.fingerprint},
    }
    return str(write_manifest(folder, facts)["fingerprint"])


def share_file(old: Path, new: Path) -> None:
    """Give a file another name; a copy where that lies on another file system."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def _encoded(corpus: Corpus, items: Sequence[Item]) -> list[list[int]]:
    """Tokenise the text of each item, special tokens in it as plain text."""
    try:
        found = corpus.tokenizer().encode_batch([item.text for item in items], add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise cannot_encode(error) from error
    return [encoding.ids for encoding in found]
