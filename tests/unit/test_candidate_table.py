"""The table of candidates: one list of columns is what is written, read, replayed and documented."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megaopus.errors import DataError
from megaopus.events import _SENTENCES, SELECTION_KINDS, Event, read_event
from megaopus.record import parquet
from megaopus.record.parquet import FOLDER, SCHEMA, ChoiceSink, candidates_of, parts, read_part
from megaopus.selection import CandidateTable, Scores, SelectionConfig, Selector, candidate_table, register_method
from megaopus.selection.candidate_table import COLUMNS, Column, Lists, Masked
from megaopus.selection.methods.registry import METHODS
from tests.unit.selection_net import UNGUARDED, K, N, batch, make, make_backend

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "id": np.arange(4) + 10,
    "sequence": np.arange(4),
    "domain": np.array([1, 0, 1, 1]),
    "picked": np.array([True, False, True, False]),
    "probability": np.full(4, 0.25),
}


def table_of(**more: Any) -> CandidateTable:
    return CandidateTable(BASE | more, ["docs", "code"])


def written(folder: Path, *tables: CandidateTable) -> Path:
    sink = ChoiceSink(folder / FOLDER)
    for step, table in enumerate(tables):
        sink.add(step, table)
    sink.flush()
    (part,) = parts(folder / FOLDER)
    return part


def round_trip(folder: Path, table: CandidateTable) -> CandidateTable:
    return candidates_of(read_part(written(folder, table)), table.domain_names)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_every_column_comes_back(kind: Any, tmp_path: Path) -> None:
    known = kind(np.array([True, True, False, True]))
    full = {
        "utility": Masked(kind(np.array([0.5, np.inf, 7, np.nan])), known),
        "prescreen_score": kind(np.linspace(0, 1, 4)),
        "loss": Masked(kind(np.array([3.5, 2.25, 7, 4.0])), known),
        "odds": Masked(kind(np.array([0.5, -1, 7, 2.0])), known),
        "exposures": kind(np.array([1, 1, 2, 3])),
        "squared_norm": Masked(kind(np.array([1, 2, 7, 3.0])), known),
        "overlaps": Lists(kind(np.array([2, 0])), kind(np.arange(8.0).reshape(2, 4))),
    }
    table = CandidateTable({name: kind(values) for name, values in BASE.items()} | full, ["docs", "code"])
    assert {"step", *table} == {column.name for column in COLUMNS}
    found = round_trip(tmp_path, table)
    assert set(found) == set(table)
    for name in ("id", "sequence", "domain", "picked", "probability", "prescreen_score", "exposures"):
        np.testing.assert_array_equal(found[name], np.asarray(table[name]))
    for name in ("utility", "loss", "odds", "squared_norm"):
        np.testing.assert_array_equal(found[name].known, [True, True, False, True])
        np.testing.assert_array_equal(found[name].values[[0, 1, 3]], np.asarray(table[name].values)[[0, 1, 3]])
    assert found["overlaps"].rows.tolist() == [0, 2]
    assert found["overlaps"].values.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    picks = table.picks()
    assert len(picks) == 2
    assert picks["id"].tolist() == [10, 12]
    assert picks["utility"].known.tolist() == [True, False]
    assert "overlaps" not in set(picks)


def test_a_table_is_of_known_columns_of_one_length() -> None:
    with pytest.raises(ValueError, match="no such column: standing"):
        table_of(standing=np.zeros(4))
    with pytest.raises(ValueError, match="needs the columns domain, sequence"):
        CandidateTable({name: BASE[name] for name in ("id", "picked", "probability")}, [])
    with pytest.raises(ValueError, match="columns differ in length"):
        table_of(utility=np.zeros(5))
    with pytest.raises(ValueError, match="columns differ in length"):
        table_of(overlaps=Lists(np.array([0]), np.zeros((1, 3))))


# -- files of other versions -----------------------------------------------------------------------------------------


def rewritten(part: Path, change: Any) -> Path:
    pq.write_table(change(pq.read_table(part)), part)
    return part


def test_a_part_of_version_0_1_has_todays_names(tmp_path: Path) -> None:
    def old(table: pa.Table) -> pa.Table:
        names = ["standing" if name == "prescreen_score" else name for name in table.column_names]
        return table.rename_columns(names)

    scores = np.array([0.5, 0.25, np.nan, -1.0])
    part = rewritten(written(tmp_path, table_of(prescreen_score=scores), table_of(prescreen_score=scores)), old)
    assert "standing" in pq.read_schema(part).names
    found = read_part(part)
    assert found.column_names == SCHEMA.names
    np.testing.assert_array_equal(found["prescreen_score"].to_numpy(), [*scores, *scores])
    assert read_part(part, ["prescreen_score"]).column_names == ["prescreen_score"]
    ChoiceSink(tmp_path / FOLDER).truncate_after(1)  # as a run that goes on
    assert pq.read_schema(part).names == SCHEMA.names
    np.testing.assert_array_equal(read_part(part)["prescreen_score"].to_numpy(), scores)


def test_columns_come_and_go(tmp_path: Path) -> None:
    """Nullable columns read as null where they are missing, unknown ones are left out, the rest must be there."""

    def later(table: pa.Table) -> pa.Table:
        table = table.drop_columns(["exposures", "overlaps"])
        return table.append_column("invented", pa.array(np.arange(len(table))))

    part = rewritten(written(tmp_path, table_of(exposures=np.ones(4))), later)
    found = read_part(part)
    assert found.column_names == SCHEMA.names
    assert found["exposures"].null_count == found["overlaps"].null_count == 4
    assert "exposures" not in set(candidates_of(found, ["docs", "code"]))
    rewritten(part, lambda table: table.drop_columns(["picked"]))
    with pytest.raises(DataError, match="no column picked"):
        read_part(part)
    assert len(read_part(part, ["id"])) == 4


# -- one more number ---------------------------------------------------------------------------------------------------


def test_a_number_more_is_a_column_and_who_works_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a method's answer to the file and back, through nothing that knows of it."""
    columns = (*COLUMNS, Column("surprise", "float64", "made up", nullable=True, packing="bytes"))
    schema = SCHEMA.append(pa.field("surprise", pa.float64()))
    for module, name, value in (
        (candidate_table, "COLUMNS", columns),
        (parquet, "COLUMNS", columns),
        (parquet, "SCHEMA", schema),
    ):
        monkeypatch.setattr(module, name, value)

    @register_method("surprising", flops=(1.0, ""))
    def surprising(step: Any) -> Scores:
        losses = step.sum_parts(step.measured(lambda passes: step.backend.losses(step.share, **passes)))
        return Scores(utilities=losses, columns={"surprise": losses.square()})

    try:
        config = SelectionConfig(method="surprising", guards=UNGUARDED)
        selection = Selector(config, make_backend(), num_selected=K, proxy=None, seed=0).select(batch(0), 0)
    finally:
        METHODS.remove("surprising")
    columns_of = {**selection.columns, "sequence": np.arange(N), "domain": np.zeros(N, dtype=np.int64)}
    found = round_trip(tmp_path, CandidateTable(columns_of, ["all"]))
    np.testing.assert_array_equal(found["surprise"], selection.utilities.square().numpy())


# -- what is documented ----------------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_the_list() -> None:
    page = (ROOT / "docs" / "report.md").read_text()
    table = page.split("| column | type | meaning |\n|---|---|---|\n")[1].split("\n\n")[0]
    kinds = {"list": "list of float64"}
    assert table.splitlines() == [
        f"| `{column.name}` | {kinds.get(column.dtype, column.dtype)} | {column.doc} |" for column in COLUMNS
    ]


def test_the_kinds_of_events_are_listed_and_documented() -> None:
    used = set()
    for path in (ROOT / "megaopus" / "selection").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                before = {"Event": "", "tell": "selection.", "alarm": "selection.alarm."}
                if name in before:
                    used.add(before[name] + node.args[0].value)
    assert used == set(SELECTION_KINDS) > set(_SENTENCES.values())
    page = (ROOT / "docs" / "selection.md").read_text()
    listed = re.findall(r"^\| `(selection\.[\w.]+)` \| (.*) \|$", page, flags=re.M)
    assert dict(listed) == SELECTION_KINDS


SENTENCES = {
    "fewer than 8 candidates would be trained on at most 1 time(s) in 5 steps: cap lifted to 2 where it must be": (
        "selection.cap_lifted"
    ),
    "alarm: the predictor's correlation with utilities is -0.51; candidates screened uniformly": (
        "selection.prescreen_distrusted"
    ),
    "alarm: 17 different token pairs in 4 picks, 60 in as many sequences elsewhere; picked uniformly": (
        "selection.alarm.token_pairs"
    ),
    "alarm: 0% of the picks are new in the window, 67% of the candidates; picked uniformly": "selection.alarm.repeats",
    "alarm: effective sample size 1.11, below 1.2; picked uniformly": "selection.alarm.sample_size",
    "utility not finite: candidates [3, 8]": "selection.utility_not_finite",
    "something else with 3 numbers": "something else with # numbers",
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_of_version_0_1_has_a_kind(sentence: str) -> None:
    assert read_event(sentence) == Event(SENTENCES[sentence], sentence)


def test_events_of_today_read_as_their_sentences_do() -> None:
    x = batch(0)
    x[3] = torch.nan
    selections = [
        make().select(x, 0),
        make(make_backend(0)).select(batch(0), 0),
        make(proxy_of=lambda step: batch(1, 6) * torch.nan).select(batch(0), 0),
        make(utilities="raw", sampler="boltzmann", temperature=1e6).select(batch(0), 0),
    ]
    events = [event for selection in selections for event in selection.events]
    assert len({event.kind for event in events}) == 4
    for event in events:
        assert read_event(event.as_row()) == event
        assert read_event(str(event)).kind == event.kind
