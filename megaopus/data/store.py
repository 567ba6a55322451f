"""Reads corpora that lie in an object store: their small files once into a cache, their tokens range by range."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megaopus.data.locks import alone
from megaopus.data.schemes import SCHEMES
from megaopus.errors import DataError, StoreDownError

BLOCK_BYTES = 1 << 17
"""Asked for at a time: a sequence is a few KiB anywhere in a file, and a request takes longer than these bytes."""
_AT_ONCE = 64
"""Blocks that are asked for together."""
_FIRST_WAIT_S = 0.5
"""Before a store is asked the second time; it grows to 8."""
CACHE = "MEGAOPUS_CACHE"
"""Environment variable that names the folder for copies."""
_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://", re.IGNORECASE)
_MISTAKES = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "NoRegionError",
    "InvalidRegionError",
)
"""Errors of botocore that come of what its user wrote, not of the network."""
WHERE = "store.json"
"""The file in a local copy of a corpus's small files that says where its tokens are."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Store:
    """Says how object stores are read."""

    most_bytes: int = 1 << 30
    """Of blocks of each token file that each process keeps there."""
    patience_s: float = 600.0
    """Seconds for which a store that does not answer is asked again."""

    @property
    def folder(self) -> Path:
        """Give the folder of this machine for copies: that of MEGAOPUS_CACHE, else megaopus among the user's caches."""
        if named := os.environ.get(CACHE):
            return Path(named)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaopus"


def is_address(path: str | Path) -> bool:
    """Tell whether this names something in an object store."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def open_store(address: str) -> Any:
    """Give the fsspec file system of an address. Raises DataError if what it needs is not installed."""
    try:
        import fsspec

        once = {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 30}  # ``patiently`` asks again
        scheme = address.partition("://")[0].lower()
        system = fsspec.filesystem(scheme, config_kwargs=once, use_listings_cache=False)  # what lies there may change
        system.retries = 1
        return system
    except ImportError as error:
        raise DataError(f"{address}: {error}; pip install 'megaopus[s3]'") from error


def patiently(address: str, ask: Callable[[], T], patience_s: float, *, first: bool = False) -> T:
    """Return what ``ask`` returns, asking again for a while where the store does not answer.

    ``first``: nothing was read of it so far, so that keys which are not there are none that will come back.

    Raises:
        DataError: there is no such thing, or it may not be read.
        StoreDownError: the store has not answered for ``patience_s``.
    """
    until, wait, told = time.monotonic() + patience_s, _FIRST_WAIT_S, False
    while True:
        try:
            return ask()
        except FileNotFoundError as error:
            raise DataError(f"{address}: no such object ({error}); name what lies there") from error
        except PermissionError as error:
            raise DataError(f"{address}: may not be read ({error}); give this user's keys the right to") from error
        except Exception as error:  # each store has errors of its own for what comes of the network
            if first and type(error).__name__ in _MISTAKES:
                said = " ".join(str(error).split())
                raise DataError(
                    f"{address}: cannot be asked for ({said}); check the address, AWS_ACCESS_KEY_ID,"
                    " AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and AWS_DEFAULT_REGION"
                ) from error
            if time.monotonic() + wait > until:
                raise StoreDownError(
                    f"{address}: not answered for {patience_s:.0f} s ({type(error).__name__}: {error}); when the store"
                    " answers again the same command goes on"
                ) from error
            if not told:
                warnings.warn(f"{address}: not answered ({error}); asking again for {patience_s:.0f} s", stacklevel=2)
                told = True
            time.sleep(wait)
            wait = min(2 * wait, 8.0)


class RangeReader:
    """Reads stretches of bytes of an object, block by block, through a bounded cache of files; any thread may call."""

    def __init__(self, address: str, size: int, store: Store, version: str = ""):
        """``version``: of what lies there, so that blocks of what lay there before are not taken for it."""
        self._address, self._size, self._store = address, size, store
        self._system = open_store(address)
        key = hashlib.sha256(f"{address} {size} {version}".encode()).hexdigest()[:16]
        self._cache = _Blocks(store.folder / "blocks" / key, store.most_bytes)

    def read(self, offsets: np.ndarray, counts: np.ndarray) -> list[bytes]:
        """Read so many bytes at each of the offsets, (n,) each.

        Raises:
            DataError: see ``patiently``; or the object is shorter than it was.
        """
        spans = list(zip(offsets.tolist(), (offsets + counts).tolist(), strict=True))
        wanted = list(dict.fromkeys(number for span in spans for number in _blocks_of(*span)))
        blocks = {number: found for number in wanted if (found := self._cache.get(number)) is not None}
        missing = [number for number in wanted if number not in blocks]
        for first in range(0, len(missing), _AT_ONCE):
            blocks |= self._fetch(missing[first : first + _AT_ONCE])
        return [self._cut(blocks, start, end) for start, end in spans]

    def _fetch(self, numbers: list[int]) -> dict[int, bytes]:
        starts = [number * BLOCK_BYTES for number in numbers]
        ends = [min(start + BLOCK_BYTES, self._size) for start in starts]
        found = read_ranges(self._system, self._address, starts, ends, self._store)
        for number, block in zip(numbers, found, strict=True):
            self._cache.put(number, block)
        return dict(zip(numbers, found, strict=True))

    @staticmethod
    def _cut(blocks: dict[int, bytes], start: int, end: int) -> bytes:
        parts = []
        for number in _blocks_of(start, end):
            begin = number * BLOCK_BYTES
            parts.append(blocks[number][max(0, start - begin) : end - begin])
        return b"".join(parts)


def _blocks_of(start: int, end: int) -> range:
    """Number the blocks that bytes lie in."""
    return range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES) if end > start else start // BLOCK_BYTES)


class _Blocks:
    """Keeps blocks as files, the last used ones, up to a number of bytes; any thread may call."""

    def __init__(self, folder: Path, most_bytes: int):
        self._folder, self._most = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted((path.stat().st_mtime, path) for path in folder.glob("[0-9]*"))
        self._sizes: OrderedDict[int, int] = OrderedDict((int(path.name), path.stat().st_size) for _, path in there)
        self._held = sum(self._sizes.values())
        self._turn = threading.Lock()

    def get(self, number: int) -> bytes | None:
        with self._turn:
            try:
                found = (self._folder / str(number)).read_bytes()
            except FileNotFoundError:  # never there, or another process made room
                self._held -= self._sizes.pop(number, 0)
                return None
            self._use(number, len(found))
            return found

    def put(self, number: int, block: bytes) -> None:
        with self._turn:
            growing = self._folder / f".{number}.{os.getpid()}"
            growing.write_bytes(block)
            growing.rename(self._folder / str(number))
            self._use(number, len(block))
            while self._held > self._most and len(self._sizes) > 1:
                oldest, size = self._sizes.popitem(last=False)
                self._held -= size
                (self._folder / str(oldest)).unlink(missing_ok=True)

    def _use(self, number: int, size: int) -> None:
        """Count a block that is there, as the one used last."""
        self._held += size - self._sizes.get(number, 0)
        self._sizes[number] = size
        self._sizes.move_to_end(number)


def read_ranges(system: Any, address: str, starts: list[int], ends: list[int], store: Store) -> list[bytes]:
    """Read stretches of an object, all at once, through the file system of ``open_store``.

    Raises:
        DataError: see ``patiently``; or the object is shorter than it was.
    """

    def ask() -> list[bytes]:
        found: list[bytes] = system.cat_ranges([address] * len(starts), starts, ends, on_error="raise")
        return found

    found = patiently(address, ask, store.patience_s)
    if [len(each) for each in found] != [end - start for start, end in zip(starts, ends, strict=True)]:
        raise DataError(f"{address}: cut off since it was opened; put it back, the same command then goes on")
    return found


def sha256_object(address: str, size: int, store: Store) -> str:
    """Hex digest of the ``size`` bytes of an object, read past the cache. Raises DataError as ``read_ranges``."""
    system, step, found = open_store(address), _AT_ONCE * BLOCK_BYTES, hashlib.sha256()
    for first in range(0, size, step):
        for block in read_ranges(system, address, [first], [min(first + step, size)], store):
            found.update(block)
    return found.hexdigest()


def fetch(address: str, target: Path, store: Store) -> None:
    """Copy an object into a file, which appears when it is whole. Raises DataError as ``patiently``."""
    system, growing = open_store(address), target.with_name(f".{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    patiently(address, lambda: system.get_file(address, str(growing)), store.patience_s)
    growing.rename(target)


def read_object(address: str, store: Store) -> bytes:
    """Read all of a small object, the first of what is read of a corpus. Raises DataError as ``patiently``."""
    system = open_store(address)
    found: bytes = patiently(address, lambda: system.cat_file(address), store.patience_s, first=True)
    return found


def size_of(address: str, store: Store) -> int:
    """Say how many bytes an object has. Raises DataError as ``patiently``."""
    system = open_store(address)
    return int(patiently(address, lambda: system.info(address)["size"], store.patience_s))


def local_copy(address: str, store: Store, small: Callable[[dict[str, Any]], list[str]]) -> Path:
    """Copy the small files of the corpus at ``address`` into the cache, once; returns their folder.

    ``small``: which of the files of a manifest are copied at once. They are checked by their digests.

    Raises:
        DataError: there is no corpus, or see ``patiently``.
    """
    address = address.rstrip("/")
    content = read_object(f"{address}/manifest.json", store)
    key = hashlib.sha256(address.encode() + content).hexdigest()[:16]
    folder = store.folder / "corpora" / f"{address.rpartition('/')[2]}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.parent):
        if folder.is_dir():
            return folder
        growing = folder.with_name(f".{folder.name}.partial")
        _copy(address, growing, json.loads(content), small, store)
        (growing / "manifest.json").write_bytes(content)
        (growing / WHERE).write_text(json.dumps({"address": address}) + "\n", encoding="utf-8")
        growing.rename(folder)
    return folder


def _copy(
    address: str, folder: Path, manifest: dict[str, Any], small: Callable[[dict[str, Any]], list[str]], store: Store
) -> None:
    """Copy the small files that a manifest lists, and check their digests."""
    for name in small(manifest):
        fetch(f"{address}/{name}", folder / name, store)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if digest != manifest["files"][name]["sha256"]:
            raise DataError(f"{address}/{name}: not the file that the manifest lists (other sha256); copy it again")
