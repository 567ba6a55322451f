"""Does what is to be done with a piece of the sources: count lines, read and check, tokenise. For tasks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaopus.corpus_tools.encode import Chunk, Entry, chunk_files, write_entries
from megaopus.corpus_tools.pieces import Piece
from megaopus.corpus_tools.readers.stored import unreadable
from megaopus.corpus_tools.reading import Reading
from megaopus.corpus_tools.remote import opened
from megaopus.corpus_tools.sources import Source, SourceReader, mark_of, reader_of
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.corpus_tools.tally import SourceTotals, Tally, id_hash
from megaopus.data.tokenizer import load_tokenizer
from megaopus.errors import DataError
from megaopus.fs import write_whole


@dataclass(frozen=True)
class Sought:
    """Holds what all work on pieces needs: the sources, their pieces, and where results lie."""

    folder: Path
    sources: Sequence[Source]
    pieces: Sequence[Piece]

    def reader(self, number: int) -> SourceReader:
        """Read a piece."""
        piece = self.pieces[number]
        return SourceReader(self.sources[piece.source], stretches=piece.stretches)


@dataclass(frozen=True)
class CountLines:
    """Counts the lines of parts of files, so that the later parts' lines have the numbers they have in the file."""

    sought: Sought
    name: str = "counting lines"

    def numbers(self) -> Sequence[int]:
        """Those whose number of lines somebody needs."""
        return [number for number, piece in enumerate(self.sought.pieces) if piece.uncounted]

    def _result(self, number: int) -> Path:
        return self.sought.folder / f"lines-{number:06d}.json"

    def done(self, number: int) -> bool:
        """Tell whether the count is there."""
        return self._result(number).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Count."""
        ((_, path, part),) = self.sought.pieces[number].stretches
        count = reader_of(path).count
        assert count is not None
        assert part is not None
        try:
            lines = count(path, part)
        except OSError as error:
            raise unreadable(path, error) from error
        write_whole(self._result(number), json.dumps(lines))
        return {"lines": lines}

    def counted(self) -> list[Piece]:
        """Return all pieces, with the lines before each."""
        found, before, last = [], 0, None
        for number, piece in enumerate(self.sought.pieces):
            if piece.uncounted:
                path = piece.stretches[0].path
                before = before if path == last else 0
                found.append(piece.after(before))
                before, last = before + json.loads(self._result(number).read_text()), path
            else:
                found.append(piece)
        return found


def save_reading(folder: Path, reading: Reading) -> None:
    """Write what a reading leaves out and cuts, for tasks to look their places up in."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "repeated.npy", np.array(sorted(reading.repeated), dtype=np.int64))
    np.save(folder / "watched.npy", np.array(sorted(reading.watched), dtype=np.int64))
    np.save(folder / "copies.npy", np.frombuffer(reading.copies, np.uint8))
    write_whole(folder / "pieces.json", json.dumps(reading.pieces))


def load_reading(folder: Path | None, first: int, end: int) -> Reading:
    """Return what was written about the places from ``first`` to before ``end``, counted from 0. None: nothing."""
    if folder is None:
        return Reading()
    repeated, watched, copies = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("repeated", "watched", "copies")
    )
    inside = [set((each[slice(*np.searchsorted(each, (first, end)))] - first).tolist()) for each in (repeated, watched)]
    pieces = json.loads((folder / "pieces.json").read_text(encoding="utf-8"))
    return Reading(inside[0], pieces, copies[first:end].tobytes(), frozenset(inside[1]))


@dataclass(frozen=True)
class ReadPieces:
    """Reads and checks pieces, and hashes whole sources."""

    sought: Sought
    name: str
    rule: SplitRule
    texts: bool
    """Whether to keep what tells texts apart."""
    round: int = 0
    """Counts how often the sources were read before."""
    only: tuple[int, ...] | None = None
    """Pieces that this round reads; None: all, and the digests."""
    reading: Path | None = None
    """What ``save_reading`` wrote."""
    places: tuple[int, ...] = ()
    """Of the first document of each piece, and the number of all documents; empty where there is no ``reading``."""

    def numbers(self) -> Sequence[int]:
        """Sources' digests first, for they may take longest: numbered behind the pieces."""
        count = len(self.sought.pieces)
        if self.only is not None:
            return self.only
        hashed = [count + n for n, source in enumerate(self.sought.sources) if hashed_whole(source)]
        return [*hashed, *range(count)]

    def result(self, number: int) -> Path:
        """Name the file of a unit's results."""
        return self.sought.folder / f"read-{self.round}-{number:06d}.npz"

    def digest(self, source: int) -> str:
        """Return the digest of a whole source, which is done."""
        return json.loads(self._digest(source).read_text())

    def _digest(self, source: int) -> Path:
        return self.sought.folder / f"digest-{source:06d}.json"

    def done(self, number: int) -> bool:
        """Tell whether it is read, or hashed."""
        count = len(self.sought.pieces)
        return (self.result(number) if number < count else self._digest(number - count)).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Read, or hash."""
        if number >= len(self.sought.pieces):
            return self._hash(number - len(self.sought.pieces))
        piece, reader = self.sought.pieces[number], self.sought.reader(number)
        first, end = self.places[number : number + 2] if self.places else (0, 0)
        reading, seen = load_reading(self.reading, first, end), Tally(texts=self.texts)
        for document in reading.taken(reader, 0):
            seen.take(document, self.sought.sources[piece.source], self.rule)
        seen.totals.append(SourceTotals.of(reader, reader.taken))
        broken = [str(path) for path in reader.broken]
        found = [[first + place, *what] for place, what in reading.found.items()]
        seen.save(self.result(number), {"broken": broken, "found": found, "read": reader.documents})
        return {"documents": reader.taken, "characters": seen.characters, "bytes": reader.bytes}

    def _hash(self, number: int) -> Mapping[str, int]:
        """Hash a source as a reader that reads all of it does."""
        source, digest, total = self.sought.sources[number], hashlib.sha256(), 0
        for name, path in source.files():
            digest.update(mark_of(source, name))
            try:
                with opened(path) as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
                        total += len(block)
            except OSError as error:
                raise unreadable(path, error) from error
        write_whole(self._digest(number), json.dumps(digest.hexdigest()))
        return {"bytes hashed": total}


@dataclass(frozen=True)
class FindIds:
    """Finds the documents whose ids have one of some hashes."""

    sought: Sought
    only: tuple[int, ...]
    """Pieces that have such."""
    name: str = "comparing ids"

    def numbers(self) -> Sequence[int]:
        """Return ``only``."""
        return self.only

    @property
    def hashes(self) -> Path:
        """Name the file of the hashes."""
        return self.sought.folder / "doubtful.npy"

    def result(self, number: int) -> Path:
        """Name the file of a piece's results: place in the piece, id and line of each."""
        return self.sought.folder / f"ids-{number:06d}.json"

    def done(self, number: int) -> bool:
        """Tell whether it is there."""
        return self.result(number).is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Read the piece again."""
        doubtful, found = set(np.load(self.hashes).tolist()), []
        for place, document in enumerate(self.sought.reader(number)):
            if id_hash(document.id) in doubtful:
                found.append([place, document.id, document.line])
        write_whole(self.result(number), json.dumps(found))
        return {"documents": len(found)}


@dataclass(frozen=True)
class EncodePieces:
    """Tokenises pieces."""

    sought: Sought
    reading: Path
    """What ``save_reading`` wrote."""
    places: tuple[int, ...]
    """Of the first document of each piece as it is read, and the number of all."""
    starts: tuple[int, ...]
    """The same of documents of the corpus: what is left out is no document, and what is cut is several."""
    digests: tuple[str, ...]
    """Of each piece, as it was when it was read first."""
    tokenizer: Path
    eod: int
    dtype: str
    alone: bool
    """Whether all cores are for this task."""
    name: str = "encoding"

    def numbers(self) -> Sequence[int]:
        """Those that have documents."""
        return [n for n in range(len(self.sought.pieces)) if self.starts[n] < self.starts[n + 1]]

    def files(self, number: int) -> Chunk:
        """Name the files of a piece."""
        return chunk_files(self.sought.folder, number)

    @property
    def splits(self) -> Path:
        """Name the file of each document's split."""
        return self.sought.folder / "splits.npy"

    def done(self, number: int) -> bool:
        """Tell whether the files are there, of which the rows are written last."""
        return self.files(number).rows.is_file()

    def work(self, number: int) -> Mapping[str, int]:
        """Tokenise a piece. Raises DataError if it is not what it was when it was checked."""
        piece, reader = self.sought.pieces[number], self.sought.reader(number)
        source = self.sought.sources[piece.source]
        reading = load_reading(self.reading, *self.places[number : number + 2])
        start, end = self.starts[number : number + 2]
        splits = np.load(self.splits, mmap_mode="r")[start:end].tolist()
        fields = source.fields
        masked = fields.loss_spans is not None or fields.messages is not None

        def entries() -> Iterator[Entry]:
            count = 0
            for document in reading.taken(reader, 0):
                if count == len(splits):
                    raise changed(source)
                yield Entry(start + count, piece.source, splits[count], document)
                count += 1
            if reader.sha256 != self.digests[number] or count != len(splits):
                raise changed(source)

        if not self.alone:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = load_tokenizer(self.tokenizer)
        return {"tokens": write_entries(entries(), masked, self.files(number), tokenizer, self.eod, self.dtype)}


def hashed_whole(source: Source) -> bool:
    """Tell whether the digest of a source is that of all its bytes; in a store it is of the list of its objects."""
    return source.by_prefix is None and not source.remote


def changed(source: Source) -> DataError:
    """The error of a source that is another one than at first."""
    return DataError(f"{source.path}: changed while it was being read; leave it alone and prepare again")
