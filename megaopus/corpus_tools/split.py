"""First pass over the sources: check every document, and decide which split each belongs to."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.corpus_tools.floors import Documents, Filled, fill
from megaopus.corpus_tools.readers.stored import FaultyError
from megaopus.corpus_tools.reading import REPEATED, Reading, place_of
from megaopus.corpus_tools.sources import Document, Source, SourceReader
from megaopus.corpus_tools.split_rule import POOL, PROXY, VALIDATION, SplitRule
from megaopus.corpus_tools.text_loss import Sample
from megaopus.data.corpus import SPLITS
from megaopus.errors import DataError

_MOST_DOMAINS = 1 << 16
_NAMED_IN_A_NOTE = 5


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
        )


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
    reading: Reading = field(default_factory=Reading)
    """Says what every further pass does with the documents."""
    sample: dict[str, list[str]] = field(default_factory=dict)
    """Domain -> beginnings of some of its documents."""
    notes: list[str] = field(default_factory=list)
    """Says in words what the splits have that nobody asked for."""

    def save(self, path: Path) -> None:
        """Write it; it appears under ``path`` when it is whole."""
        partial = path.with_name(f"{path.name}.partial")
        meta = {
            "domains": self.domains,
            "characters": self.characters,
            "sources": [asdict(s) for s in self.sources],
            "pieces": self.reading.pieces,
            "sample": self.sample,
            "notes": self.notes,
        }
        repeated, codes = np.array(sorted(self.reading.repeated), dtype=np.int64), self.domain_codes
        with partial.open("wb") as stream:
            np.savez(stream, meta=json.dumps(meta), domain_codes=codes, split_codes=self.split_codes, repeated=repeated)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Scan:
        """Return what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as held:
            meta = json.loads(str(held["meta"]))
            codes = held["domain_codes"], held["split_codes"]
            reading = Reading(set(held["repeated"].tolist()), meta["pieces"])
        totals = [SourceTotals(**each) for each in meta["sources"]]
        return cls(meta["domains"], *codes, totals, meta["characters"], reading, meta["sample"], meta["notes"])


def scan(sources: Sequence[Source], rule: SplitRule, begin: Callable[[str], Callable[[int], None]]) -> Scan:
    """Read everything and split it: once, and again without repeated ids or with long documents cut, if there are such.

    Documents with the same text always share a split. A text drawn for the proxy that also occurs in an unwanted
    domain stays in the pool, so that no proxy text is ever trained on. ``begin(name)`` starts a line of progress.

    Raises:
        DataError: a broken source, an id given twice, an unknown wanted domain, or a split without documents.
    """
    reading = Reading()
    seen = _Pass(sources, rule, reading, begin("reading"))
    reading.repeated = _repeated_ids(np.frombuffer(seen.ids, dtype=np.uint64), sources)
    if reading.repeated:
        seen = _Pass(sources, rule, reading, begin("reading, each id once"))
    filled = fill(seen.documents(), seen.names, rule, may_cut=True)
    if filled.pieces:
        reading.pieces = {seen.names[code]: size for code, size in filled.pieces.items()}
        seen = _Pass(sources, rule, reading, begin("reading in pieces"))
        filled = fill(seen.documents(), seen.names, rule, may_cut=False)
    splits = filled.splits
    refuse_missing_splits(splits, rule)
    domains = sorted(seen.names)
    order = np.array([domains.index(name) for name in seen.names], dtype=np.uint16)
    notes = [*_cut_notes(reading.pieces), *_moved_notes(filled, seen, rule), *_lacking_notes(splits, seen, rule)]
    codes = order[np.frombuffer(seen.codes, dtype=np.uint16)]
    return Scan(domains, codes, splits, seen.totals, seen.characters, reading, seen.sample.texts(), notes)


class _Pass:
    """Reads all documents once and sends each where its hash says."""

    def __init__(
        self, sources: Sequence[Source], rule: SplitRule, reading: Reading, on_bytes: Callable[[int], None]
    ) -> None:
        self._by_name: dict[str, int] = {}
        self.codes, self.sizes, self.draws, self.ids = array("H"), array("I"), array("I"), array("Q")
        self.totals: list[SourceTotals] = []
        self.characters = 0
        self.sample = Sample()
        self._splits = bytearray()
        self._proxies: list[tuple[int, bytes]] = []
        self._unwanted: set[bytes] = set()
        for number, document in reading.documents(sources, on_bytes, self._finished):
            if document.domain not in self._by_name and len(self._by_name) == _MOST_DOMAINS:
                path = sources[number].path
                raise DataError(f"{path}: more than {_MOST_DOMAINS:,} domains; name one with DOMAIN={path}")
            self._take(document, rule)
        for index, digest in self._proxies:
            if digest in self._unwanted:
                self._splits[index] = POOL
        if missing := [name for name in rule.wanted if name not in self._by_name]:
            known = ", ".join(sorted(self._by_name))
            raise DataError(f"wanted domain {missing[0]!r}: no document has it; the sources have: {known}")

    @property
    def names(self) -> list[str]:
        """Of the domains, in the order of ``codes``."""
        return list(self._by_name)

    def _finished(self, number: int, reader: SourceReader, documents: int) -> None:
        self.totals.append(SourceTotals.of(reader, documents))

    def _take(self, document: Document, rule: SplitRule) -> None:
        """Enter one document."""
        self.ids.append(int.from_bytes(hashlib.blake2b(document.id.encode(), digest_size=8).digest(), "little"))
        self.characters += len(document.text)
        self.codes.append(self._by_name.setdefault(document.domain, len(self._by_name)))
        draw, digest = rule.draw(document.text.encode())
        self.draws.append(int(draw * 2**32))
        self.sizes.append(min(len(document.text), 2**32 - 1))
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

    def documents(self) -> Documents:
        """Describe what was read."""
        splits = np.frombuffer(bytes(self._splits), dtype=np.uint8)
        codes, sizes, draws = (
            np.frombuffer(each, dtype=each.typecode) for each in (self.codes, self.sizes, self.draws)
        )
        return Documents(codes, splits, draws, sizes)


def refuse_missing_splits(splits: np.ndarray, rule: SplitRule) -> None:
    """Raise DataError unless every split that is asked for has documents, and the pool more than the proxy."""
    counts = np.bincount(splits, minlength=len(SPLITS)).tolist()
    if not counts[POOL]:
        raise DataError(
            f"none of the {len(splits):,} documents is in the pool; add documents, or lower the proxy and validation "
            "fractions"
        )
    for split, asked in ((VALIDATION, rule.validation_fraction), (PROXY, rule.proxy_fraction)):
        if asked and not counts[split]:
            name = SPLITS[split]
            raise DataError(
                f"none of the {len(splits):,} documents can be held out for the split {name}, so that no run would"
                " accept the corpus: there is too little text, or always the same; add text, or give"
                f" --{name}-fraction 0 and runs another corpus (data.{name}_path)"
            )
    if counts[PROXY] > counts[POOL]:
        raise DataError(
            f"a proxy of {counts[PROXY]:,} documents is larger than the pool of {counts[POOL]:,} that it is to guide;"
            " lower the proxy fraction"
        )


def _repeated_ids(digests: np.ndarray, sources: Sequence[Source]) -> set[int]:
    """Places of documents whose id an earlier one has; raises DataError unless their source skips what is faulty.

    Digests (D,), 8 bytes an id, are all that is kept while reading; where two are equal, the sources are read again.
    """
    ordered = np.sort(digests)
    doubtful = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    repeated: set[int] = set()
    if not doubtful:
        return repeated
    places: dict[str, tuple[Source, int]] = {}
    read = (document for source in sources for document in _with_source(source))
    for place, ((source, document), digest) in enumerate(zip(read, digests.tolist(), strict=False)):
        if digest not in doubtful:
            continue
        if document.id not in places:
            places[document.id] = source, document.line
        elif source.skip_faulty:
            repeated.add(place)
        else:
            where, earlier = place_of(source, document.line), place_of(*places[document.id])
            message = (
                f"{where}: id {document.id!r} was already used at {earlier}; make ids unique, or leave the field out"
            )
            raise FaultyError(REPEATED, message)
    return repeated


def _with_source(source: Source) -> Iterator[tuple[Source, Document]]:
    """Each document with its source."""
    for document in SourceReader(source):
        yield source, document


def _cut_notes(pieces: Mapping[str, int]) -> list[str]:
    return [
        f"domain {name}: long documents are cut into pieces of about {size:,} characters (ids ID#1, ID#2, ...), because"
        " whole ones cannot be split"
        for name, size in pieces.items()
    ]


def _moved_notes(filled: Filled, seen: _Pass, rule: SplitRule) -> list[str]:
    """Say which splits got more than the fraction asked for."""
    sizes, notes = seen.documents().sizes, []
    for split, fraction in ((VALIDATION, rule.validation_fraction), (PROXY, rule.proxy_fraction)):
        if moved := filled.moved.get(split):
            share = sizes[filled.splits == split].sum() / sizes.sum()
            notes.append(
                f"{SPLITS[split]}: {moved:,} documents more than the hash gave it, so that it holds a sequence of"
                f" {rule.seq_len} tokens; it has {share:.1%} of the text ({fraction:.1%} of the documents asked for)"
            )
    return notes


def _lacking_notes(splits: np.ndarray, seen: _Pass, rule: SplitRule) -> list[str]:
    """Name the domains that give a split nothing though they should."""
    codes, notes = seen.documents().domains, []
    for split, fraction in ((VALIDATION, rule.validation_fraction), (PROXY, rule.proxy_fraction)):
        has = np.bincount(codes[splits == split], minlength=len(seen.names))
        givers = rule.wanted if split == PROXY and rule.wanted else seen.names
        lacking = [name for name, count in zip(seen.names, has.tolist(), strict=True) if not count and name in givers]
        if fraction and lacking:
            more = f" and {len(lacking) - _NAMED_IN_A_NOTE} more" if len(lacking) > _NAMED_IN_A_NOTE else ""
            notes.append(f"{SPLITS[split]}: nothing of {', '.join(lacking[:_NAMED_IN_A_NOTE])}{more} (too little text)")
    return notes
