"""docs/report.md lists every metric as its field says it, and every kind of event that the package names."""

import ast
import re
from pathlib import Path

from megaopus.record.metrics import docs_table
from megaopus.record.types import SelectionRecord, StepRecord, ValidationRecord

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "report.md").read_text()


def test_the_table_of_metrics_is_made_of_their_fields():
    table = docs_table({"step": StepRecord, "validation": ValidationRecord, "selection": SelectionRecord})
    assert table in PAGE, f"put this into docs/report.md:\n{table}"
    assert [line for line in table.splitlines() if len(line) >= 120] == []


def kinds(source: str) -> set[str]:
    """Kinds of events that a source names: ``Event("a.b", ...)``; of ``Event(f"a.{c}", ...)`` what comes before c."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Event" and node.args:
            kind = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(kind, ast.Constant):
                found.add(kind.value)
    return found


def test_every_kind_of_event_is_on_the_page():
    listed = re.findall(r"^\| `([a-z_.]+)` \|", PAGE.split("## Events")[1].split("\n## ")[0], re.MULTILINE)
    named = {kind for path in (ROOT / "megaopus").rglob("*.py") for kind in kinds(path.read_text())}
    assert named
    assert {kind for kind in named if not any(each.startswith(kind) for each in listed)} == set()


def test_kinds_are_seen_in_a_source():
    source = 'x = Event("a.b", text)\ny = [Event(f"c.{d}", "e", f=1)]\nOther("g.h")\nEvent(kind, "i")'
    assert kinds(source) == {"a.b", "c."}
