"""Holds the package to who may import whom, to no circles, and to short files and functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.structure import LONGEST_FUNCTION, circles, import_graph, module_name, too_long

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megaopus"
ANY = None
LEAVES = {"errors", "fs", "settings", "events", "registry", "plugins", "logistic", "newton_schulz"}
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
    "huggingface": {"data", "distributed", "models"},
    "record": {"distributed", "selection.candidate_table"},
    "checkpoint": {"distributed"},
    "engine": {"checkpoint.pending_save", "distributed", "models", "optim", "selection"},
    "training": {"checkpoint", "data", "distributed", "engine.base", "record", "selection"},
    "meters": {"config", "distributed", "models.flops", "planning", "record", "training"},
    "config": {
        "huggingface.families",
        "huggingface.folder",
        "models.flops",
        "training.config",
        "engine.config",
        "evaluation.config",
        "data.needs",
        "data.store",
    }
    | {f"{room}.config" for room in LIBRARY},
    "run_folder": set(),
    "planning": {"config", "data", "distributed", "models", "selection"},
    "score": {
        "build",
        "checkpoint",
        "config",
        "corpus_tools",
        "data",
        "distributed",
        "engine",
        "huggingface",
        "selection",
        "start",
    },
    "evaluation": {
        "build",
        "checkpoint",
        "config",
        "corpus_tools",
        "data",
        "distributed",
        "engine",
        "export",
        "huggingface",
        "models",
        "record",
        "selection",
        "start",
    },
    "report": {
        "config",
        "data",
        "evaluation.differences",
        "evaluation.items",
        "evaluation.noise",
        "record",
        "selection",
    },
    "start": {"checkpoint", "config", "data", "distributed", "engine", "huggingface", "models"},
    "export": {"checkpoint", "config", "data", "huggingface", "models", "start"},
    "build": ANY,
    "side_by_side": {"build", "config", "data", "distributed", "record", "training"},
    "timed_layouts": {"build", "config", "data", "distributed", "selection", "side_by_side", "training"},
    "cli": ANY,
    "__main__": {"cli.main"},
}
ONLY_IN = {
    "argparse": {"cli"},
    "rich.table": {"cli"},
    "megatron": {"models", "engine", "distributed", "optim", "checkpoint", "data"},
    "deepspeed": {"engine"},
    "hydra": {"config"},
    "omegaconf": {"config"},
    "wandb": {"record"},
    "tensorboard": {"record"},
    "tokenizers": {"data", "corpus_tools", "evaluation"},
    "matplotlib": {"report"},
    "pyarrow": {"data", "corpus_tools", "evaluation", "record", "report"},
    "pytorch_optimizer": {"optim"},
    "transformers": {"huggingface", "score"},
    "fasttext": {"score"},
    "lm_eval": {"evaluation"},
    "datatrove": {"corpus_tools"},
    "ray": {"corpus_tools"},
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
    """List what a file of room ``name`` imports against the tables above."""
    allowed, found = MAY_IMPORT[name], []
    for module in sorted(imported(source)):
        root, *rest = module.split(".")
        if root == "megaopus" and rest and rest[0] != "__version__":
            leaf = rest[0] in LEAVES and (name not in LEAVES or rest[0] == "errors")
            granted = allowed is ANY or rest[0] in allowed or ".".join(rest[:2]) in allowed
            if not (rest[0] == name or leaf or granted):
                found.append(f"{name} must not import {module}")
        elif (kept := next((outer for outer in (module, root) if outer in ONLY_IN), None)) and name not in ONLY_IN[
            kept
        ]:
            found.append(f"{kept} is not for {name}")
        elif name == "selection" and root not in sys.stdlib_module_names | {"torch", "megaopus", "yaml"}:
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
    assert breaches("report", "import argparse\nfrom rich.table import Table") == [
        "argparse is not for report",
        "rich.table is not for report",
    ]
    assert breaches("fs", "import megaopus.events") == ["fs must not import megaopus.events"]
    assert breaches("config", "from megaopus.data.config import DataConfig\nimport hydra") == []
    assert breaches("training", "from megaopus.engine.base import Engine") == []
    assert breaches("training", "import megaopus.engine.megatron.engine") == [
        "training must not import megaopus.engine.megatron.engine"
    ]


# -- circles ---------------------------------------------------------------------------------------------------------


def test_nobody_imports_in_circles():
    assert circles(import_graph({module_name(str(file.relative_to(ROOT))): file.read_text() for file in FILES})) == []


def test_a_circle_is_seen():
    sources = {
        "megaopus.a": "def f():\n    from megaopus import b",
        "megaopus.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megaopus.c import C",
        "megaopus.c": "import importlib\nimportlib.import_module('megaopus.a')",
        "megaopus.d": "import megaopus.a",
    }
    assert circles(import_graph(sources)) == [["megaopus.a", "megaopus.b", "megaopus.c"]]


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file):
    assert list(too_long(file.read_text())) == []


def test_what_is_too_long_is_seen():
    body = "    x = 1\n" * LONGEST_FUNCTION
    assert list(too_long(f"def f():\n{body}")) == [f"f has {LONGEST_FUNCTION + 1} lines, at most {LONGEST_FUNCTION}"]
    assert list(too_long("x = 1\n" * 501)) == ["501 lines, at most 500"]


# -- docstrings ------------------------------------------------------------------------------------------------------

QUESTIONS = {"How", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why"}


def half_sentences(source):
    """First lines of docstrings that are a clause without its sentence."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [text.splitlines()[0] for text in texts if text and text.split()[0] in QUESTIONS]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_are_sentences(file):
    assert half_sentences(file.read_text()) == []


def test_a_half_sentence_is_seen():
    assert half_sentences('"""Say when."""\ndef f():\n    """What it is."""') == ["What it is."]
