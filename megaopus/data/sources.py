"""Where documents come from: JSON lines and plain text, read one document at a time, every fault named by its place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from megaopus.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
PLAIN_TEXT = (".txt", ".md")


class Document(NamedTuple):
    """One document as read from its source."""

    id: str
    domain: str
    text: str
    line: int
    """Line in its JSON-lines file; 0 for a plain text file."""


@dataclass(frozen=True, slots=True)
class Source:
    """A JSON-lines file (.jsonl, .ndjson, .json) or text file (.txt, .md), each also .gz; or a folder of text files."""

    path: Path
    domain: str | None = None
    """Domain of every document; None: each row's own ``domain``, else the name of the file or folder."""

    @classmethod
    def parse(cls, argument: str) -> Source:
        """Read ``PATH`` or ``DOMAIN=PATH``; a path with '=' before its first '/' needs the second form."""
        domain, equals, path = argument.partition("=")
        if not equals or "/" in domain:
            return cls(Path(argument))
        if not domain or not path:
            raise DataError(f"--source {argument}: not understood; write PATH or DOMAIN=PATH")
        return cls(Path(path), domain)

    @property
    def name(self) -> str:
        """File name without folders, so that nothing written depends on where the file lies."""
        return self.path.resolve().name

    def files(self) -> list[tuple[str, Path]]:
        """``(name, path)`` of each file, in the order they are read.

        Raises:
            DataError: the path does not exist, has an unknown ending, or is a folder without text files.
        """
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file or folder; check the path given as source")
        if self.path.is_dir():
            found = [path for path in self.path.rglob("*") if path.is_file() and _ending(path) in PLAIN_TEXT]
            names = sorted((path.relative_to(self.path).as_posix(), path) for path in found)
            if not names:
                raise DataError(f"{self.path}: no documents: the folder has no .txt or .md file")
            return names
        if _ending(self.path) not in JSON_LINES + PLAIN_TEXT:
            known = ", ".join(JSON_LINES + PLAIN_TEXT)
            raise DataError(f"{self.path}: unknown ending; a source is a folder of text files, or one of {known} (.gz)")
        return [(self.name, self.path)]

    def size(self) -> int:
        """Bytes on disk, as stored (compressed or not)."""
        return sum(path.stat().st_size for _, path in self.files())


def _ending(path: Path) -> str:
    """Last suffix in lower case, ``.gz`` set aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


class _Counted(io.RawIOBase):
    """A raw file that hashes and counts what passes through it."""

    def __init__(self, raw: IO[bytes], digest: hashlib._Hash, on_bytes: Callable[[int], None]):
        self._raw, self._digest, self._on_bytes = raw, digest, on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._digest.update(memoryview(buffer)[:count])
        self._on_bytes(count)
        return count


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

    @property
    def sha256(self) -> str:
        """Digest of the stored bytes read so far (for a folder: of each file's name and bytes in turn)."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order.

        Raises:
            DataError: unreadable file, bad gzip, bad UTF-8, bad JSON, bad field, or no documents at all.
        """
        folder = self.source.path.is_dir()
        for name, path in self.source.files():
            if folder:
                self._digest.update(name.encode() + b"\0")
            read = self._json_lines if _ending(path) in JSON_LINES else self._plain_text
            for document in read(name, path):
                if document.text.strip():
                    self.documents += 1
                    yield document
                else:
                    self.empty += 1
        if not self.documents:
            left_out = f" ({self.empty} empty ones)" if self.empty else ""
            raise DataError(f"{self.source.path}: no documents in it{left_out}; drop this source or fill the file")

    def _count(self, count: int) -> None:
        self.bytes += count
        self._report(count)

    def _lines(self, path: Path, whole: bool) -> Iterator[bytes]:
        """The file's lines, or all of it as one item; gzip and system errors become typed ones."""
        line = 0
        try:
            with path.open("rb", buffering=0) as raw:
                stream: IO[bytes] = io.BufferedReader(_Counted(raw, self._digest, self._count), 1 << 20)
                if path.suffix.lower() == ".gz":
                    stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
                if whole:
                    yield stream.read()
                    return
                for content in stream:
                    line += 1
                    yield content
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            place = f"after line {line}" if not whole else "at its start or end"
            raise DataError(
                f"{path}: damaged or truncated gzip {place} ({error}); copy or compress the file again"
            ) from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error

    def _plain_text(self, name: str, path: Path) -> Iterator[Document]:
        default = self.source.path.name if self.source.path.is_dir() else path.name.split(".")[0]
        domain = self.source.domain or default
        for content in self._lines(path, whole=True):
            yield Document(f"{domain}/{name}", domain, _decoded(content, str(path), first=True), 0)

    def _json_lines(self, name: str, path: Path) -> Iterator[Document]:
        default = path.name.split(".")[0]
        for line, content in enumerate(self._lines(path, whole=False), 1):
            if not content.strip():
                continue
            place = f"{path} line {line}"
            row = _row(_decoded(content, place, first=line == 1), place)
            domain = self.source.domain or _label(row, "domain", place) or default
            identity = _label(row, "id", place) or f"{domain}/{name}:{line}"
            yield Document(identity, domain, row["text"], line)


def _decoded(content: bytes, place: str, first: bool) -> str:
    try:
        return content.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); convert the file to UTF-8"
        ) from error


def _row(content: str, place: str) -> dict:
    """The JSON object of one line, its ``text`` checked."""
    try:
        row = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise DataError(f"{place}: not valid JSON ({what}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f'{place}: a JSON {type(row).__name__}, not an object; write {{"text": ...}} on each line')
    if "text" not in row:
        found = ", ".join(sorted(row)) or "none"
        raise DataError(f"{place}: no field 'text' (fields: {found}); rename the field that holds the document")
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"{place}: 'text' is a {type(text).__name__}, not a string; write the document as one string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: 'text' has half a surrogate pair at character {error.start}; replace it by U+FFFD or drop it"
        ) from error
    return row


def _label(row: dict, key: str, place: str) -> str | None:
    """An optional ``id`` or ``domain``: a string, or a whole number taken as one."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{place}: '{key}' is {value!r}; write a non-empty string, or leave the field out")
    return str(value)
