"""Prepares by tasks over pieces of the sources: what each gives is put together here, in the sources' order.

So the corpus is the one that a single process makes, whoever does the tasks and however many there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megaopus.corpus_tools.encode import Chunk
from megaopus.corpus_tools.piece_work import (
    CountLines,
    EncodePieces,
    FindIds,
    ReadPieces,
    Sought,
    changed,
    hashed_whole,
    save_reading,
)
from megaopus.corpus_tools.pieces import Piece, pieces_of
from megaopus.corpus_tools.reading import Reading
from megaopus.corpus_tools.sources import Source, no_documents
from megaopus.corpus_tools.split import Scan
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.corpus_tools.tally import SourceTotals, Tally
from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.corpus_tools.tasks.stages import run_stage
from megaopus.corpus_tools.tasks.units import Units
from megaopus.corpus_tools.tasks.workers import Workers
from megaopus.corpus_tools.text_loss import SAMPLED_DOMAINS
from megaopus.data.folder import StoppedError
from megaopus.errors import DataError

Begin = Callable[[str, int], Callable[[int], None]]
"""(name, pieces) -> what is told of pieces that are done."""


def piece_folder(work: Path, plan: str, pieces: Sequence[Piece]) -> Path:
    """Name the folder of the tasks' files, another for each plan: jobs of an earlier one may still run somewhere."""
    digest = hashlib.sha256(json.dumps([plan, [str(piece) for piece in pieces]]).encode()).hexdigest()[:12]
    return work.absolute() / f"pieces-{digest}"


@dataclass
class TaskReadings:
    """Reads all sources by tasks."""

    sources: Sequence[Source]
    rule: SplitRule
    executor: Executor
    workers: Workers
    work: Path
    plan: str
    begin: Begin
    texts: bool = False
    """Whether to keep what tells texts apart."""
    sought: Sought = field(init=False)
    _rounds: int = 0
    _results: list[Path | None] = field(default_factory=list)
    """Of each piece, the file of its last reading; None: it is left aside."""
    _read: list[int] = field(default_factory=list)
    """Documents of each piece before any is left out."""

    def __post_init__(self) -> None:
        pieces = pieces_of(self.sources)
        self.sought = Sought(piece_folder(self.work, self.plan, pieces), self.sources, pieces)
        self.sought.folder.mkdir(parents=True, exist_ok=True)
        count = CountLines(self.sought)
        if count.numbers():
            self._run(count)
            self.sought = replace(self.sought, pieces=count.counted())

    def _run(self, units: Units) -> None:
        folder = self.sought.folder / f"tasks-{units.name.replace(' ', '-').replace(',', '')}"
        run_stage(units, folder, self.executor, self.workers, self.begin(units.name, len(units.numbers())))

    def read(self, name: str, reading: Reading) -> Tally:
        """Read everything once; after the first time, the pieces of which another reading gives something else."""
        if self._rounds == 0:
            units = ReadPieces(self.sought, name, self.rule, self.texts)
        else:
            path = self.sought.folder / f"reading-{self._rounds}"
            save_reading(path, reading)
            places = tuple(np.cumsum([0, *self._read]).tolist())
            only = tuple(self._concerned(reading, places))
            units = ReadPieces(self.sought, name, self.rule, self.texts, self._rounds, only, path, places)
        try:
            self._run(units)
        except StoppedError:
            raise
        except DataError:
            self._refuse_empty(units)
            raise
        return self._merged(units, reading)

    def _concerned(self, reading: Reading, places: Sequence[int]) -> Iterator[int]:
        """Pieces in which ``reading`` leaves out, watches or cuts something."""
        for number, path in enumerate(self._results):
            if path is None:
                continue
            first, end = places[number : number + 2]
            inside = reading.of_places(first, end)
            cut = not reading.pieces.keys().isdisjoint(_meta(path)["names"])
            if cut or inside.repeated or inside.watched or any(inside.copies):
                yield number

    def _refuse_empty(self, units: ReadPieces) -> None:
        """Raise DataError for a source without documents that comes before the piece that has a fault."""
        done = 0
        while done < len(self.sought.pieces) and units.done(done):
            done += 1
        results = [units.result(number) for number in range(done)]
        totals = self._totals(results)[:-1]  # the last may go on
        for number, (each, read) in enumerate(zip(totals, self._counts(results), strict=False)):
            _refuse_nothing(self.sources[number], each, read)

    def _counts(self, results: Sequence[Path | None]) -> list[int]:
        """Count the documents that were read of each source, those that are left out too."""
        counts = [0] * len(self.sources)
        for piece, path in zip(self.sought.pieces, results, strict=False):
            counts[piece.source] += 0 if path is None else _meta(path)["facts"]["read"]
        return counts

    def _merged(self, units: ReadPieces, reading: Reading) -> Tally:
        """Put the pieces together, those that this round did not read as they were before."""
        if self._rounds == 0:
            self._results = [units.result(number) for number in range(len(self.sought.pieces))]
            self._leave_broken()
        else:
            for number in units.only or ():
                self._replace(number, units.result(number))
        seen = Tally(SAMPLED_DOMAINS, self.texts)
        self._read = []
        for piece, path in zip(self.sought.pieces, self._results, strict=True):
            if path is None:
                self._read.append(0)
                continue
            tally, facts = Tally.load(path)
            seen.extend(tally, self.sources[piece.source])
            self._read.append(facts["read"])
            reading.found |= {place: (identity, at) for place, identity, at in facts["found"]}
        seen.totals = self._totals(self._results)
        for number, (source, read) in enumerate(zip(self.sources, self._counts(self._results), strict=True)):
            _refuse_nothing(source, seen.totals[number], read)
            if hashed_whole(source):
                seen.totals[number].sha256 = units.digest(number)
            elif source.remote:
                seen.totals[number].sha256 = ""  # nobody has read all of it; its pieces have digests
        self._rounds += 1
        return seen

    def _replace(self, number: int, path: Path) -> None:
        """Take a piece's newer results. Raises DataError if it was read from something else."""
        earlier = self._results[number]
        assert earlier is not None
        before, now = ((meta["totals"][0]["sha256"], meta["facts"]["read"]) for meta in (_meta(earlier), _meta(path)))
        if before != now:
            raise changed(self.sources[self.sought.pieces[number].source])
        self._results[number] = path

    def _leave_broken(self) -> None:
        """Leave aside what comes after the place from which on a file cannot be read."""
        broken: set[str] = set()
        for number, (piece, path) in enumerate(zip(self.sought.pieces, self._results, strict=True)):
            assert path is not None
            if piece.stretches and piece.stretches[0].part is not None and str(piece.stretches[0].path) in broken:
                self._results[number] = None
            else:
                broken |= set(_meta(path)["facts"]["broken"])

    def _totals(self, results: Sequence[Path | None]) -> list[SourceTotals]:
        """Add up what was read of each source, of the pieces that ``results`` begin with."""
        found: list[SourceTotals] = []
        for piece, path in zip(self.sought.pieces, results, strict=False):
            if len(found) == piece.source:
                source = self.sources[piece.source]
                chosen = source.chosen_files()
                found.append(SourceTotals(source.name, "", 0, 0, 0, len(chosen.taken), dict(chosen.skipped)))
            if path is not None:
                totals = SourceTotals(**_meta(path)["totals"][0])
                found[-1].sha256 = totals.sha256
                found[-1].add(totals)
        return found

    def suspects(self, hashes: np.ndarray) -> Iterator[tuple[int, int, str, int]]:
        """Read the pieces again that have documents with such ids."""
        only = []
        for number, path in enumerate(self._results):
            if path is not None:
                with np.load(path) as held:
                    if np.isin(held["ids"], hashes).any():
                        only.append(number)
        units = FindIds(self.sought, tuple(only))
        np.save(units.hashes, hashes)
        self._run(units)
        places = np.cumsum([0, *self._read]).tolist()
        for number in only:
            for place, identity, line in json.loads(units.result(number).read_text(encoding="utf-8")):
                yield places[number] + place, self.sought.pieces[number].source, identity, line

    def near_copies(self, reading: Reading, places: int) -> np.ndarray:
        """Compare documents by MinHash, with datatrove's steps."""
        from megaopus.corpus_tools.minhash import ClusterPairs, PairBuckets, SignPieces, first_alike

        path = self.sought.folder / "reading-compared"
        save_reading(path, reading)
        starts = tuple(np.cumsum([0, *self._read]).tolist())
        left = tuple(number for number, each in enumerate(self._results) if each is not None)
        sign = SignPieces(self.sought, path, starts, left)
        for units in (sign, PairBuckets(sign.folder), ClusterPairs(sign.folder)):
            self._run(units)
        kept = np.ones(places, dtype=bool)
        kept[sorted(reading.repeated)] = False
        if reading.copies:
            kept &= np.frombuffer(reading.copies, np.uint8) == 0
        return first_alike(sign.folder, starts, kept)

    def encode(self, scanned: Scan, tokenizer: Path, eod: int, dtype: str) -> list[Chunk]:
        """Tokenise by tasks. Returns the files, in order."""
        reading = self.sought.folder / "reading-encoded"
        save_reading(reading, scanned.reading)
        counts, digests = [], []
        for path in self._results:
            counts.append(0 if path is None else _documents(path))
            digests.append("" if path is None else _meta(path)["totals"][0]["sha256"])
        units = EncodePieces(
            self.sought,
            reading,
            tuple(np.cumsum([0, *self._read]).tolist()),
            tuple(np.cumsum([0, *counts]).tolist()),
            tuple(digests),
            tokenizer.absolute(),
            eod,
            dtype,
            self.executor.alone,
        )
        np.save(units.splits, scanned.split_codes)
        self._run(units)
        return [units.files(number) for number in units.numbers()]


def _refuse_nothing(source: Source, totals: SourceTotals, read: int) -> None:
    """Raise DataError if nothing was read of a source."""
    if not read:
        raise no_documents(source, totals.empty, {why: each["count"] for why, each in totals.left_out.items()})


def _meta(path: Path) -> dict[str, Any]:
    """Return what a tally's file tells beside its arrays."""
    with np.load(path) as held:
        return json.loads(held["meta"].tobytes())


def _documents(path: Path) -> int:
    """Count the documents of a tally's file."""
    with np.load(path) as held:
        return len(held["splits"])
