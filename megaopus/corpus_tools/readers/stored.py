"""Reads stored bytes: hashed and counted as they pass, unpacked, and every fault named by its place."""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil

from megaopus.corpus_tools.remote import Place, Remote, opened
from megaopus.errors import DataError

_LARGEST_WINDOW = 1 << 31
"""Bytes that a zstandard frame may look back (``zstd --long=31``): memory that unpacking takes, at most."""


DAMAGED = "damaged file"
"""Reason of files that are left out, or of which the rest is."""


class FaultyError(DataError):
    """A row that cannot be a document, or a file that cannot be read to its end; such may be left out."""

    def __init__(self, reason: str, message: str):
        """``reason``: a few words, the same for all of the kind, by which they are counted."""
        super().__init__(message)
        self.reason = reason


class Part(NamedTuple):
    """Names a stretch of a file that can be read by itself: the lines that begin in it, or its row groups."""

    first: int
    """Byte, or row group."""
    end: int
    """That it ends before."""
    before: int = 0
    """Lines or rows of the file that lie before it."""
    bytes: tuple[int, int] = (0, 0)
    """Of row groups: where they lie in the file, [first, end)."""


def _stop(error: FaultyError) -> None:
    raise error


class _Counted(io.RawIOBase):
    """Shows what passes through a raw file."""

    def __init__(self, raw: io.RawIOBase, on_bytes: Callable[[memoryview], None]):
        self._raw, self._on_bytes = raw, on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(buffer) or 0
        self._on_bytes(memoryview(buffer)[:count])
        return count


class Stored:
    """Gives a reader what is to be read: a file, or what a prefix names."""

    def __init__(
        self,
        path: Place,
        text_field: str,
        wanted: list[str] | None,
        on_bytes: Callable[[memoryview], None],
        leave_out: Callable[[FaultyError], None] = _stop,
        part: Part | None = None,
    ) -> None:
        """``wanted``: fields that are asked for, None: all of them; ``on_bytes`` is given the bytes as stored.

        ``part``: what to read of the file, None: all of it. Only readers that divide files are given one.
        """
        self.path = path
        self.text_field = text_field
        self.wanted = wanted
        self.leave_out = leave_out
        """Raises what is wrong with a row, or counts it: then the reader goes on with the next."""
        self.part = part
        self._on_bytes = on_bytes

    @property
    def before(self) -> int:
        """Lines or rows of the file that lie before what is to be read."""
        return self.part.before if self.part else 0

    def content(self) -> bytes:
        """All of the file, unpacked. Raises DataError."""
        (content,) = self._read(whole=True)
        return content

    def lines(self) -> Iterator[bytes]:
        """The file's lines, unpacked. Raises DataError."""
        return self._read(whole=False)

    @contextmanager
    def passed(self, part: Part | None) -> Iterator[Path | IO[bytes]]:
        """Hash and count the file, or a part, for a reader that does not read it from end to end; yield what it reads.

        What lies in an object store is copied to this machine's disk for as long, the part alone. Raises OSError.
        """
        first, end = part.bytes if part else (0, self.path.stat().st_size)
        if isinstance(self.path, Remote):
            with self.path.opened() as remote:
                remote.hold(first, end, self._on_bytes)
                yield io.BufferedReader(remote, 1 << 16)
            return
        with opened(self.path) as raw:
            counted = _Counted(raw, self._on_bytes)
            raw.seek(first)
            buffer = memoryview(bytearray(1 << 20))
            while first < end and (count := counted.readinto(buffer[: end - first])):
                first += count
        yield self.path

    def _read(self, whole: bool) -> Iterator[bytes]:
        """The file's lines, or all of it as one item; gzip and system errors become typed ones."""
        path, line = self.path, 0
        try:
            with opened(path, self.part and self.part.end) as raw:
                if self.part is not None:
                    yield from self._part_lines(io.BufferedReader(raw, 1 << 20), self.part)
                    return
                stream: IO[bytes] = io.BufferedReader(_Counted(raw, self._on_bytes), 1 << 20)
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
            raise FaultyError(
                DAMAGED, f"{path}: damaged or truncated gzip {place} ({error}); copy or compress the file again"
            ) from error
        except _Truncated as error:
            where = f"{path}: damaged or truncated zstandard after line {line}"
            raise FaultyError(DAMAGED, f"{where} ({error}); copy or compress the file again") from error
        except OSError as error:
            raise unreadable(path, error) from error

    def _part_lines(self, stream: IO[bytes], part: Part) -> Iterator[bytes]:
        """The lines that begin in the part."""
        if part.first:
            stream.seek(part.first - 1)
            stream.readline()  # the rest of a line of the part before
        place = stream.tell()
        while place < part.end and (content := stream.readline()):
            place += len(content)
            self._on_bytes(memoryview(content))
            yield content


def unreadable(path: Place, error: OSError) -> DataError:
    """The error of a file that the system does not let be read."""
    return DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions")


class _Truncated(Exception):
    """A zstandard stream that ends early or is none."""


def _unpacked(stream: IO[bytes], path: Place) -> IO[bytes]:
    zstandard = needed("zstandard", str(path))

    class Checked(io.RawIOBase):
        """The unpacked bytes; the library's own reader takes a stream that was cut off for one that has ended."""

        def __init__(self) -> None:
            self._left = b""
            self._unpacker: Any = None

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._left:
                if self._unpacker is None or self._unpacker.eof:  # the first frame, or another one that follows
                    rest = (self._unpacker.unused_data if self._unpacker else b"") or stream.read(1 << 16)
                    if not rest and self._unpacker:
                        return 0
                    _refuse_window(zstandard, rest, path)
                    self._unpacker = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
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


def _refuse_window(zstandard: Any, start: bytes, path: Place) -> None:
    """Raise DataError if a frame, which begins with ``start``, needs more memory than there is."""
    try:
        window = zstandard.get_frame_parameters(start).window_size
    except zstandard.ZstdError:
        return  # not a frame: unpacking says so
    free = psutil.virtual_memory().available
    if window > min(free, _LARGEST_WINDOW):
        needs = f"needs {window / 2**30:.2g} GiB of memory to unpack (its window)"
        has = f"{free / 2**30:.2g} GiB are free, {_LARGEST_WINDOW >> 30} GiB are the most"
        raise DataError(f"{path}: {needs}, {has}; pack it again with a smaller window (zstd --long=27)")


def needed(module: str, what: str, extra: str = "data") -> Any:
    """An optional package; raises DataError, naming ``what`` needs it and the ``extra`` with it, if there is none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise DataError(f"{what}: needs {name}, which is not installed: pip install 'megaopus[{extra}]'") from error


def decoded(content: bytes, place: str) -> str:
    """The text of UTF-8; a byte order mark at its start is left out. Raises FaultyError."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 at byte {error.start} (0x{content[error.start]:02x})"
        raise FaultyError("not UTF-8", f"{place}: {wrong}; convert the file to UTF-8") from error


def no_text_field(place: str, name: str, fields: Iterable[Any]) -> FaultyError:
    """The error of a row or table that has no field for the text."""
    found = ", ".join(sorted(map(str, fields))) or "none"
    return FaultyError(
        "no text field",
        f"{place}: no field '{name}' (fields: {found}); rename the field that holds the document, or name it with"
        " --text-field, or of one source with PATH,text=NAME",
    )
