"""First pass over the sources: check every document, and decide which split each belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megaopus.corpus_tools.copies import EXACT, Copies, exact_copies
from megaopus.corpus_tools.floors import Filled, fill
from megaopus.corpus_tools.readers.stored import FaultyError
from megaopus.corpus_tools.reading import REPEATED, Reading, place_of
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.corpus_tools.split_rule import POOL, PROXY, VALIDATION, SplitRule
from megaopus.corpus_tools.tally import SourceTotals, Tally, id_hash
from megaopus.corpus_tools.text_loss import SAMPLED_DOMAINS
from megaopus.data.corpus import SPLITS
from megaopus.errors import DataError

_NAMED_IN_A_NOTE = 5


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
    duplicates: dict[str, Any] | None = None
    """Tells what was left out as copies, for the manifest; None: copies were not looked for."""

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
            "duplicates": self.duplicates,
        }
        arrays: dict[str, Any] = {
            "domain_codes": self.domain_codes,
            "split_codes": self.split_codes,
            "repeated": np.array(sorted(self.reading.repeated), dtype=np.int64),
            "copies": np.frombuffer(self.reading.copies, np.uint8),
        }
        with partial.open("wb") as stream:
            np.savez(stream, meta=json.dumps(meta), **arrays)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Scan:
        """Return what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as held:
            meta = json.loads(str(held["meta"]))
            codes = held["domain_codes"], held["split_codes"]
            reading = Reading(set(held["repeated"].tolist()), meta["pieces"], held["copies"].tobytes())
        totals = [SourceTotals(**each) for each in meta["sources"]]
        told = meta["sample"], meta["notes"], meta["duplicates"]
        return cls(meta["domains"], *codes, totals, meta["characters"], reading, *told)


class Readings(Protocol):
    """Reads all sources, in this process or by tasks elsewhere."""

    def read(self, name: str, reading: Reading) -> Tally:
        """Read everything once, in a line of progress of this name. Raises DataError for a fault of a source."""

    def suspects(self, hashes: np.ndarray) -> Iterator[tuple[int, int, str, int]]:
        """(place, number of its source, id, line) of each document whose id has one of the ``hashes`` (sorted)."""

    def near_copies(self, reading: Reading, places: int) -> np.ndarray:
        """(``places``,) int64: the place of the first document that is nearly the same as each; else its own."""


@dataclass(frozen=True, slots=True)
class HereReadings:
    """Reads in this process."""

    sources: Sequence[Source]
    rule: SplitRule
    begin: Callable[[str], Callable[[int], None]]
    """Starts a line of progress, in bytes."""
    texts: bool
    """Whether to keep what tells texts apart."""

    def read(self, name: str, reading: Reading) -> Tally:
        """Read everything once. Raises DataError for a fault of a source."""
        seen = Tally(SAMPLED_DOMAINS, self.texts)

        def finished(number: int, reader: SourceReader, documents: int) -> None:
            seen.totals.append(SourceTotals.of(reader, documents))

        for number, document in reading.documents(self.sources, self.begin(name), finished):
            seen.take(document, self.sources[number], self.rule)
        return seen

    def suspects(self, hashes: np.ndarray) -> Iterator[tuple[int, int, str, int]]:
        """Read everything again for these."""
        doubtful, place = set(hashes.tolist()), 0
        for number, source in enumerate(self.sources):
            for document in SourceReader(source):
                if id_hash(document.id) in doubtful:
                    yield place, number, document.id, document.line
                place += 1

    def near_copies(self, reading: Reading, places: int) -> np.ndarray:
        """Raise: that is work for tasks."""
        raise DataError("--dedup minhash: compared by tasks; add --executor local, or give --dedup exact")


def scan(sources: Sequence[Source], rule: SplitRule, readings: Readings, dedup: str | None = None) -> Scan:
    """Read everything and split it: once, and again without repeated ids and copies, or with long documents cut.

    Documents with the same text always share a split. A text drawn for the proxy that also occurs in an unwanted
    domain stays in the pool, so that no proxy text is ever trained on.

    Args:
        sources: what ``readings`` reads.
        rule: how documents are split.
        readings: who reads.
        dedup: which copies are left out, of ``COPIES``; None: none are.

    Raises:
        DataError: a broken source, an id given twice, an unknown wanted domain, or a split without documents.
    """
    reading, copies = Reading(), None
    seen = readings.read("reading", reading)
    seen.settle(rule)
    reading.repeated = _repeated_ids(np.frombuffer(seen.ids, dtype=np.uint64), sources, readings)
    if dedup is not None:
        copies = _copies(seen, reading, readings, dedup)
    if reading.repeated or reading.copies:
        seen = readings.read("reading, each id once" if copies is None else "reading without copies", reading)
        seen.settle(rule)
    filled = fill(seen.documents(), seen.names, rule, may_cut=True)
    duplicates = None if copies is None else copies.described(reading.found)
    if filled.pieces:
        reading.pieces = {seen.names[code]: size for code, size in filled.pieces.items()}
        seen = readings.read("reading in pieces", reading)
        seen.settle(rule)
        filled = fill(seen.documents(), seen.names, rule, may_cut=False)
    splits = filled.splits
    refuse_missing_splits(splits, rule)
    domains = sorted(seen.names)
    order = np.array([domains.index(name) for name in seen.names], dtype=np.uint16)
    notes = [*_cut_notes(reading.pieces), *_moved_notes(filled, seen, rule), *_lacking_notes(splits, seen, rule)]
    codes = order[np.frombuffer(seen.codes, dtype=np.uint16)]
    sample = seen.sample.texts()
    return Scan(domains, codes, splits, seen.totals, seen.characters, reading, sample, notes, duplicates)


def _copies(seen: Tally, reading: Reading, readings: Readings, dedup: str) -> Copies:
    """Find the documents that are copies of an earlier one, and let ``reading`` leave them out."""
    kept = np.ones(len(seen), dtype=bool)
    kept[sorted(reading.repeated)] = False
    copies = Copies(dedup, exact_copies(seen.documents().draws, np.frombuffer(seen.texts, np.uint64), kept))
    reading.copies = copies.mask()
    if dedup != EXACT:
        copies.join(readings.near_copies(reading, len(seen)))
        reading.copies = copies.mask()
    copies.count(seen.names, np.frombuffer(seen.codes, np.uint16))
    reading.watched = copies.examples()
    return copies


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


def _repeated_ids(hashes: np.ndarray, sources: Sequence[Source], readings: Readings) -> set[int]:
    """Places of documents whose id an earlier one has; raises DataError unless their source skips what is faulty.

    Hashes (D,), 8 bytes an id, are all that is kept while reading; where two are equal, the sources are read again.
    """
    ordered = np.sort(hashes)
    doubtful = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    repeated: set[int] = set()
    places: dict[str, tuple[Source, int]] = {}
    for place, number, identity, line in readings.suspects(doubtful) if len(doubtful) else ():
        source = sources[number]
        if identity not in places:
            places[identity] = source, line
        elif source.skip_faulty:
            repeated.add(place)
        else:
            where, earlier = place_of(source, line), place_of(*places[identity])
            message = f"{where}: id {identity!r} was already used at {earlier}; make ids unique, or leave the field out"
            raise FaultyError(REPEATED, message)
    return repeated


def _cut_notes(pieces: Mapping[str, int]) -> list[str]:
    return [
        f"domain {name}: long documents are cut into pieces of about {size:,} characters (ids ID#1, ID#2, ...), because"
        " whole ones cannot be split"
        for name, size in pieces.items()
    ]


def _moved_notes(filled: Filled, seen: Tally, rule: SplitRule) -> list[str]:
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


def _lacking_notes(splits: np.ndarray, seen: Tally, rule: SplitRule) -> list[str]:
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
