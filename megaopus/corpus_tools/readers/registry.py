"""Keeps what documents can be read from, by name: kinds of files by their ending, other things by a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megaopus.corpus_tools.readers.stored import Part, Stored
from megaopus.corpus_tools.remote import Place
from megaopus.registry import Registry

PACKED = (".gz", ".zst")


class Row(NamedTuple):
    """Holds one row of a table and where it stands."""

    number: int
    """Of its line or row, from 1."""
    place: str
    """For messages."""
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads one kind of source; its module registers it. Either ``rows`` or ``text`` is there.

    Functions raise DataError, with the place and a remedy, for what cannot be read. What is wrong with one row alone is
    given to ``stored.leave_out`` as a FaultyError; then they go on.
    """

    endings: tuple[str, ...] = ()
    """Of the files that it reads, in lower case, such as ``.jsonl``."""
    prefix: str = ""
    """Of what it reads that is no file, such as ``hf:``; instead of ``endings``."""
    rows: Callable[[Stored], Iterator[Row]] | None = None
    """The rows of a table, in order."""
    text: Callable[[Stored], str] | None = None
    """All of a file that is one document."""
    unit: str = "row"
    """What its documents are numbered by in messages."""
    packed: bool = False
    """Its files may also be .gz or .zst (``Stored`` unpacks them)."""
    untyped: bool = False
    """Its values are all text: what looks like a number and is kept is one."""
    gives_way: bool = False
    """Another reader of the same ending, a plugin's say, comes before it."""
    name: Callable[[str], str] = lambda address: address
    """Of a prefix's: address -> what is written of it, which must not depend on where it lies."""
    domain: Callable[[str], str] = lambda address: address
    """Of a prefix's: address -> domain of documents that name none."""
    divide: Callable[[Place, int], list[Part]] | None = None
    """(file, bytes) -> parts of about so many bytes that cover the file, to be read by several tasks. Fewer than
    two, or no such function: it is read as a whole."""
    count: Callable[[Place, Part], int] | None = None
    """Of a part: its lines, where ``divide`` does not know how many lie ``before`` one."""


READERS: Registry[Reader] = Registry("source", "megaopus.corpus_tools.readers")
"""Name -> ``Reader``."""


def register_reader(name: str, reader: Reader) -> Reader:
    """Let sources be read by ``reader``. Raises ConfigError if the name is taken."""
    return READERS.register(name, reader)


def reader_of_file(path: Place) -> Reader | None:
    """The reader of a file, by its last suffix, that of a packed file set aside; None: it has no known ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED]
    ending = suffixes[-1] if suffixes else ""
    found = [reader for reader in READERS.values() if ending in reader.endings]
    return min(found, key=lambda reader: reader.gives_way, default=None)


def reader_of_prefix(address: str) -> Reader | None:
    """The reader of what is named by a prefix; None: it is a path."""
    return next((r for r in READERS.values() if r.prefix and address.startswith(r.prefix)), None)


def endings(*, packed: bool) -> list[str]:
    """Endings of the files that may be packed, or of those that may not."""
    return [ending for reader in READERS.values() if reader.packed is packed for ending in reader.endings]
