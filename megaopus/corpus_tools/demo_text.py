"""Text that any Python installation holds, as documents: documentation, source code, read-mes, licences.

Every function yields ``(id, text)`` in an order that depends on names alone, so a given Python and given package
versions give the same documents. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

from megaopus.data.permutation import mix
from megaopus.errors import DataError

Item = tuple[str, str]

SHORTEST = 200
"""Characters below which a text is no document."""
LONGEST = 6000
"""Characters at which a text is cut, at the end of a line."""
DOCUMENTED = ("numpy", "matplotlib", "networkx")
"""Installed packages whose docstrings join the standard library's: each is required by this project or by torch."""
ROOTS = ("torch", "megatron-core", "hydra-core", "omegaconf", "tokenizers", "numpy", "rich", "matplotlib")
"""Distributions whose read-mes and licences are used, with all that they require."""

# Tests and bundled applications are not library text; encodings are tables; pydoc_data is the documentation itself.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages", "_vendor"}
_LEGAL = re.compile(r"(licen[cs]e|copying|notice|authors|readme)", re.IGNORECASE)
_BREAK = re.compile(r"\S+\s*")
_DOCUMENTED_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documentation() -> Iterator[Item]:
    """The interpreter's documentation topics, and docstrings: of the standard library and of ``DOCUMENTED``."""
    topics = _topics()
    modules = {f"py:{name}": path for name, path in _modules(_stdlib(), "")}
    for package in DOCUMENTED:
        modules |= {f"py:{name}": path for name, path in _modules(_package(package), package)}
    for name in by_digest([*(f"topic:{topic}" for topic in topics), *modules]):
        if name in modules:
            yield from _docstrings(name, modules[name])
        else:
            yield from _cut(name, topics[name.partition(":")[2]])


def source_code() -> Iterator[Item]:
    """Modules of the standard library without their docstrings, which are wanted text."""
    modules = dict(_modules(_stdlib(), ""))
    for name in by_digest(list(modules)):
        text = _source(modules[name])
        tree = _parsed(text)
        if tree is not None:
            yield from _cut(f"code:{name}", _without_docstrings(text, tree))


def readmes() -> Iterator[Item]:
    """Descriptions, licences and author lists of ``distributions()``."""
    for name, distribution in distributions().items():
        description = distribution.metadata["Description"] or distribution.metadata.get_payload()  # type: ignore[attr-defined]
        yield from _cut(f"readme:{name}", str(description or ""))
        files = [file for file in distribution.files or [] if _LEGAL.match(file.name)]
        for file in sorted(files, key=str):
            if file.suffix.lower() in ("", ".txt", ".md", ".rst"):
                label = re.sub(r"^[^/]*\.dist-info/", "", file.as_posix())
                text = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
                yield from _cut(f"licence:{name}/{label}", text)


def noise(texts: list[str], seed: int = 0) -> Iterator[Item]:
    """The words of ``texts`` in scrambled order: the same words at the same rates, and nothing to learn beyond that.

    Words (with the white space after them) are shuffled within blocks of ``LONGEST`` characters, in the order of a
    counter scrambled with the seed.
    """
    words: list[str] = []
    size = block = 0
    for text in texts:
        for word in _BREAK.findall(text):
            words.append(word)
            size += len(word)
            if size >= LONGEST:
                yield f"noise:{block}", _shuffled(words, seed, block)
                words, size, block = [], 0, block + 1


def distributions() -> dict[str, importlib.metadata.Distribution]:
    """``ROOTS`` and what they require of this Python and platform, extras left out; by normalised name, sorted.

    Raises:
        DataError: one of the roots is not installed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(ROOTS)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in ROOTS:
                raise DataError(f"{name} is not installed, though this project requires it; run 'make setup'") from None
            continue  # this installation does without
        found[name] = distribution
        for requirement in map(Requirement, distribution.requires or []):
            # one meant for another Python may be here for another package's sake, which is no reason to read it
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return dict(sorted(found.items()))


def by_digest(names: list[str]) -> list[str]:
    """Names in the order of their digests: a fixed order that favours no part of the alphabet."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python lacks its documentation topics (module pydoc_data); install the full standard library"
        ) from None
    return topics


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    return Path(str(importlib.metadata.distribution(name).locate_file(name)))


def _modules(root: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """``(dotted name, path)`` of each module under a folder, sorted."""
    found = 0
    for path in sorted(root.rglob("*.py")):
        parts = [*([prefix] if prefix else []), *path.relative_to(root).with_suffix("").parts]
        # _sysconfigdata holds the paths of the machine that built Python.
        usable = not any(part in _SKIPPED or not part.isidentifier() for part in parts)
        if usable and not parts[-1].startswith("_sysconfigdata"):
            found += 1
            yield ".".join(parts).removesuffix(".__init__"), path
    if not found:
        raise DataError(f"{root}: no Python sources there; the demo corpus needs an installation with .py files")


def _source(path: Path) -> str:
    with tokenize.open(path) as stream:
        return stream.read()


def _parsed(text: str) -> ast.Module | None:
    """The syntax tree; None for a file written for another version of Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except SyntaxError:
        return None


def _docstrings(name: str, path: Path) -> Iterator[Item]:
    tree = _parsed(_source(path))
    if tree is not None:
        for qualified, node in _definitions(tree, name):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield from _cut(qualified, text)


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    """Every module, class and function with its dotted name, in source order."""
    if isinstance(node, _DOCUMENTED_NODES):
        yield name, node  # type: ignore[misc]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DOCUMENTED_NODES):
            yield from _definitions(child, f"{name}.{child.name}")  # type: ignore[union-attr]
        elif isinstance(child, ast.stmt):
            yield from _definitions(child, name)


def _without_docstrings(text: str, tree: ast.Module) -> str:
    """The source with every docstring taken out, and ``...`` where it was all there was."""
    lines = text.encode().splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED_NODES) and ast.get_docstring(node, clean=False) is not None:
            literal = node.body[0]
            first, last = literal.lineno - 1, (literal.end_lineno or literal.lineno) - 1
            before, after = lines[first][: literal.col_offset], lines[last][literal.end_col_offset :]
            alone = not before.strip() and not after.strip()
            kept = b"" if alone and len(node.body) > 1 else before + b"..." + after
            lines[first : last + 1] = [kept, *[b""] * (last - first)]
    return b"".join(lines).decode()


def _cut(name: str, text: str) -> Iterator[Item]:
    """Pieces of at most ``LONGEST`` characters, cut after a line where there is one; short ends are dropped."""
    start = number = 0
    while len(text) - start >= SHORTEST:
        end = start + LONGEST
        if end < len(text):
            end = text.rfind("\n", start + LONGEST // 2, end) + 1 or end
        piece = text[start:end].strip("\n")
        if len(piece.strip()) >= SHORTEST:
            yield (f"{name}#{number}" if number else name), piece + "\n"
        start, number = end, number + 1


def _shuffled(words: list[str], seed: int, block: int) -> str:
    with np.errstate(over="ignore"):
        base = mix(np.array([seed], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(block + 1))
    order = np.argsort(mix(base + np.arange(len(words), dtype=np.uint64)), kind="stable")
    return "".join(words[index] for index in order)
