"""Files of sources that lie in an object store, named and read as those of this machine are."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from megaopus.data.store import Store, open_store, patiently, read_ranges
from megaopus.errors import DataError

BLOCK_BYTES = 4 << 20
"""Asked for at a time."""
_AT_ONCE = 4
"""Blocks that are asked for together."""
_BEYOND_BYTES = 1 << 17
"""Asked for at a time beyond the place where reading is to end: the rest of a line."""
_LOOK_PATIENCE_S = 20.0
"""How long a store is asked what there is, before anything is written."""
_GLOB = re.compile(r"[*?\\[]")


class Stat(NamedTuple):
    """Holds what sources ask of a file."""

    st_size: int


@dataclass(frozen=True)
class Remote:
    """Names an object, a folder of objects, or those of a folder that match a pattern; looks when first asked."""

    address: str
    """Of the object or folder, without '/' at its end."""
    pattern: str = ""
    """Of the paths below the folder; '*' is within a name, '**' any folders. Empty: all."""
    size: int = -1
    """Bytes of an object that was listed."""
    tag: str = ""
    """Of an object that was listed: another one when it is written again."""
    store: Store = field(default=Store(), compare=False, repr=False)

    @classmethod
    def parse(cls, address: str, store: Store) -> Remote:
        """Read an address; what follows the first name with '*', '?' or '[' in it is a pattern."""
        scheme, _, path = address.partition("://")
        names = [name for name in path.split("/") if name]
        plain = next((number for number, name in enumerate(names) if _GLOB.search(name)), len(names))
        if not names or plain == 0:
            raise DataError(f"{address}: names no bucket; write {scheme}://BUCKET/PATH")
        return cls(f"{scheme}://{'/'.join(names[:plain])}", "/".join(names[plain:]), store=store)

    def __str__(self) -> str:
        return f"{self.address}/{self.pattern}" if self.pattern else self.address

    def __getstate__(self) -> dict[str, Any]:
        """Leave the list of objects here: tasks are told which they are to read."""
        return {key: value for key, value in vars(self).items() if key != "objects"}

    def __truediv__(self, name: str) -> Remote:
        return self.objects[name]

    @cached_property
    def objects(self) -> dict[str, Remote]:
        """The objects below the folder, by the path from there; an object itself under ''. Raises DataError."""
        found = self._listed()
        root = f"{self.address.partition('://')[2]}/"
        return {
            name.removeprefix(root) if name != root[:-1] else "": replace(
                self,
                address=f"{self.address.partition('://')[0]}://{name}",
                pattern="",
                size=int(each["size"]),
                tag=str(each.get("ETag") or each.get("LastModified") or ""),
            )
            for name, each in sorted(found.items())
            if each["type"] == "file" and not name.endswith("/") and self._matches(name.removeprefix(root))
        }

    def _listed(self) -> dict[str, Any]:
        system = open_store(self.address)
        patience = min(self.store.patience_s, _LOOK_PATIENCE_S)
        found: dict[str, Any] = patiently(
            str(self), lambda: system.find(self.address, detail=True), patience, first=True
        )
        return found

    def _matches(self, name: str) -> bool:
        return not self.pattern or _fits(name.split("/"), self.pattern.split("/"))

    @cached_property
    def _folder(self) -> bool:
        return self.size < 0 and (bool(self.pattern) or "" not in self.objects)

    @property
    def name(self) -> str:
        """Return its last name, without the pattern."""
        return PurePosixPath(self.address).name

    @property
    def suffix(self) -> str:
        """Return the ending of its name."""
        return PurePosixPath(self.address).suffix

    @property
    def suffixes(self) -> list[str]:
        """Return the endings of its name."""
        return PurePosixPath(self.address).suffixes

    def resolve(self) -> Remote:
        """Return itself: there are no links."""
        return self

    def is_dir(self) -> bool:
        """Tell whether it is no object. Raises DataError as ``objects``."""
        return self._folder

    def is_file(self) -> bool:
        """Tell whether it is an object. Raises DataError as ``objects``."""
        return not self._folder

    def exists(self) -> bool:
        """Tell whether there is anything. Raises DataError as ``objects``."""
        return self.size >= 0 or bool(self.objects)

    def stat(self) -> Stat:
        """Say how large an object is. Raises DataError as ``objects``."""
        return Stat(self.size if self.size >= 0 else self.objects[""].size)

    def opened(self, end: int | None = None) -> ObjectFile:
        """Open an object for reading. See ``opened`` of this file."""
        return ObjectFile(self.address, self.stat().st_size, self.store, end)

    def open(self, mode: str = "rb", buffering: int = -1) -> IO[bytes]:
        """Open an object for reading, as ``Path.open``."""
        raw = self.opened()
        return raw if buffering == 0 else io.BufferedReader(raw)  # type: ignore[return-value]


Place = Path | Remote
"""A file or folder of this machine, or of an object store."""


def stamp(path: Place) -> list[Any]:
    """Name a file, its size and its age, or in a store its tag: one of them changes when it does."""
    if isinstance(path, Remote):
        return [str(path), path.size, path.tag]
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


def opened(path: Place, end: int | None = None) -> io.RawIOBase:
    """Open a file for reading, without a buffer. ``end``: hardly anything beyond this byte will be read."""
    return path.opened(end) if isinstance(path, Remote) else path.open("rb", buffering=0)


def _fits(names: list[str], patterns: list[str]) -> bool:
    """Tell whether a path fits a pattern, name by name."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_fits(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


class ObjectFile(io.RawIOBase):
    """Reads an object, from any place on, some MiB ahead; a stretch of it may be held on this machine's disk."""

    def __init__(self, address: str, size: int, store: Store, end: int | None = None):
        """``end``: read no further ahead than to this byte."""
        self._address, self._size, self._store = address, size, store
        self._end = size if end is None else min(end, size)
        self._system = open_store(address)
        self._place = 0
        self._from, self._ahead = 0, b""
        self._held: tuple[int, int, IO[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def close(self) -> None:
        if self._held is not None:
            self._held[2].close()
            self._held = None
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Read what is there of the bytes asked for. Raises DataError as ``read_ranges``."""
        if self._place >= self._size or not len(buffer):
            return 0
        if self._held is not None and self._held[0] <= self._place < self._held[1]:
            first, end, stream = self._held
            stream.seek(self._place - first)
            found = stream.read(min(len(buffer), end - self._place))
        else:
            if not self._from <= self._place < self._from + len(self._ahead):
                self._from, self._ahead = self._place, b"".join(self._asked(self._place, self._stop()))
            start = self._place - self._from
            found = self._ahead[start : start + len(buffer)]
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)

    def _stop(self) -> int:
        """Say up to which byte to read, from the place on."""
        if self._place >= self._end:
            return min(self._size, self._place + _BEYOND_BYTES)
        return min(self._end, self._place + _AT_ONCE * BLOCK_BYTES)

    def _asked(self, first: int, end: int) -> list[bytes]:
        starts = list(range(first, end, BLOCK_BYTES))
        ends = [min(start + BLOCK_BYTES, end) for start in starts]
        return read_ranges(self._system, self._address, starts, ends, self._store)

    def hold(self, first: int, end: int, on_bytes: Callable[[memoryview], None]) -> None:
        """Copy a stretch into a file without a name in the cache's folder, which goes with this one; tell its bytes.

        Raises:
            DataError: as ``read_ranges``; or the folder cannot be written to.
        """
        folder = self._store.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            for block in self._blocks(first, end):
                stream.write(block)
                on_bytes(memoryview(block))
            stream.flush()
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error.strerror}); name a folder with room: MEGAOPUS_CACHE"
            ) from error
        self._held = first, end, stream

    def _blocks(self, first: int, end: int) -> Iterator[bytes]:
        step = _AT_ONCE * BLOCK_BYTES
        for start in range(first, end, step):
            yield from self._asked(start, min(start + step, end))
