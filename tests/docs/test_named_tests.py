"""Every test that a page of docs/ names as the proof of a promise is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {path: path.read_text() for path in ROOT.glob("tests/**/*.py")}
NAMED = re.compile(r"`(?:(tests/[\w/]+|test_\w+)(\.py))?(?:::)?(test_\w+)?`")


def missing(page: str) -> list[str]:
    """Return what a page names and is not there: ``tests/FOLDER/FILE.py``, ``FILE.py::NAME``, or ``NAME`` alone."""
    found = []
    for match in NAMED.finditer(page):
        file, _, name = match.groups()
        files = [path for path in FILES if file is None or str(path.with_suffix("")).endswith(f"/{file}")]
        if not files or (name and not any(f"def {name}(" in FILES[path] for path in files)):
            found.append(match[0])
    return found


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_it_is_there(page):
    assert missing(page.read_text()) == []


def test_what_is_not_there_is_seen():
    absent = ["`test_nowhere`", "`test_config_docs.py::test_x`", "`tests/no/test_a.py`"]
    there = ["`tests/docs/test_named_tests.py::test_it_is_there`", "`test_it_is_there`", "`nothing`"]
    assert missing(" ".join([*there, *absent])) == absent
