"""Reads documents from files and from data sets of the hub, one at a time, every fault named by its place."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megaopus.corpus_tools.readers.registry import (
    PACKED,
    READERS,
    Reader,
    Row,
    endings,
    reader_of_file,
    reader_of_prefix,
)
from megaopus.corpus_tools.readers.stored import Stored, no_text_field
from megaopus.errors import DataError


class Document(NamedTuple):
    """One document as read from its source."""

    id: str
    domain: str
    text: str
    line: int
    """Line of its JSON-lines file, row of its table; 0 for a plain text file."""
    columns: Mapping[str, Any]
    """What was kept of its row, by name: numbers, text, true, false or None."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Says what a source's rows call things. Plain text files have none of it."""

    text: str = "text"
    id: str = "id"
    domain: str = "domain"
    keep: tuple[str, ...] = ()
    """Further fields that go into the document table, scores for example."""


@dataclass(frozen=True, slots=True)
class Source:
    """Names a file, a folder of text files (of tables, if it has any), or what a prefix such as ``hf:`` names.

    What can be read, the files of ``readers/`` say.
    """

    path: Path
    domain: str | None = None
    """Domain of every document; None: each row's own ``domain``, else the name of the file or folder."""
    fields: Fields = Fields()

    @classmethod
    def parse(cls, argument: str, fields: Fields = Fields()) -> Source:
        """Read ``PATH`` or ``DOMAIN=PATH``; a path with '=' before its first '/' needs the second form.

        A path may have the prefix of a reader: ``hf:NAME[:CONFIG[:SPLIT]]`` is a data set of the Hugging Face hub, or a
        folder of the form of one. Raises DataError for anything else.
        """
        domain, equals, path = argument.partition("=")
        if not equals or "/" in domain or reader_of_prefix(domain):
            domain, path = "", argument
        elif not domain or not path:
            raise DataError(f"--source {argument}: not understood; write PATH or DOMAIN=PATH")
        return cls(Path(path), domain or None, fields)

    @property
    def by_prefix(self) -> Reader | None:
        """The reader of what is no file; None: there are ``files``."""
        return reader_of_prefix(str(self.path))

    @property
    def name(self) -> str:
        """Return what is written of it, which does not depend on where it lies: of a file, its name without folders."""
        reader = self.by_prefix
        return self.path.resolve().name if reader is None else reader.name(str(self.path))

    @property
    def unit(self) -> str:
        """Return what its documents are numbered by in messages."""
        reader = self.by_prefix or reader_of_file(self.path)
        return "line" if reader is None else reader.unit

    @property
    def single_domain(self) -> str:
        """Domain of documents whose rows name none."""
        if self.domain:
            return self.domain
        if (reader := self.by_prefix) is not None:
            return reader.domain(str(self.path))
        return self.path.name if self.path.is_dir() else self.path.name.split(".")[0]

    def files(self) -> list[tuple[str, Path]]:
        """``(name, path)`` of each file, in the order they are read; none where a prefix names no file.

        Raises:
            DataError: the path does not exist, has an unknown ending, or is a folder without text files.
        """
        if self.by_prefix is not None:
            return []
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file or folder; check the path given as source")
        if self.path.is_dir():
            inside = [(path, reader_of_file(path)) for path in self.path.rglob("*") if path.is_file()]
            tables = [path for path, reader in inside if reader is not None and reader.rows is not None]
            found = tables or [path for path, reader in inside if reader is not None]
            names = sorted((path.relative_to(self.path).as_posix(), path) for path in found)
            if not names:
                texts = " or ".join(end for reader in READERS.values() if reader.text for end in reader.endings)
                raise DataError(f"{self.path}: no documents: the folder has no {texts} file, nor a table")
            return names
        if reader_of_file(self.path) is None:
            known = ", ".join([f"{', '.join(endings(packed=True))} ({', '.join(PACKED)})", *endings(packed=False)])
            raise DataError(f"{self.path}: unknown ending; a source is a folder of such files, or one of {known}")
        return [(self.name, self.path)]

    def size(self) -> int:
        """Bytes on disk, as stored (compressed or not)."""
        return sum(path.stat().st_size for _, path in self.files())


class SourceReader:
    """Iterates once over the documents of a source; the totals are those read so far."""

    def __init__(self, source: Source, on_bytes: Callable[[int], None] = lambda count: None):
        self.source = source
        self.bytes = 0
        self.documents = 0
        self.empty = 0
        """Documents left out because their text is empty or white space only."""
        self._digest = hashlib.sha256()
        self._report = on_bytes
        self._single_domain = source.single_domain  # looks at the disk

    @property
    def sha256(self) -> str:
        """Digest of the stored bytes read so far (for a folder: of each file's name and bytes in turn)."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order.

        Raises:
            DataError: unreadable file, bad gzip, bad UTF-8, bad JSON, bad field, or no documents at all.
        """
        for document in self._documents():
            if document.text.strip():
                self.documents += 1
                yield document
            else:
                self.empty += 1
        if not self.documents:
            left_out = f" ({self.empty} empty ones)" if self.empty else ""
            raise DataError(f"{self.source.path}: no documents in it{left_out}; drop this source or fill the file")

    def _documents(self) -> Iterator[Document]:
        source = self.source
        if (reader := source.by_prefix) is not None:
            yield from self._of_table(reader)
            return
        wanted = [source.fields.text, source.fields.id, source.fields.domain, *source.fields.keep]
        for name, path in source.files():
            if source.path.is_dir():
                self._digest.update(name.encode() + b"\0")
            stored = Stored(path, source.fields.text, wanted, self._take)
            file_reader = _reader(path)
            if file_reader.text is not None:
                domain = self._single_domain
                yield Document(f"{domain}/{name}", domain, file_reader.text(stored), 0, {})
            for row in file_reader.rows(stored) if file_reader.rows is not None else ():
                yield self._of_row(row, name)

    def _of_table(self, reader: Reader) -> Iterator[Document]:
        """Documents of what is no file: their contents are hashed."""
        assert reader.rows is not None
        for row in reader.rows(Stored(self.source.path, self.source.fields.text, None, self._take)):
            document = self._of_row(row, self.source.name)
            content = [document.id, document.domain, document.text, dict(document.columns)]
            self._take(memoryview(json.dumps(content).encode()))
            yield document

    def table(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, row) of each row as it stands. Raises DataError for what is not a table."""
        source = self.source
        found = [source.path] if source.by_prefix is not None else [path for _, path in source.files()]
        for path in found:
            reader = source.by_prefix or _reader(path)
            if reader.rows is None:
                raise DataError(f"{path}: not a table; use JSON lines, parquet or a data set of the hub")
            for row in reader.rows(Stored(path, source.fields.text, None, self._take)):
                yield row.place, row.values

    def _take(self, content: memoryview) -> None:
        """Hash and count stored bytes."""
        self._digest.update(content)
        self.bytes += len(content)
        self._report(len(content))

    def _of_row(self, row: Row, name: str) -> Document:
        fields, values, place = self.source.fields, row.values, row.place
        _checked(values, place, fields)
        domain = self.source.domain or _label(values, fields.domain, place) or self._single_domain
        identity = _label(values, fields.id, place) or f"{domain}/{name}:{row.number}"
        columns = {key: _column(values, key, place) for key in fields.keep}
        return Document(identity, domain, values[fields.text], row.number, columns)


def _reader(path: Path) -> Reader:
    reader = reader_of_file(path)
    assert reader is not None, "Source.files() has looked"
    return reader


def _checked(row: dict, place: str, fields: Fields) -> dict:
    """The row, if its text is there and can be encoded."""
    if fields.text not in row:
        raise no_text_field(place, fields.text, row)
    text = row[fields.text]
    if not isinstance(text, str):
        what = f"'{fields.text}' is a {type(text).__name__}"
        raise DataError(f"{place}: {what}, not a string; write the document as one string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"'{fields.text}' has half a surrogate pair at character {error.start}"
        raise DataError(f"{place}: {where}; replace it by U+FFFD or drop it") from error
    return row


def _column(row: dict, key: str, place: str) -> Any:
    """A value to keep: a number, text, true, false or None; None too where the row has no such field."""
    value = row.get(key)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is not None and not isinstance(value, str | int | float | bool):
        raise DataError(f"{place}: '{key}' is a {type(value).__name__}; keep numbers, text, true and false only")
    return value


def _label(row: dict, key: str, place: str) -> str | None:
    """An optional ``id`` or ``domain``: a string, or a whole number taken as one."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{place}: '{key}' is {value!r}; write a non-empty string, or leave the field out")
    return str(value)
