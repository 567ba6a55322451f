"""Who may import whom, that nobody imports in circles, and how long files and functions may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megaopus"
LONGEST_FILE, LONGEST_FUNCTION = 500, 60  # lines, as CONTRIBUTING.md says
ANY = None
LEAVES = {"errors", "fs", "settings", "events"}
"""Modules that import nothing of ours but ``errors``."""
LIBRARY = {"distributed", "selection", "record", "data", "models", "optim", "checkpoint"}
"""Rooms that work without a run."""
# Room (package or module at the top) -> rooms, or modules of rooms, that it may import from besides leaves.
MAY_IMPORT: Mapping[str, set[str] | None] = {
    "__init__": set(),
    **{leaf: set() for leaf in LEAVES},
    "distributed": set(),
    "selection": set(),
    "data": {"distributed"},
    "corpus_tools": {"data"},
    "models": {"distributed"},
    "optim": {"distributed"},
    "record": {"distributed", "selection.candidate_table"},
    "checkpoint": {"distributed"},
    "engine": {"distributed", "models", "optim", "selection"},
    "training": {"checkpoint", "data", "distributed", "engine.base", "record", "selection"},
    "changes": set(),
    "rules": {"changes", "models.flops", "config"},
    "config": {"changes", "rules", "training.config", "engine.config"} | {f"{room}.config" for room in LIBRARY},
    "score": {"build", "checkpoint", "config", "corpus_tools", "data", "distributed", "engine", "selection"},
    "report": {"build", "config", "data", "record", "selection"},
    "check": ANY,
    "build": ANY,
    "demo": ANY,
    "__main__": ANY,
}
ONLY_IN = {
    "megatron": {"models", "engine", "distributed", "optim", "checkpoint", "data"},
    "deepspeed": {"engine"},
    "hydra": {"config"},
    "omegaconf": {"config"},
    "wandb": {"record"},
    "tokenizers": {"data", "corpus_tools"},
    "matplotlib": {"report"},
    "pyarrow": {"data", "corpus_tools", "record", "report"},
    "pytorch_optimizer": {"optim"},
    "transformers": {"score"},
    "fasttext": {"score"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("megaopus", "tests", "benchmarks", "launch") for path in ROOT.glob(f"{folder}/**/*.py")
)


def imported(source: str) -> set[str]:
    """Modules named by any import statement, wherever it stands (inside functions and TYPE_CHECKING too)."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names |= {f"megaopus.{alias.name}" for alias in node.names} if module == "megaopus" else {module}
    return names


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def breaches(name: str, source: str) -> list[str]:
    """What a file of room ``name`` imports against the tables above."""
    allowed, found = MAY_IMPORT[name], []
    for module in sorted(imported(source)):
        root, *rest = module.split(".")
        if root == "megaopus" and rest and rest[0] != "__version__":
            leaf = rest[0] in LEAVES and (name not in LEAVES or rest[0] == "errors")
            granted = allowed is ANY or rest[0] in allowed or ".".join(rest[:2]) in allowed
            if not (rest[0] == name or leaf or granted):
                found.append(f"{name} must not import {module}")
        elif root in ONLY_IN and name not in ONLY_IN[root]:
            found.append(f"{root} is not for {name}")
        elif name == "selection" and root not in sys.stdlib_module_names | {"torch", "megaopus"}:
            found.append(f"selection needs torch and the standard library only, not {module}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_rooms(file):
    assert breaches(room(file), file.read_text()) == []


def test_the_launcher_needs_the_standard_library_only():
    for file in (ROOT / "launch").glob("*.py"):
        assert {name.split(".")[0] for name in imported(file.read_text())} <= sys.stdlib_module_names


def test_a_breach_is_seen():
    assert breaches("data", "from megaopus.selection import Selector") == ["data must not import megaopus.selection"]
    assert breaches("data", "def f():\n    from megaopus import config") == ["data must not import megaopus.config"]
    assert breaches("config", "import megaopus.data.corpus") == ["config must not import megaopus.data.corpus"]
    assert breaches("selection", "import numpy") == ["selection needs torch and the standard library only, not numpy"]
    assert breaches("selection", "import megatron.core") == ["megatron is not for selection"]
    assert breaches("record", "import wandb\nimport hydra") == ["hydra is not for record"]
    assert breaches("fs", "import megaopus.events") == ["fs must not import megaopus.events"]
    assert breaches("config", "from megaopus.data.config import DataConfig\nimport hydra") == []
    assert breaches("training", "from megaopus.engine.base import Engine") == []
    assert breaches("training", "import megaopus.engine.megatron.engine") == [
        "training must not import megaopus.engine.megatron.engine"
    ]


# -- circles ---------------------------------------------------------------------------------------------------------


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def named(source: str) -> Iterator[str]:
    """Every module that the source may mean: imports at any depth, their members, and names in strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def graph_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> modules of ours that it names; what a package is to its own modules does not count."""
    return {
        name: {
            other for other in named(text) if other in sources and other != name and not name.startswith(other + ".")
        }
        for name, text in sources.items()
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Kosaraju's algorithm)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, edges: Mapping[str, set[str]], found: list[str]) -> None:
        stack = [(start, iter(edges[start]))]
        seen.add(start)
        while stack:
            name, rest = stack[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                found.append(name)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(edges[following])))

    for name in graph:
        if name not in seen:
            visit(name, graph, order)
    back: dict[str, set[str]] = {name: set() for name in graph}
    for name, others in graph.items():
        for other in others:
            back[other].add(name)
    seen.clear()
    components = []
    for name in reversed(order):
        if name not in seen:
            visit(name, back, component := [])
            components.append(sorted(component))
    return [component for component in components if len(component) > 1]


def test_nobody_imports_in_circles():
    assert circles(graph_of({module_name(file): file.read_text() for file in FILES})) == []


def test_a_circle_is_seen():
    sources = {
        "megaopus.a": "def f():\n    from megaopus import b",
        "megaopus.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megaopus.c import C",
        "megaopus.c": "import importlib\nimportlib.import_module('megaopus.a')",
        "megaopus.d": "import megaopus.a",
    }
    assert circles(graph_of(sources)) == [["megaopus.a", "megaopus.b", "megaopus.c"]]


# -- sizes -----------------------------------------------------------------------------------------------------------


def too_long(source: str) -> Iterator[str]:
    """The file, and its functions, that are longer than CONTRIBUTING.md allows."""
    if (lines := source.count("\n")) > LONGEST_FILE:
        yield f"{lines} lines, at most {LONGEST_FILE}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{node.name} has {lines} lines, at most {LONGEST_FUNCTION}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file):
    assert list(too_long(file.read_text())) == []


def test_what_is_too_long_is_seen():
    body = "    x = 1\n" * LONGEST_FUNCTION
    assert list(too_long(f"def f():\n{body}")) == [f"f has {LONGEST_FUNCTION + 1} lines, at most {LONGEST_FUNCTION}"]
    assert list(too_long("x = 1\n" * 501)) == ["501 lines, at most 500"]
