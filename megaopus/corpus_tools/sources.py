"""Reads documents from files and from data sets of the hub, one at a time, every fault named by its place."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from megaopus.corpus_tools.chat import ChatTemplate, Spans
from megaopus.corpus_tools.folder_files import FolderFiles, folder_files
from megaopus.corpus_tools.readers.registry import (
    PACKED,
    Reader,
    Row,
    endings,
    reader_of_file,
    reader_of_prefix,
)
from megaopus.corpus_tools.readers.stored import FaultyError, Part, Stored
from megaopus.corpus_tools.remote import Place, Remote, stamp
from megaopus.corpus_tools.row_fields import column_of, conversation_of, label_of, spans_of, text_of
from megaopus.data.config import HUB_NAME
from megaopus.data.schemes import SCHEMES
from megaopus.data.store import Store, is_address
from megaopus.errors import DataError
from megaopus.settings import address_refusal

_OPTION = re.compile(r",(text|id|domain)=([^,]+)$")
_LIKE_AN_OPTION = re.compile(r",(\w+)=[^,/]*$")


class Document(NamedTuple):
    """One document as read from its source."""

    id: str
    domain: str
    text: str
    line: int
    """Line of its JSON-lines file, row of its table; 0 for a plain text file."""
    columns: Mapping[str, Any]
    """What was kept of its row, by name: numbers, text, true, false or None."""
    loss_spans: Spans | None = None
    """Characters that count in the loss; None: all."""
    markup: bool = False
    """Whether special tokens written in it are those tokens, as a chat template writes them; else they are text."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Says what a source's rows call things. Plain text files have none of it.

    ``doc.text`` is the field ``text`` of what ``doc`` holds, unless a field has that whole name.
    """

    text: str = "text"
    id: str = "id"
    domain: str = "domain"
    keep: tuple[str, ...] = ()
    """Further fields that go into the document table, scores for example."""
    loss_spans: str | None = None
    """Ranges of characters that count in the loss; None: all of the text counts."""
    messages: str | None = None
    """A conversation, which ``chat`` writes as a text, in place of ``text``; None: there is none."""
    chat: ChatTemplate | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Names a file, a folder of text files (of tables, if it has any), or what a prefix such as ``hf:`` names.

    What can be read, the files of ``readers/`` say. Files and folders may lie in an object store.
    """

    path: Place
    domain: str | None = None
    """Domain of every document; None: each row's own ``domain``, else the name of the file or folder."""
    fields: Fields = Fields()
    exclude: tuple[str, ...] = ()
    """Globs of what to leave aside in a folder: of the path below it, or of the name of a file or folder in it."""
    folder_domains: bool = False
    """Makes a domain of each sub-folder, of its name, unless ``domain`` is given."""
    skip_faulty: bool = False
    """Leave out rows and files that cannot be read, and count them; or raise what is wrong with the first."""

    @classmethod
    def parse(
        cls,
        argument: str,
        fields: Fields = Fields(),
        *,
        exclude: tuple[str, ...] = (),
        folder_domains: bool = False,
        skip_faulty: bool = False,
        store: Store | None = None,
    ) -> Source:
        """Read ``[DOMAIN=]PATH[,text=FIELD][,id=FIELD][,domain=FIELD]``; ``fields`` are those not named in it.

        A path may have the prefix of a reader: ``hf:NAME[:CONFIG[:SPLIT]]`` is a data set of the Hugging Face hub, or a
        folder of the form of one. It may be ``s3://BUCKET/PATH``, with a pattern such as ``*.parquet`` at its end;
        ``store`` says how that is read, None: ``Store()``. One with '=' before its first '/' needs a domain in front.
        Raises DataError for anything else.
        """
        if refusal := address_refusal(argument, SCHEMES):
            raise DataError(f"source {argument}: {refusal[0]}; {refusal[1]} ({HUB_NAME})")
        rest = argument
        while option := _OPTION.search(rest):
            named: dict[str, Any] = {option[1]: option[2]}
            fields, rest = replace(fields, **named), rest[: option.start()]
        domain, equals, path = rest.partition("=")
        if not equals or "/" in domain or reader_of_prefix(domain):
            domain, path = "", rest
        elif not domain or not path:
            raise DataError(f"--source {argument}: not understood; write PATH or DOMAIN=PATH")
        if (unknown := _LIKE_AN_OPTION.search(rest)) and not Path(path).exists():
            raise DataError(f"--source {argument}: no option {unknown[1]!r}; after a path may come text, id and domain")
        place = Remote.parse(path, store or Store()) if is_address(path) else Path(path)
        return cls(place, domain or None, fields, exclude, folder_domains, skip_faulty)

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

    def files(self) -> list[tuple[str, Place]]:
        """``(name, path)`` of each file, in the order they are read; none where a prefix names no file.

        Raises:
            DataError: the path does not exist, has an unknown ending, or is a folder without documents.
        """
        return self.chosen_files().taken

    def chosen_files(self) -> FolderFiles:
        """List ``files``, and why others of the folder are none of them. Raises DataError as ``files`` does."""
        if self.by_prefix is not None:
            return FolderFiles()
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file or folder; check the path given as source")
        if self.path.is_dir():
            return folder_files(self.path, self.exclude)
        if reader_of_file(self.path) is None:
            known = ", ".join([f"{', '.join(endings(packed=True))} ({', '.join(PACKED)})", *endings(packed=False)])
            raise DataError(f"{self.path}: unknown ending; a source is a folder of such files, or one of {known}")
        return FolderFiles([(self.name, self.path.objects[""] if isinstance(self.path, Remote) else self.path)])

    def size(self) -> int:
        """Bytes on disk, as stored (compressed or not)."""
        return sum(path.stat().st_size for _, path in self.files())

    def stamps(self) -> list[Any]:
        """Names, sizes and ages of its files, in a store tags in place of ages. Raises DataError as ``files`` does."""
        return [stamp(path) for _, path in self.files()]

    @property
    def remote(self) -> bool:
        """Tell whether it lies in an object store."""
        return isinstance(self.path, Remote)

    def listed_sha256(self) -> str:
        """Digest of the names, sizes and tags of a source in a store, of which nobody reads all bytes to hash them."""
        listed = [[name, *stamp(path)[1:]] for name, path in self.files()]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class Stretch(NamedTuple):
    """Names a file of a source, or a part of one."""

    name: str
    """Of the file, within the source."""
    path: Place
    part: Part | None = None
    """None: all of it."""


@dataclass(slots=True)
class LeftOut:
    """Counts what was left out for one reason."""

    count: int
    first: str
    """Says what was wrong with the first, and where."""


class SourceReader:
    """Iterates once over the documents of a source; the totals are those read so far."""

    def __init__(
        self,
        source: Source,
        on_bytes: Callable[[int], None] = lambda count: None,
        stretches: Sequence[Stretch] | None = None,
    ):
        """``stretches``: what to read of it, which may be without documents; None: all."""
        self.source = source
        self.stretches = stretches
        self.bytes = 0
        self.documents = 0
        self.empty = 0
        """Documents left out because their text is null, empty or white space only."""
        self.taken = 0
        """Documents of which a ``Reading`` made use."""
        self.copies = 0
        """Documents that a ``Reading`` left out for their text."""
        self.broken: list[Place] = []
        """Files that could not be read to their end."""
        self.files = 0
        self.skipped: dict[str, int] = {}
        """Lists files of the folder that are not read, by reason."""
        self.left_out: dict[str, LeftOut] = {}
        """Counts rows, or files or the rest of one, that could not be read, by reason."""
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
            DataError: unreadable file, or no documents at all.
            FaultyError: bad gzip, bad UTF-8, bad JSON or a bad field, unless the source skips what is faulty.
        """
        for document in self._documents():
            if document.text.strip():
                self.documents += 1
                yield document
            else:
                self.empty += 1
        if not self.documents and self.stretches is None:
            raise no_documents(self.source, self.empty, {reason: each.count for reason, each in self.left_out.items()})

    def leave_out(self, error: FaultyError) -> None:
        """Count what is faulty, or raise it."""
        if not self.source.skip_faulty:
            raise error
        seen = self.left_out.setdefault(error.reason, LeftOut(0, str(error)))
        seen.count += 1

    def _documents(self) -> Iterator[Document]:
        source = self.source
        if (reader := source.by_prefix) is not None:
            yield from self._of_table(reader)
            return
        stretches = self.stretches
        if stretches is None:
            chosen = source.chosen_files()
            self.files, self.skipped = len(chosen.taken), dict(chosen.skipped)
            stretches = [Stretch(*each) for each in chosen.taken]
        for name, path, part in stretches:
            self._digest.update(mark_of(source, name))
            try:
                yield from self._of_file(name, path, part)
            except FaultyError as error:  # no more of this file can be read
                self.leave_out(error)
                self.broken.append(path)

    def _of_file(self, name: str, path: Place, part: Part | None) -> Iterator[Document]:
        fields = self.source.fields
        also = [name for name in (fields.loss_spans, fields.messages) if name]
        text = fields.messages or fields.text
        wanted = [text, fields.id, fields.domain, *fields.keep, *also]
        stored = Stored(path, text, wanted, self._take, self.leave_out, part)
        reader = reader_of(path)
        if reader.text is not None:
            domain = self._folder_domain(name) or self._single_domain
            yield Document(f"{self._single_domain}/{name}", domain, reader.text(stored), 0, {})
        yield from self._of_rows(reader, stored, name, self._folder_domain(name))

    def _of_table(self, reader: Reader) -> Iterator[Document]:
        """Documents of what is no file: their contents are hashed."""
        fields = self.source.fields
        stored = Stored(self.source.path, fields.messages or fields.text, None, self._take, self.leave_out)
        for document in self._of_rows(reader, stored, self.source.name, None):
            content: list[Any] = [document.id, document.domain, document.text, dict(document.columns)]
            content += [] if document.loss_spans is None else [document.loss_spans]
            self._take(memoryview(json.dumps(content).encode()))
            yield document

    def _of_rows(self, reader: Reader, stored: Stored, name: str, folder_domain: str | None) -> Iterator[Document]:
        for row in reader.rows(stored) if reader.rows is not None else ():
            try:
                document = self._of_row(row, name, folder_domain, reader.untyped)
            except FaultyError as error:
                self.leave_out(error)
                continue
            yield document

    def _folder_domain(self, name: str) -> str | None:
        """The sub-folder of a file, if it names the domain."""
        folder, inside, _ = name.partition("/")
        return folder if inside and self.source.folder_domains and not self.source.domain else None

    def table(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, row) of each row as it stands. Raises DataError for what is not a table."""
        source = self.source
        found: list[Place] = [source.path] if source.by_prefix is not None else [path for _, path in source.files()]
        for path in found:
            reader = source.by_prefix or reader_of(path)
            if reader.rows is None:
                raise DataError(f"{path}: not a table; use JSON lines, CSV, parquet or a data set of the hub")
            for row in reader.rows(Stored(path, source.fields.text, None, self._take)):
                yield row.place, row.values

    def _take(self, content: memoryview) -> None:
        """Hash and count stored bytes."""
        self._digest.update(content)
        self.bytes += len(content)
        self._report(len(content))

    def _of_row(self, row: Row, name: str, folder_domain: str | None, untyped: bool) -> Document:
        fields, values, place = self.source.fields, row.values, row.place
        markup = fields.messages is not None and fields.chat is not None
        if fields.messages is not None and fields.chat is not None:
            text, spans = conversation_of(values, fields.messages, place, fields.chat)
        else:
            text, spans = text_of(values, fields.text, place), None
        if fields.loss_spans is not None:
            spans = spans_of(values, fields.loss_spans, place, text)
        domain = self.source.domain or label_of(values, fields.domain, place) or self._single_domain
        identity = label_of(values, fields.id, place) or f"{domain}/{name}:{row.number}"
        columns = {key: column_of(values, key, place, untyped) for key in fields.keep}
        return Document(identity, folder_domain or domain, text, row.number, columns, spans, markup)


def reader_of(path: Place) -> Reader:
    """The reader of a file that is one of ``Source.files``."""
    reader = reader_of_file(path)
    assert reader is not None, "Source.files() has looked"
    return reader


def mark_of(source: Source, name: str) -> bytes:
    """Return what stands before a file's bytes in the digest of its source: of a folder, the file's name."""
    return name.encode() + b"\0" if source.path.is_dir() else b""


def no_documents(source: Source, empty: int, left_out: Mapping[str, int]) -> DataError:
    """The error of a source that gives nothing; ``left_out``: reason -> how often."""
    counts = {"empty ones": empty, **left_out}
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    said = f" ({found})" if found else ""
    return DataError(f"{source.path}: no documents in it{said}; drop this source or fill the file")
