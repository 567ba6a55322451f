"""A prepared corpus on disk: what its files are called, how they are checked, and a memory-mapped view of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megaopus.data.index import LARGE, Index, check_index, count_tokens, map_index
from megaopus.data.store import WHERE, RangeReader, Store, fetch, is_address, local_copy, sha256_object, size_of
from megaopus.data.token_files import ByteReader, Reader, TokenFiles
from megaopus.data.tokenizer import load_tokenizer
from megaopus.errors import DataError

FORMAT_VERSION, MASKED_VERSION, SHARDED_VERSION = 1, 2, 3
"""Of a folder; the second has a loss mask, which a reader of the first would not obey; the third's tokens lie in the
files that its manifest lists under ``shards``, and it may lack a loss mask and a table of documents."""
SPLITS = ("pool", "proxy", "validation")
TARGET = "target"
"""The split of what a proxy was not made with (``Corpus.target``), and the folder in a corpus that holds it."""
SPLIT_NAMES = (*SPLITS, "left_out", TARGET)
LEFT_OUT, HELD_OUT = len(SPLITS), len(SPLITS) + 1
"""Of a document that is in no split, as copies of the choice of the verb proxy, and of one of the held-out target."""
MANIFEST = "manifest.json"
TOKENS, INDEX, ROWS, CODES, TOKENIZER = "tokens.bin", "tokens.idx", "documents.jsonl", "documents.npy", "tokenizer.json"
FILES = (TOKENS, INDEX, ROWS, CODES, TOKENIZER)
LOSS_MASK = "loss_mask.bin"
"""A bit for each token, the lowest of a byte first: whether it counts in the loss. Not there: all do."""
CODE_DTYPE = np.dtype([("domain", "<u2"), ("split", "u1")])
"""Row of documents.npy: index into the manifest's ``domains``, index into ``SPLIT_NAMES``."""

_SAMPLES, _SAMPLE_BYTES = 256, 1 << 16
"""Blocks of a sampled digest, and bytes of each."""
_DOCUMENTS = 1 << 12
"""Documents whose loss mask is read at a time."""

_KEYS = {
    "format_version",
    "fingerprint",
    "domains",
    "documents",
    "tokens",
    "vocab_size",
    "eod_id",
    "token_dtype",
    "files",
}


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """Hex digest of a file's size and of 256 blocks of 64 KiB spread evenly over it, for files of many terabytes."""
    size, found = path.stat().st_size, hashlib.sha256()
    found.update(size.to_bytes(8, "little"))
    with path.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest()


def fingerprint_of(manifest: dict) -> str:
    """Digest of what a run can see of a corpus: contents and meaning of its files, not their place or age."""
    keys = sorted(_KEYS - {"fingerprint", "files"})
    place = {name: f"shard {number}" for number, name in enumerate(manifest.get("shards", ()))}
    seen = {key: manifest[key] for key in keys} | {
        "files": {place.get(name, name): entry["sha256"] for name, entry in manifest["files"].items()}
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Tokens and per-document table of a prepared corpus; D documents lie one after the other in ``tokens``."""

    path: Path
    manifest: dict
    tokens: np.ndarray | TokenFiles
    """(T,) all tokens, memory-mapped; each document ends with ``eod_id``."""
    files: TokenFiles
    """What they lie in."""
    where: _Places
    """Says where each file lies."""
    index: Index
    """Of the D documents, memory-mapped."""
    domain_codes: np.ndarray
    """(D,) uint16, index into ``domains``."""
    split_codes: np.ndarray
    """(D,) uint8, index into ``SPLIT_NAMES``."""

    @classmethod
    def open(cls, path: str | Path, verify: bool = False, store: Store | None = None) -> Corpus:
        """Map a folder written by ``prepare``, here or in an object store (``s3://...``).

        Sizes and counts are always checked against the manifest; that documents lie one after the other, of a small
        corpus; of a large one when it is laid out.

        Args:
            path: the corpus folder.
            verify: also read every file once: digests, and every token below the vocabulary size.
            store: how an object store is read; None: ``Store()``.

        Raises:
            DataError: something is missing, cut off, or not what the manifest says.
        """
        store = store or Store()
        folder = corpus_folder(path, store)
        manifest = _read_manifest(folder)
        where = _Places(folder, store)
        _check_sizes(where, manifest)
        if verify:
            _check_digests(where, manifest)
        index = _map_index(folder / INDEX, manifest)
        if verify or len(index.lengths) < LARGE:
            check_index(folder / INDEX, index)
        codes = _read_codes(folder / CODES, manifest)
        dtype = np.dtype(manifest["token_dtype"])
        names = token_files(manifest)
        sizes = [manifest["files"][name]["bytes"] for name in names]
        remote = partial(RangeReader, store=store, version=manifest["fingerprint"])
        files = TokenFiles([where.of(name) for name in names], sizes, dtype, remote)
        if verify:
            _check_vocabulary(files, manifest["vocab_size"])
        tokens = files.maps[0] if len(files.maps) == len(names) == 1 else files
        found = cls(folder, manifest, tokens, files, where, index, codes["domain"], codes["split"])
        if verify and found.target is not None:
            cls.open(found.target.path, verify=True, store=store)
        return found

    def __len__(self) -> int:
        return len(self.index.lengths)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(D,) int64, tokens of each document: made when first asked for, in memory of this process."""
        return self.index.lengths.astype(np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(D,) int64, position of each document's first token; as ``lengths``."""
        return self.offsets_of(slice(None))

    def lengths_of(self, documents: np.ndarray | slice) -> np.ndarray:
        """Give the tokens of some documents, by their numbers: (n,) int64."""
        return self.index.lengths[documents].astype(np.int64)

    def offsets_of(self, documents: np.ndarray | slice) -> np.ndarray:
        """Give the positions of some documents' first tokens, by their numbers: (n,) int64."""
        return np.asarray(self.index.offsets[documents]) // self.index.dtype.itemsize

    @property
    def fingerprint(self) -> str:
        """Same fingerprint: same documents, tokens, splits and tokenizer."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return self.manifest["vocab_size"]

    @property
    def eod_id(self) -> int:
        """The token that ends each document."""
        return self.manifest["eod_id"]

    @property
    def domains(self) -> list[str]:
        """Names, sorted."""
        return self.manifest["domains"]

    @property
    def masked(self) -> bool:
        """Tell whether the loss leaves out some of the tokens."""
        return LOSS_MASK in self.manifest["files"]

    def loss_share(self, split: str) -> float | None:
        """Share of a split's tokens that count in the loss; None: all do."""
        counts = [splits[split] for splits in self.manifest["counts"].values()]
        tokens = sum(each["tokens"] for each in counts)
        return sum(each["loss_tokens"] for each in counts) / tokens if self.masked and tokens else None

    @property
    def tokenizer_sha256(self) -> str:
        """Two corpora can be mixed in a run only if theirs are equal."""
        return self.manifest["files"][TOKENIZER]["sha256"]

    @cached_property
    def target(self) -> Corpus | None:
        """Open, when first asked, what the verb proxy held out; None: nothing.

        A small corpus of its own in the folder ``target``, all of it in the split of that name: benchmark items that no
        document was looked for by (domain ``items``), and documents near to the other items (domain ``nearest``).

        Raises:
            DataError: it is not there, or not the one that this corpus was made with.
        """
        if TARGET not in self.manifest:
            return None
        folder, remedy = self.where.of(TARGET), f"copy the whole folder {self.path} again"
        if isinstance(folder, Path) and not folder.is_dir():
            raise DataError(f"{folder}: missing, though the manifest of its corpus names it; {remedy}")
        found = Corpus.open(folder, store=self.where.store)
        if found.fingerprint != self.manifest[TARGET]["fingerprint"]:
            raise DataError(f"{folder}: another target than this corpus was made with; {remedy}")
        return found

    @cached_property
    def ids(self) -> list[str]:
        """Document ids in corpus order, read from documents.jsonl when first asked for; numbers where there is none."""
        if ROWS not in self.manifest["files"]:
            return list(map(str, range(len(self))))
        with self.table().open(encoding="utf-8") as rows:
            return [json.loads(row)["id"] for row in rows]

    @property
    def remote(self) -> bool:
        """Tell whether its tokens are in an object store."""
        return any(isinstance(place, str) for place in self.files.places)

    def table(self) -> Path:
        """Find the table of documents, copied here when first asked for where it is in an object store."""
        path, place = self.path / ROWS, self.where.of(ROWS)
        if isinstance(place, str):
            fetch(place, path, self.where.store)
        return path

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return load_tokenizer(self.path / TOKENIZER)

    @cached_property
    def _decoder(self) -> Tokenizer:
        return self.tokenizer()

    @cached_property
    def _mask(self) -> Reader:
        place = self.where.of(LOSS_MASK)
        if isinstance(place, Path):
            return ByteReader(place)
        return RangeReader(place, self.manifest["files"][LOSS_MASK]["bytes"], self.where.store, self.fingerprint)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read stretches of the tokens, one after the other: (sum of ``lengths``,) of the files' own dtype.

        By read calls, where the memory map would kill the process when a file cannot be read. Any thread may call.

        Args:
            starts: position of each stretch's first token.
            lengths: tokens of each, all of one document.

        Raises:
            DataError: a file cannot be read, or was cut off after it was opened.
        """
        return self.files.read(starts, lengths)

    def read_mask(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Say which tokens of the same stretches count in the loss: (sum of ``lengths``,) bool. Raises as ``read``.

        Only where the corpus is ``masked``.
        """
        first, skipped = starts // 8, starts % 8
        pieces = self._mask.read(first, (skipped + lengths + 7) // 8)
        bits = (np.unpackbits(np.frombuffer(piece, np.uint8), bitorder="little") for piece in pieces)
        found = [each[skip : skip + count] for each, skip, count in zip(bits, skipped, lengths, strict=True)]
        return np.concatenate(found).astype(bool) if found else np.empty(0, bool)

    def loss_tokens(self) -> np.ndarray:
        """Count the tokens of each document that count in the loss: (D,) int64. Raises as ``read``."""
        if not self.masked:
            return self.lengths
        found = np.empty(len(self), dtype=np.int64)
        for first in range(0, len(self), _DOCUMENTS):
            part = slice(first, first + _DOCUMENTS)
            lengths = self.lengths_of(part)
            mask = self.read_mask(self.offsets_of(part), lengths)
            found[part] = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64)
        return found

    def decode(self, start: int, end: int) -> str:
        """The text of the tokens from position ``start`` to before ``end`` in the token file."""
        return str(self._decoder.decode(self.tokens[start:end].tolist(), skip_special_tokens=False))

    def texts(self, documents: Items[int] | np.ndarray, most: int | None = None) -> list[str]:
        """The text of documents by their numbers, without the end-of-document token; of ``most`` tokens at most."""
        numbers = np.asarray(documents, dtype=np.int64)
        lengths, starts = self.lengths_of(numbers) - 1, self.offsets_of(numbers)
        ends = starts + (lengths if most is None else np.minimum(lengths, most))
        spans = [self.tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
        return self._decoder.decode_batch(spans, skip_special_tokens=False)


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        what = "no such folder" if not folder.exists() else f"not a prepared corpus (no {MANIFEST})"
        raise DataError(f"{folder}: {what}; make it with 'python -m megaopus prepare --out {folder} --source FILE'")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted(_KEYS - set(manifest))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); prepare the corpus again") from error
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; prepare the corpus again")
    if manifest["format_version"] not in (FORMAT_VERSION, MASKED_VERSION, SHARDED_VERSION):
        raise DataError(
            f"{path}: format version {manifest['format_version']}, this megaopus reads {FORMAT_VERSION} to"
            f" {SHARDED_VERSION}; prepare the corpus again, or use the megaopus that wrote it"
        )
    if set(manifest["files"]) != set(files_of(manifest)) or fingerprint_of(manifest) != manifest["fingerprint"]:
        raise DataError(
            f"{path}: its fingerprint does not fit its contents, so it was edited or mixed up; prepare the corpus again"
        )
    return manifest


def files_of(manifest: dict) -> tuple[str, ...]:
    """Name the files that a folder of this format has beside its manifest."""
    if manifest["format_version"] == SHARDED_VERSION:
        optional = (name for name in (ROWS, LOSS_MASK) if name in manifest.get("files", ()))
        return (INDEX, CODES, TOKENIZER, *optional, *manifest["shards"])
    return (*FILES, LOSS_MASK) if manifest["format_version"] == MASKED_VERSION else FILES


def token_files(manifest: dict) -> list[str]:
    """Name the files that the tokens lie in, in order: in the folder, or anywhere by absolute paths."""
    return manifest["shards"] if manifest["format_version"] == SHARDED_VERSION else [TOKENS]


class _Places(NamedTuple):
    """Says where the files of a corpus lie: in a folder, elsewhere on this machine, or in an object store."""

    folder: Path
    store: Store

    def of(self, name: str) -> Path | str:
        """A path; an address, where only the store has it."""
        path = self.folder / name
        if path.exists() or (address := self._address()) is None:
            return path
        return f"{address}/{name}"

    def _address(self) -> str | None:
        known = self.folder / WHERE
        return json.loads(known.read_text(encoding="utf-8"))["address"] if known.is_file() else None


def corpus_folder(path: str | Path, store: Store) -> Path:
    """Give the folder of a corpus: a copy of its small files, made once, where it lies in an object store."""
    if not is_address(path):
        return Path(path)
    return local_copy(str(path), store, _small)


def _small(manifest: dict) -> list[str]:
    """Name the files of a corpus that every process opens whole."""
    large = {*token_files(manifest), LOSS_MASK, ROWS}
    return [name for name in manifest["files"] if name not in large]


def _check_sizes(where: _Places, manifest: dict) -> None:
    for name in manifest["files"]:
        path, expected = where.of(name), manifest["files"][name]["bytes"]
        if isinstance(path, Path) and not path.is_file():
            raise DataError(f"{path}: missing, though the manifest lists it; copy the whole folder again")
        found = path.stat().st_size if isinstance(path, Path) else size_of(path, where.store)
        if found != expected:
            change = "cut off" if found < expected else "longer than it was"
            raise DataError(
                f"{path}: {change}: {found:,} bytes, {expected:,} by the manifest; copy or prepare it again"
            )


def _check_digests(where: _Places, manifest: dict) -> None:
    for name, entry in manifest["files"].items():
        path = where.of(name)
        if isinstance(path, Path):
            found = sampled_sha256(path) if entry.get("sampled") else sha256_file(path)
        else:
            found = sha256_object(path, entry["bytes"], where.store)
        if found != entry["sha256"]:
            raise DataError(
                f"{path}: changed since it was prepared (sha256 differs from {MANIFEST}), so the fingerprint "
                "no longer stands for it; copy or prepare the corpus again"
            )


def _map_index(path: Path, manifest: dict) -> Index:
    """Map the index. Raises DataError if it is not that of the manifest's documents and token file."""
    found = map_index(path)
    documents, total = manifest["documents"], count_tokens(found)
    if found.dtype != np.dtype(manifest["token_dtype"]):
        raise DataError(f"{path}: tokens of {found.dtype}, {manifest['token_dtype']} by the manifest; prepare it again")
    if len(found.lengths) != documents:
        count = len(found.lengths)
        raise DataError(f"{path}: {count:,} documents, {documents:,} by the manifest; prepare the corpus again")
    names = token_files(manifest)
    size = sum(manifest["files"][name]["bytes"] for name in names)
    if total != manifest["tokens"] or total * found.dtype.itemsize != size:
        raise DataError(
            f"{path}: its documents have {total:,} tokens, {names[0]} has {manifest['tokens']:,} by the manifest; "
            "the two do not belong together, prepare the corpus again"
        )
    return found


def _read_codes(path: Path, manifest: dict) -> np.ndarray:
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a numpy file ({error}); copy or prepare it again") from error
    if codes.dtype != CODE_DTYPE or codes.shape != (manifest["documents"],):
        raise DataError(
            f"{path}: {codes.shape} rows of {codes.dtype}, but the manifest has {manifest['documents']:,} documents; "
            "prepare the corpus again"
        )
    return codes


def _check_vocabulary(files: TokenFiles, vocab_size: int) -> None:
    block = 1 << 24
    for start in range(0, len(files), block):
        chunk = files[start : start + block]
        bad = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
        if len(bad):
            position = start + int(bad[0])
            raise DataError(
                f"{files.place_of(position)}: token {int(chunk[bad[0]])} at position {position:,} lies outside the "
                f"vocabulary of {vocab_size:,}; prepare the corpus again with the tokenizer it is used with"
            )
