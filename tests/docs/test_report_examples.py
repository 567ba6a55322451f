"""The examples of docs/report.md read a run's choices."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megaopus.record import parquet as choices_module
from megaopus.record.parquet import FOLDER, ChoiceSink, parts
from megaopus.selection.candidate_table import CandidateTable

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 990 to 1009 of 8 candidates, 4 of books and 4 of code; 3 books and 1 of code are picked. Several parts."""
    monkeypatch.setattr(choices_module, "PART_ROWS", 64)
    monkeypatch.chdir(tmp_path)
    sink = ChoiceSink(tmp_path / "runs" / "opus" / FOLDER)
    for step in range(990, 1010):
        utilities = np.arange(8.0)
        columns = {
            "id": np.arange(8) + 8 * step,
            "sequence": np.arange(8) if step == 995 else 8 + (np.arange(8) + 8 * step) % 400,
            "domain": np.arange(8) // 4,
            "picked": np.array([1, 1, 1, 0, 0, 0, 0, 1], dtype=bool),
            "probability": np.full(8, 1 / 8),
        }
        sink.add(step, CandidateTable(columns | ({"utility": utilities} if step % 2 else {}), ["books", "code"]))
    sink.flush()
    assert len(parts(tmp_path / "runs" / "opus" / FOLDER)) == 3
    return tmp_path


def test_the_pandas_example(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas", reason="pandas is no dependency; 'dev' has it")
    names: dict = {}
    exec(block("python"), names)
    assert len(names["picked"]) == 80
    said = capsys.readouterr().out
    assert re.search(r"books\s+30.0\s+1.0", said)  # utilities 0, 1, 2 in half of 20 steps
    assert re.search(r"code\s+10.0\s+7.0", said)


def test_the_duckdb_example(run: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is no dependency; 'dev' has it")
    rows = duckdb.connect().execute(block("sql")).fetchall()
    assert rows == [(0, "books", 1.5), (0, "code", 0.5), (1, "books", 1.5), (1, "code", 0.5)]
