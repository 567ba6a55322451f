"""Measures how the package is built: sizes, import circles, and how many files a commit that adds one thing touches.

python benchmarks/structure.py
python benchmarks/structure.py --commit 9551056                # of another commit
python benchmarks/structure.py --added REVISION REVISION ...   # what these commits touched
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE, LONGEST_FUNCTION = 500, 60
"""Lines that CONTRIBUTING.md allows."""
LOOP = {"trainer.py": ("run", "update", "step")}
"""File -> functions that are run once an update."""


def module_name(path: str) -> str:
    """megaopus/a/b.py -> megaopus.a.b; a package's __init__ is the package."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def named(source: str) -> Iterator[str]:
    """Yield every module that a source may mean: imports at any depth, their members, and whole strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among ``sources`` (name -> text) that it names, its own package aside."""
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
    components: list[list[str]] = []
    for name in reversed(order):
        if name not in seen:
            component: list[str] = []
            visit(name, back, component)
            components.append(sorted(component))
    return [component for component in components if len(component) > 1]


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield (name, lines) of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(source: str) -> Iterator[str]:
    """Say of the file, and of each of its functions, if it is longer than allowed."""
    if (lines := source.count("\n")) > LONGEST_FILE:
        yield f"{lines} lines, at most {LONGEST_FILE}"
    for name, lines in functions(source):
        if lines > LONGEST_FUNCTION:
            yield f"{name} has {lines} lines, at most {LONGEST_FUNCTION}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def sources_of(commit: str) -> dict[str, str]:
    """Path -> text of the package's files in a commit."""
    paths = _git("ls-tree", "-r", "--name-only", commit, "megaopus/").splitlines()
    return {path: _git("show", f"{commit}:{path}") for path in paths if path.endswith(".py")}


def touched(commit: str) -> list[str]:
    """The files of package and configs/ that a commit touched."""
    changed = _git("diff-tree", "--no-commit-id", "--name-only", "-r", commit, "--", "megaopus/", "configs/")
    return changed.splitlines()


def main() -> int:
    """Print the figures of a commit, or what commits touched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commit", default="HEAD", help="whose package is measured (default: %(default)s)")
    parser.add_argument("--added", nargs="+", default=[], metavar="REVISION", help="say which files each touched")
    args = parser.parse_args()
    for commit in args.added:
        files = touched(commit)
        print(f"{len(files)} files: {_git('log', '-1', '--format=%s', commit).strip()}")
        print("".join(f"  {path}\n" for path in files), end="")
    if args.added:
        return 0
    sources = sources_of(args.commit)
    lines = [text.count("\n") for text in sources.values()]
    sizes = [(size, name, path) for path, text in sources.items() for name, size in functions(text)]
    found = circles(import_graph({module_name(path): text for path, text in sources.items()}))
    loop = {
        f"{Path(path).name}:{name}": size
        for size, name, path in sizes
        if name in LOOP.get(Path(path).name, ()) and "megaopus" in path
    }
    print(f"{len(sources)} files, {sum(lines)} lines, {sum(lines) / len(lines):.0f} lines a file, longest {max(lines)}")
    print(f"functions over {LONGEST_FUNCTION} lines: {sum(size > LONGEST_FUNCTION for size, _, _ in sizes)}")
    print(f"import circles: {len(found)} ({sum(map(len, found))} files in them)")
    print("the loop: " + ", ".join(f"{name} {size} lines" for name, size in loop.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
