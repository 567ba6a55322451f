"""Where documents come from: files, data sets of the hub; read one at a time, every fault named by its place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from megaopus.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
PLAIN_TEXT = (".txt", ".md")
PARQUET = (".parquet",)
PACKED = (".gz", ".zst")
HUB = "hf:"


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
    """What a source's rows call things. Plain text files have none of it."""

    text: str = "text"
    id: str = "id"
    domain: str = "domain"
    keep: tuple[str, ...] = ()
    """Further fields that go into the document table, scores for example."""


@dataclass(frozen=True, slots=True)
class Source:
    """A JSON-lines file (.jsonl, .ndjson, .json), text file (.txt, .md), each also .gz or .zst; a .parquet file; or a
    folder of text files, or of tables (JSON lines and parquet) if it has any.
    """

    path: Path
    domain: str | None = None
    """Domain of every document; None: each row's own ``domain``, else the name of the file or folder."""
    fields: Fields = Fields()

    @classmethod
    def parse(cls, argument: str, fields: Fields = Fields()) -> Source:
        """Read ``PATH`` or ``DOMAIN=PATH``; a path with '=' before its first '/' needs the second form.

        ``hf:NAME[:CONFIG[:SPLIT]]`` for a path is a data set of the Hugging Face hub, or a folder of the form of one.
        """
        domain, equals, path = argument.partition("=")
        if not equals or "/" in domain or domain.startswith(HUB):
            domain, path = "", argument
        elif not domain or not path:
            raise DataError(f"--source {argument}: not understood; write PATH or DOMAIN=PATH")
        if path.startswith(HUB):
            from megaopus.corpus_tools.hub import HubSource

            return HubSource(Path(path), domain or None, fields)
        return cls(Path(path), domain or None, fields)

    @property
    def name(self) -> str:
        """File name without folders, so that nothing written depends on where the file lies."""
        return self.path.resolve().name

    @property
    def unit(self) -> str:
        """What its documents are numbered by in messages."""
        return "row" if _ending(self.path) in PARQUET else "line"

    @property
    def single_domain(self) -> str:
        """Domain of documents whose rows name none."""
        return self.domain or (self.path.name if self.path.is_dir() else self.path.name.split(".")[0])

    def files(self) -> list[tuple[str, Path]]:
        """``(name, path)`` of each file, in the order they are read.

        Raises:
            DataError: the path does not exist, has an unknown ending, or is a folder without text files.
        """
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file or folder; check the path given as source")
        if self.path.is_dir():
            inside = [path for path in self.path.rglob("*") if path.is_file()]
            tables = [path for path in inside if _ending(path) in JSON_LINES + PARQUET]
            found = tables or [path for path in inside if _ending(path) in PLAIN_TEXT]
            names = sorted((path.relative_to(self.path).as_posix(), path) for path in found)
            if not names:
                raise DataError(f"{self.path}: no documents: the folder has no .txt or .md file, nor a table")
            return names
        if _ending(self.path) not in JSON_LINES + PLAIN_TEXT + PARQUET:
            known = f"{', '.join(JSON_LINES + PLAIN_TEXT)} (.gz, .zst), .parquet"
            raise DataError(f"{self.path}: unknown ending; a source is a folder of such files, or one of {known}")
        return [(self.name, self.path)]

    def rows(self) -> Iterator[dict[str, Any]] | None:
        """Rows to read in place of ``files``; None: there are files."""
        return None

    def size(self) -> int:
        """Bytes on disk, as stored (compressed or not)."""
        return sum(path.stat().st_size for _, path in self.files())


def _ending(path: Path) -> str:
    """Last suffix in lower case, that of a packed file set aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED]
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
        if (rows := source.rows()) is not None:
            yield from self._rows(source.name, rows, lambda row: f"{source.path} row {row}")
            return
        for name, path in source.files():
            if source.path.is_dir():
                self._digest.update(name.encode() + b"\0")
            if _ending(path) in JSON_LINES:
                yield from self._json_lines(name, path)
            elif _ending(path) in PARQUET:
                yield from self._parquet(name, path)
            else:
                yield from self._plain_text(name, path)

    def table(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, row) of each row as it stands. Raises DataError for what is not a table."""
        source = self.source
        if (rows := source.rows()) is not None:
            yield from ((f"{source.path} row {number}", row) for number, row in enumerate(rows, 1))
            return
        for _, path in source.files():
            if _ending(path) in JSON_LINES:
                yield from ((place, row) for _, place, row in self._json_rows(path))
            elif _ending(path) in PARQUET:
                rows = self._parquet_rows(path, None)
                yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
            else:
                raise DataError(f"{path}: not a table; use JSON lines, parquet or a data set of the hub")

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
                elif path.suffix.lower() == ".zst":
                    stream = _unpacked(stream, path)
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
        except _Truncated as error:
            raise DataError(
                f"{path}: damaged or truncated zstandard after line {line} ({error}); copy or compress the file again"
            ) from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error

    def _plain_text(self, name: str, path: Path) -> Iterator[Document]:
        domain = self._single_domain
        for content in self._lines(path, whole=True):
            yield Document(f"{domain}/{name}", domain, _decoded(content, str(path), first=True), 0, {})

    def _json_rows(self, path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(line, place, row) of each line that is not empty."""
        for line, content in enumerate(self._lines(path, whole=False), 1):
            if content.strip():
                place = f"{path} line {line}"
                yield line, place, _json_row(_decoded(content, place, first=line == 1), place)

    def _json_lines(self, name: str, path: Path) -> Iterator[Document]:
        for line, place, row in self._json_rows(path):
            yield self._of_row(row, name, line, place)

    def _parquet(self, name: str, path: Path) -> Iterator[Document]:
        wanted = [*self._named(), *self.source.fields.keep]
        yield from self._rows(name, self._parquet_rows(path, wanted), lambda row: f"{path} row {row}", hashed=True)

    def _parquet_rows(self, path: Path, wanted: list[str] | None) -> Iterator[dict[str, Any]]:
        """Rows with those of the columns ``wanted`` that there are, or all; no more than a row group is in memory."""
        parquet = needed("pyarrow.parquet", str(path))
        arrow = needed("pyarrow", str(path))
        try:
            with path.open("rb", buffering=0) as raw:  # for the digest; a table is not read from end to end
                counted = _Counted(raw, self._digest, self._count)
                buffer = bytearray(1 << 20)
                while counted.readinto(buffer):
                    pass
            file = parquet.ParquetFile(path)
            names = file.schema_arrow.names
            if wanted is not None and self.source.fields.text not in names:
                raise _no_text(str(path), self.source.fields.text, names)
            columns = None if wanted is None else [name for name in wanted if name in names]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error}); copy or write it again") from error

    def _named(self) -> tuple[str, str, str]:
        return self.source.fields.text, self.source.fields.id, self.source.fields.domain

    def _rows(
        self, name: str, rows: Iterator[dict], place_of: Callable[[int], str], hashed: bool = False
    ) -> Iterator[Document]:
        """Documents of a table's rows; their contents are digested unless ``hashed``: its file was."""
        for number, row in enumerate(rows, 1):
            document = self._of_row(row, name, number, place_of(number))
            if not hashed:
                content = json.dumps([document.id, document.domain, document.text, dict(document.columns)]).encode()
                self._digest.update(content)
                self._count(len(content))
            yield document

    def _of_row(self, row: dict, name: str, line: int, place: str) -> Document:
        fields = self.source.fields
        _checked(row, place, fields)
        domain = self.source.domain or _label(row, fields.domain, place) or self._single_domain
        identity = _label(row, fields.id, place) or f"{domain}/{name}:{line}"
        columns = {key: _column(row, key, place) for key in fields.keep}
        return Document(identity, domain, row[fields.text], line, columns)


class _Truncated(Exception):
    """A zstandard stream that ends early or is none."""


def _unpacked(stream: IO[bytes], path: Path) -> IO[bytes]:
    zstandard = needed("zstandard", str(path))

    class Checked(io.RawIOBase):
        """The unpacked bytes; the library's own reader takes a stream that was cut off for one that has ended."""

        def __init__(self) -> None:
            self._unpacker, self._left = zstandard.ZstdDecompressor().decompressobj(), b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._left:
                if self._unpacker.eof:  # another frame may follow
                    rest = self._unpacker.unused_data or stream.read(1)
                    if not rest:
                        return 0
                    self._unpacker = zstandard.ZstdDecompressor().decompressobj()
                else:
                    rest = stream.read(1 << 16)
                    if not rest:
                        raise _Truncated("the file ends within a frame")
                try:
                    self._left = self._unpacker.decompress(rest)
                except zstandard.ZstdError as error:
                    raise _Truncated(str(error)) from error
            count = min(len(buffer), len(self._left))
            buffer[:count], self._left = self._left[:count], self._left[count:]
            return count

    return io.BufferedReader(Checked(), 1 << 16)


def needed(module: str, what: str, extra: str = "data") -> Any:
    """An optional package; raises DataError, naming ``what`` needs it and the ``extra`` with it, if there is none."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise DataError(f"{what}: needs {name}, which is not installed: pip install 'megaopus[{extra}]'") from error


def _decoded(content: bytes, place: str, first: bool) -> str:
    try:
        return content.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); convert the file to UTF-8"
        ) from error


def _json_row(content: str, place: str) -> dict:
    """The JSON object of one line."""
    try:
        row = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise DataError(f"{place}: not valid JSON ({what}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f'{place}: a JSON {type(row).__name__}, not an object; write {{"text": ...}} on each line')
    return row


def _no_text(place: str, name: str, fields: Any) -> DataError:
    found = ", ".join(sorted(map(str, fields))) or "none"
    return DataError(
        f"{place}: no field '{name}' (fields: {found}); rename the field that holds the document, or name it with"
        " --text-field"
    )


def _checked(row: dict, place: str, fields: Fields) -> dict:
    """The row, if its text is there and can be encoded."""
    if fields.text not in row:
        raise _no_text(place, fields.text, row)
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
