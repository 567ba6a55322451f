"""Counts what was read: what the split of documents is decided by, of all sources or of a piece of one."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.corpus_tools.floors import Documents
from megaopus.corpus_tools.sources import Document, LeftOut, Source, SourceReader
from megaopus.corpus_tools.split_rule import POOL, PROXY, VALIDATION, SplitRule
from megaopus.corpus_tools.text_loss import Sample
from megaopus.errors import DataError

_MOST_DOMAINS = 1 << 16
_DIGEST = 16
"""Bytes of a text's digest."""
_ARRAYS = ("codes", "sizes", "draws", "ids", "texts")


@dataclass(slots=True)
class SourceTotals:
    """Says what was read of one source."""

    name: str
    sha256: str
    bytes: int
    documents: int
    empty: int
    files: int = 1
    skipped: dict[str, int] = field(default_factory=dict)
    """Counts files of its folder that were not read, by reason."""
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tells by reason how many rows (or files, or rests of them) cannot be read, ``count``, and what was wrong with the
    ``first``."""
    copies: int = 0
    """Documents that were left out for their text, which an earlier one has."""

    @classmethod
    def of(cls, reader: SourceReader, documents: int) -> SourceTotals:
        """Take the totals of a reader that is through."""
        left_out = {reason: asdict(each) for reason, each in reader.left_out.items()}
        return cls(
            reader.source.name,
            reader.sha256,
            reader.bytes,
            documents,
            reader.empty,
            reader.files,
            reader.skipped,
            left_out,
            reader.copies,
        )

    def add(self, later: SourceTotals) -> None:
        """Add what was read of a later stretch of the same source; digests and files are not added up."""
        self.bytes += later.bytes
        self.documents += later.documents
        self.empty += later.empty
        self.copies += later.copies
        for reason, each in later.left_out.items():
            seen = self.left_out.setdefault(reason, asdict(LeftOut(0, each["first"])))
            seen["count"] += each["count"]


class Tally:
    """Enters documents in reading order and sends each where its hash says; D documents."""

    def __init__(self, sampled_domains: int | None = None, texts: bool = False) -> None:
        """``sampled_domains``: that give a sample of their texts, at most. ``texts``: keep what tells texts apart."""
        self._by_name: dict[str, int] = {}
        self.codes, self.sizes, self.draws, self.ids = array("H"), array("I"), array("I"), array("Q")
        self.texts = array("Q")
        """Of each document's text, where they are kept: a digest beside ``draws``."""
        self.totals: list[SourceTotals] = []
        self.characters = 0
        self.sample = Sample(sampled_domains)
        self._keeps_texts = texts
        self._splits = bytearray()
        self._proxies: list[tuple[int, bytes]] = []
        self._unwanted: set[bytes] = set()

    @property
    def names(self) -> list[str]:
        """Of the domains, in the order of ``codes``."""
        return list(self._by_name)

    def __len__(self) -> int:
        return len(self._splits)

    def _code(self, domain: str, source: Source) -> int:
        if domain not in self._by_name and len(self._by_name) == _MOST_DOMAINS:
            path = source.path
            raise DataError(f"{path}: more than {_MOST_DOMAINS:,} domains; name one with DOMAIN={path}")
        return self._by_name.setdefault(domain, len(self._by_name))

    def take(self, document: Document, source: Source, rule: SplitRule) -> None:
        """Enter one document. Raises DataError if it has one domain too many."""
        code = self._code(document.domain, source)
        self.ids.append(id_hash(document.id))
        self.characters += len(document.text)
        self.codes.append(code)
        draw, digest = rule.draw(document.text.encode())
        self.draws.append(int(draw * 2**32))
        self.sizes.append(min(len(document.text), 2**32 - 1))
        if self._keeps_texts:
            self.texts.append(int.from_bytes(digest[:8], "little"))
        self.sample.offer(document.domain, draw, document.text)
        split = POOL
        if draw < rule.validation_fraction:
            split = VALIDATION
        elif draw < rule.validation_fraction + rule.proxy_fraction:
            if rule.wanted and document.domain not in rule.wanted:
                self._unwanted.add(digest)
            else:
                self._proxies.append((len(self._splits), digest))
                split = PROXY
        self._splits.append(split)

    def extend(self, later: Tally, source: Source) -> None:
        """Enter the documents of a tally that comes after this one, all of ``source``. Raises DataError as ``take``."""
        first = len(self)
        order = np.array([self._code(name, source) for name in later.names], dtype=np.uint16)
        self.codes.frombytes(order[np.frombuffer(later.codes, np.uint16)].tobytes() if len(later) else b"")
        for name in _ARRAYS[1:]:
            getattr(self, name).frombytes(getattr(later, name).tobytes())
        self.characters += later.characters
        for domain, draw, text in later.sample.offered():
            self.sample.offer(domain, draw, text)
        self._splits += later._splits
        self._proxies += [(first + index, digest) for index, digest in later._proxies]
        self._unwanted |= later._unwanted

    def settle(self, rule: SplitRule) -> None:
        """Send back to the pool what an unwanted domain has too. Raises DataError if a wanted domain has nothing."""
        for index, digest in self._proxies:
            if digest in self._unwanted:
                self._splits[index] = POOL
        if missing := [name for name in rule.wanted if name not in self._by_name]:
            known = ", ".join(sorted(self._by_name))
            raise DataError(f"wanted domain {missing[0]!r}: no document has it; the sources have: {known}")

    def documents(self) -> Documents:
        """Describe what was read."""
        splits = np.frombuffer(bytes(self._splits), dtype=np.uint8)
        codes, sizes, draws = (
            np.frombuffer(each, dtype=each.typecode) for each in (self.codes, self.sizes, self.draws)
        )
        return Documents(codes, splits, draws, sizes)

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write it, with further ``facts``; it appears under ``path`` when it is whole."""
        meta = {
            "names": self.names,
            "totals": [asdict(each) for each in self.totals],
            "characters": self.characters,
            "sample": list(self.sample.offered()),
            "facts": facts,
        }
        arrays: dict[str, Any] = {name: np.frombuffer(kept := getattr(self, name), kept.typecode) for name in _ARRAYS}
        places = np.array([place for place, _ in self._proxies], dtype=np.int64)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with partial.open("wb") as stream:
            np.savez(
                stream,
                meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
                splits=np.frombuffer(bytes(self._splits), np.uint8),
                proxy_places=places,
                proxy_digests=np.frombuffer(b"".join(digest for _, digest in self._proxies), np.uint8),
                unwanted=np.frombuffer(b"".join(sorted(self._unwanted)), np.uint8),
                **arrays,
            )
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> tuple[Tally, dict[str, Any]]:
        """Return what ``save`` wrote: the tally, and the facts."""
        found = cls()
        with np.load(path, allow_pickle=False) as held:
            meta = json.loads(held["meta"].tobytes())
            for name in _ARRAYS:
                getattr(found, name).frombytes(held[name].tobytes())
            found._splits = bytearray(held["splits"].tobytes())
            found._proxies = list(zip(held["proxy_places"].tolist(), _digests(held["proxy_digests"]), strict=True))
            found._unwanted = set(_digests(held["unwanted"]))
        found._by_name = {name: code for code, name in enumerate(meta["names"])}
        found.totals = [SourceTotals(**each) for each in meta["totals"]]
        found.characters = meta["characters"]
        for domain, draw, text in meta["sample"]:
            found.sample.offer(domain, draw, text)
        return found, meta["facts"]


def id_hash(identity: str) -> int:
    """8 bytes that stand for a document's id."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


def _digests(joined: np.ndarray) -> list[bytes]:
    content = joined.tobytes()
    return [content[first : first + _DIGEST] for first in range(0, len(content), _DIGEST)]
