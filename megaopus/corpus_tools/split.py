"""First pass over the sources: check every document, and decide which split each belongs to."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megaopus.corpus_tools.sources import Document, Source, SourceReader
from megaopus.data.corpus import SPLITS
from megaopus.errors import DataError

POOL, PROXY, VALIDATION = range(len(SPLITS))
_MOST_DOMAINS = 1 << 16


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Says which share of the documents goes where; a document's place depends on its text and the seed alone."""

    proxy_fraction: float = 0.01
    """Share of the wanted domains' documents that become the proxy."""
    validation_fraction: float = 0.01
    """Share of every domain's documents held out for validation."""
    wanted: tuple[str, ...] = ()
    """Domains that give proxy documents; none named: all of them."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("proxy_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"{name} = {getattr(self, name)}: must lie in [0, 1); 0.01 is usual")
        if self.proxy_fraction + self.validation_fraction >= 1:
            raise DataError("proxy_fraction + validation_fraction must stay below 1; the rest is the training pool")

    def draw(self, text: bytes) -> tuple[float, bytes]:
        """A number in [0, 1) that the text decides, and a short digest of the text."""
        digest = hashlib.sha256(b"%d:" % self.seed + text).digest()
        return int.from_bytes(digest[:8], "big") / 2**64, digest[8:24]


@dataclass(slots=True)
class SourceTotals:
    """Says what was read of one source."""

    name: str
    sha256: str
    bytes: int
    documents: int
    empty: int


@dataclass(slots=True)
class Scan:
    """Outcome of the first pass; D documents in reading order."""

    domains: list[str] = field(default_factory=list)
    domain_codes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    """(D,) index into the sorted ``domains``."""
    split_codes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    """(D,) index into SPLITS."""
    sources: list[SourceTotals] = field(default_factory=list)
    characters: int = 0
    """Of all documents."""

    def save(self, path: Path) -> None:
        """Write it; it appears under ``path`` when it is whole."""
        partial = path.with_name(f"{path.name}.partial")
        meta = {"domains": self.domains, "characters": self.characters, "sources": [asdict(s) for s in self.sources]}
        with partial.open("wb") as stream:
            np.savez(stream, meta=json.dumps(meta), domain_codes=self.domain_codes, split_codes=self.split_codes)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Scan:
        """Return what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as held:
            meta = json.loads(str(held["meta"]))
            codes = held["domain_codes"], held["split_codes"]
        return cls(meta["domains"], *codes, [SourceTotals(**each) for each in meta["sources"]], meta["characters"])


def scan(sources: Sequence[Source], rule: SplitRule, on_bytes: Callable[[int], None] = lambda count: None) -> Scan:
    """Read everything once and split it.

    Documents with the same text always share a split. A text drawn for the proxy that also occurs in an unwanted
    domain stays in the pool, so that no proxy text is ever trained on.

    Raises:
        DataError: a broken source, an id given twice, an unknown wanted domain, or an empty pool.
    """
    result = Scan()
    names: dict[str, int] = {}
    codes, splits = array("H"), bytearray()
    ids = array("Q")
    proxies: list[tuple[int, bytes]] = []
    unwanted: set[bytes] = set()
    for source in sources:
        reader = SourceReader(source, on_bytes)
        for document in reader:
            ids.append(int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=8).digest(), "little"))
            if document.domain not in names and len(names) == _MOST_DOMAINS:
                raise DataError(
                    f"{source.path}: more than {_MOST_DOMAINS:,} domains; name one with DOMAIN={source.path}"
                )
            result.characters += len(document.text)
            codes.append(names.setdefault(document.domain, len(names)))
            draw, digest = rule.draw(document.text.encode())
            split = POOL
            if draw < rule.validation_fraction:
                split = VALIDATION
            elif draw < rule.validation_fraction + rule.proxy_fraction:
                if rule.wanted and document.domain not in rule.wanted:
                    unwanted.add(digest)
                else:
                    proxies.append((len(splits), digest))
                    split = PROXY
            splits.append(split)
        result.sources.append(SourceTotals(source.name, reader.sha256, reader.bytes, reader.documents, reader.empty))
    _refuse_same_ids(np.frombuffer(ids, dtype=np.uint64), sources)
    for index, digest in proxies:
        if digest in unwanted:
            splits[index] = POOL
    _check_domains(names, rule)
    result.domains = sorted(names)
    order = np.array([result.domains.index(name) for name in names], dtype=np.uint16)
    result.domain_codes = order[np.frombuffer(codes, dtype=np.uint16)]
    result.split_codes = np.frombuffer(bytes(splits), dtype=np.uint8)
    pool, proxy = ((result.split_codes == code).sum() for code in (POOL, PROXY))
    if not pool:
        raise DataError(
            f"none of the {len(splits):,} documents is in the pool; add documents, or lower the proxy and validation "
            "fractions"
        )
    if proxy > pool:
        raise DataError(
            f"a proxy of {proxy:,} documents is larger than the pool of {pool:,} that it is to guide; lower the proxy "
            "fraction"
        )
    return result


def _refuse_same_ids(digests: np.ndarray, sources: Sequence[Source]) -> None:
    """Raise if an id is used twice.

    Digests (D,), 8 bytes an id, are all that is kept while reading; where two are equal, the sources are read again.
    """
    ordered = np.sort(digests)
    doubtful = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not doubtful:
        return
    places: dict[str, tuple[Source, int]] = {}
    read = (document for source in sources for document in _with_source(source))
    for (source, document), digest in zip(read, digests.tolist(), strict=False):
        if digest not in doubtful:
            continue
        if document.id in places:
            earlier, line = places[document.id]
            raise DataError(
                f"{_place(source, document.line)}: id {document.id!r} was already used at {_place(earlier, line)}; make"
                " ids unique, or leave the field out"
            )
        places[document.id] = source, document.line


def _with_source(source: Source) -> Iterator[tuple[Source, Document]]:
    """Each document with its source."""
    for document in SourceReader(source):
        yield source, document


def _place(source: Source, line: int) -> str:
    return f"{source.path} {source.unit} {line}" if line else str(source.path)


def _check_domains(names: dict[str, int], rule: SplitRule) -> None:
    missing = [name for name in rule.wanted if name not in names]
    if missing:
        raise DataError(
            f"wanted domain {missing[0]!r}: no document has it; the sources have: {', '.join(sorted(names))}"
        )
