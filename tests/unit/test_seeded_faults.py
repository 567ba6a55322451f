"""Each seeded fault (tests/seeded_faults.py) has its place in the package and its tests, so that all can be tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import seeded_faults
from tests.seeded_faults import FAULTS, ROOT, Fault

PACKAGE = [path.read_text() for path in sorted((ROOT / "megaopus").rglob("*.py"))]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_can_be_tried(fault: Fault) -> None:
    counts = [sum(text.count(before) for text in PACKAGE) for before, _ in fault.changes]
    assert 1 in counts, counts
    assert all(Path(ROOT, each.partition("::")[0]).is_file() for each in seeded_faults.tests_of(fault, ROOT))
