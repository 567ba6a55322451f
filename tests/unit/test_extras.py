"""Extras that messages say to install are there, have the package, and are pinned."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
HINT = re.compile(r"megaopus\[([\w-]+)\]")
INSTALLED = packages_distributions()
TREES = {
    path: ast.parse(text)
    for path in sorted((ROOT / "megaopus").rglob("*.py"))
    if re.search(r"megaopus\[|\bneeded\(|_REMEDY", text := path.read_text())
}
"""Those files parsed that have to do with packages that may be missing."""


def package(requirement: str) -> str:
    """The name in a requirement or a pin, as package registries compare it."""
    return re.match(r"[\w-]+", requirement).group().lower().replace("_", "-")  # type: ignore[union-attr]


def distributions(module: str) -> set[str]:
    """Packages that have a module; one that is not installed is taken to be called as its module."""
    top = module.partition(".")[0]
    return {package(name) for name in INSTALLED.get(top, [top])}


def remedies() -> dict[str, list[str]]:
    """Name of a constant -> the extras that its text says to install."""
    found = {}
    for tree in TREES.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and (extras := HINT.findall(ast.unparse(node.value))):
                found |= {name.id: extras for name in node.targets if isinstance(name, ast.Name)}
    return found


def hints() -> Iterator[tuple[str, str, str]]:
    """(where, module, extra) of each import of a package that may be missing."""
    constants = remedies()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "needed":
                module, *_, extra = [*node.args[:1], ast.Constant("data"), *node.args[2:]]
                yield where, ast.literal_eval(module), ast.literal_eval(extra)
            if isinstance(node, ast.Try):
                said = "".join(map(ast.unparse, node.handlers))
                extras = HINT.findall(said) + [e for name in re.findall(r"\w+", said) for e in constants.get(name, [])]
                for inside in node.body:
                    names = [each.name for each in inside.names] if isinstance(inside, ast.Import) else []
                    names += [inside.module or ""] if isinstance(inside, ast.ImportFrom) else []
                    yield from ((where, name, extra) for name in names for extra in extras)


def test_the_extra_of_each_hint_has_the_package() -> None:
    found = list(hints())
    assert {extra for _, _, extra in found} >= {"data", "fasttext", "transformers", "sentence-transformers", "wandb"}
    for where, module, extra in found:
        assert extra in EXTRAS, f"{where}: pip install 'megaopus[{extra}]' installs no extra"
        has = {package(each) for each in [*PROJECT["dependencies"], *EXTRAS[extra]]}
        assert distributions(module) & has, f"{where}: megaopus[{extra}] does not install {module}"


def test_extras_that_are_named_exist_and_are_pinned() -> None:
    pinned = {package(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    texts = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", *(ROOT / "megaopus").rglob("*.py")]
    named = {extra for path in texts for extra in HINT.findall(path.read_text())}
    assert named <= EXTRAS.keys()
    for extra in EXTRAS.keys() - {"dev"}:
        assert {package(each) for each in EXTRAS[extra]} <= pinned, extra
