"""Chooses which files of a folder hold documents, and counts the others by reason."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from megaopus.corpus_tools.readers.registry import READERS, reader_of_file
from megaopus.corpus_tools.remote import Place, Remote
from megaopus.data.corpus import MANIFEST, TOKENS
from megaopus.errors import DataError

_METADATA = frozenset(
    (
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"),
        *("croissant.json", "manifest.json", "config.json", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    )
)
"""Names, at any depth, of JSON files that tell something about data and hold none."""
_ABOUT = re.compile(r"(readme|licen[cs]e)([-_.].*)?", re.IGNORECASE)
"""Names of texts about the data, where they lie at the top of the folder."""
_BESIDE_A_CORPUS = ("", ".scores", ".traits")
"""Endings of the folders that belong to a prepared corpus."""


@dataclass(slots=True)
class FolderFiles:
    """Names the files of a folder that hold documents, and says how many were left aside."""

    taken: list[tuple[str, Place]] = field(default_factory=list)
    """(path below the folder, path), by name."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Lists files by the reason for which they are not read."""

    def told(self) -> str:
        """Say in a line what was skipped; empty if nothing was."""
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))


def folder_files(folder: Place, exclude: Sequence[str] = ()) -> FolderFiles:
    """Choose the tables below ``folder``, or if there are none its texts.

    Skipped are hidden files and folders (a name that begins with '.' or '_'), metadata, prepared corpora and what
    matches one of ``exclude``: globs of the path below the folder, or of the name of a file or folder in it.

    Raises:
        DataError: a folder in it cannot be read, or none of its files holds documents.
    """
    names = sorted(_names(folder))
    corpora = {parent + end for parent in _prepared(names) for end in _BESIDE_A_CORPUS}
    found = FolderFiles()
    tables: list[tuple[str, Place]] = []
    texts: list[tuple[str, Place]] = []
    for name in names:
        path = folder / name
        reader = reader_of_file(path)
        if reason := _reason(PurePosixPath(name), path, corpora, exclude):
            found.skipped[reason] += 1
        elif reader is None:
            found.skipped["of unknown ending"] += 1
        else:
            (texts if reader.rows is None else tables).append((name, path))
    found.taken = tables or texts
    if tables and texts:
        found.skipped["texts beside tables"] += len(texts)
    if not found.taken:
        raise _nothing(folder, found, names)
    return found


def _names(folder: Place) -> list[str]:
    """Paths below the folder of all that is no folder; links to folders are not followed."""
    if isinstance(folder, Remote):
        return list(folder.objects)

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error

    names = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return names


def _prepared(names: Sequence[str]) -> set[str]:
    """Folders among them that are prepared corpora, '.' for the folder itself."""
    ends = {name.rpartition("/")[::2] for name in names}
    return {place or "." for place, name in ends if name == MANIFEST and (place, TOKENS) in ends}


def _reason(name: PurePosixPath, path: Place, corpora: set[str], exclude: Sequence[str]) -> str | None:
    """Say why a file is not read; None: it may hold documents."""
    parents = [str(parent) for parent in name.parents]
    if any(part[0] in "._" for part in name.parts):
        return "hidden"
    if any(fnmatchcase(each, glob) for glob in exclude for each in (str(name), *parents, *name.parts)):
        return "excluded"
    if corpora.intersection(parents):
        return "of a prepared corpus"
    if not path.is_file():
        return "links to a folder or to nothing"
    if name.name.lower() in _METADATA or (len(name.parts) == 1 and _ABOUT.fullmatch(name.name)):
        return "metadata"
    return None


def _nothing(folder: Place, found: FolderFiles, names: Sequence[str]) -> DataError:
    """The error of a folder without documents."""
    texts = " or ".join(end for reader in READERS.values() if reader.text for end in reader.endings)
    skipped = f" (skipped: {found.told()})" if found.skipped else ""
    saved = isinstance(folder, Path) and {"state.json", "dataset_dict.json"}.intersection(names)
    remedy = f"; it was saved by 'datasets': write hf:{folder}" if saved else ""
    return DataError(f"{folder}: no documents: the folder has no {texts} file, nor a table{skipped}{remedy}")
