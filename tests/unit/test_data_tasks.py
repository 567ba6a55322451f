"""prepare by tasks over pieces of the sources: the corpus of one process, whoever does them; copies are left out."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from megaopus.__main__ import main
from megaopus.cli.prepare import show_corpus
from megaopus.corpus_tools import pieces
from megaopus.corpus_tools.by_tasks import TaskReadings
from megaopus.corpus_tools.copies import COPIES
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.readers.json_lines import _count, _divide
from megaopus.corpus_tools.reading import Reading
from megaopus.corpus_tools.sources import Source, SourceReader, Stretch
from megaopus.corpus_tools.split import HereReadings
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.corpus_tools.tasks.stages import run_stage
from megaopus.corpus_tools.tasks.workers import Workers
from megaopus.data.corpus import Corpus
from megaopus.errors import DataError
from tests.arrays import arrays_here
from tests.unit.killed_units import Numbers

pytest.importorskip("datatrove", reason="needs datatrove (extra scale)")

RULE = SplitRule(0.1, 0.1)
LOCAL = Executor("local", 3, 1)
"""Three tasks, one after the other in this process."""


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(n: int) -> dict[str, Any]:
    """A text without an id, which its line number gives it, and one that has none of its words in a row."""
    return {"text": f"Text {n}: " + " ".join(f"w{n * k % 97}" for k in range(n % 40))}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Sources of every kind, which make many small pieces."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 12000)
    rows = [row(n) for n in range(600)]
    rows[300:300] = [{"text": "again", "id": "a/a.jsonl:7"}, {"text": " "}, {"text": "long " * 5000}]
    lines = json_lines(rows).splitlines(keepends=True)
    lines[500:500] = ["\n", '{"text": \n', "[1]\n"]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "texts").mkdir()
    for n in range(30):
        (tmp_path / "texts" / f"t{n}.txt").write_text(f"File {n} " * 60)
    with gzip.open(tmp_path / "g.jsonl.gz", "wt") as stream:
        stream.write(json_lines([row(n + 5000) for n in range(80)]))
    texts = [f"Row {n} " + "x" * (n % 50) + str(n * n) for n in range(400)]
    table = pa.table({"text": texts, "domain": ["p" if n % 3 else "q" for n in range(400)]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=50, compression="none")
    found = [tmp_path / name for name in ("a.jsonl", "texts", "p.parquet", "g.jsonl.gz")]
    return [Source(path, skip_faulty=True) for path in found]


def manifest_of(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "manifest.json").read_text())


@pytest.mark.parametrize("tasks", [1, 4])
def test_the_corpus_is_that_of_one_process(sources: list[Source], tmp_path: Path, tasks: int) -> None:
    """Every kind of file, faults that are left out, an id used twice, and a document that must be cut."""
    here = prepare(sources, tmp_path / "here", vocab_size=300, rule=RULE)
    by_tasks = prepare(sources, tmp_path / "tasks", vocab_size=300, rule=RULE, executor=Executor("local", tasks, 1))
    assert len(pieces.pieces_of(sources)) > 8
    manifest = manifest_of(here)
    assert manifest == manifest_of(by_tasks)
    assert set(manifest["sources"][0]["left_out"]) == {"not valid JSON", "not an object", "id used before"}
    assert Corpus.open(by_tasks, verify=True).fingerprint == manifest["fingerprint"]
    assert not (tmp_path / ".tasks.work").exists()


def test_documents_that_are_cut_are_cut_by_tasks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20000)
    books = [{"text": "\n\n".join(f"Chapter {n} {k}. " + "word " * 90 for k in range(30))} for n in range(3)]
    (tmp_path / "books.jsonl").write_text(json_lines(books))
    found = [
        manifest_of(prepare([Source(tmp_path / "books.jsonl")], tmp_path / name, vocab_size=300, executor=executor))
        for name, executor in (("here", None), ("tasks", LOCAL))
    ]
    assert found[0] == found[1]
    assert "cut into pieces" in found[0]["notes"][0]


@pytest.mark.parametrize("size", [1, 7, 50, 999, 100000])
def test_parts_of_a_file_cover_its_lines(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json_lines([row(n) for n in range(12)]).rstrip("\n"))
    whole = SourceReader(Source(path))
    expected, found, before, total = list(whole), [], 0, 0
    for part in _divide(path, size):
        reader = SourceReader(Source(path), stretches=[Stretch("a.jsonl", path, part._replace(before=before))])
        found += list(reader)
        before, total = before + _count(path, part), total + reader.bytes
    assert found == expected
    assert (before, total) == (13, whole.bytes)


FAULTS = {
    "not JSON": '{"text": \n',
    "an id used before": '{"text": "b", "id": "a/a.jsonl:3"}\n',
    "no documents in an earlier source": '{"text": \n',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_in_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    lines = json_lines([row(n) for n in range(400)]).splitlines(keepends=True)
    lines.insert(350, FAULTS[fault])
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "e.jsonl").write_text("\n")
    given = [Source(tmp_path / "e.jsonl")] * ("no documents" in fault) + [Source(tmp_path / "a.jsonl")]
    said = []
    for executor in (None, LOCAL):
        with pytest.raises(DataError) as raised:
            prepare(given, tmp_path / "c", vocab_size=300, rule=RULE, executor=executor)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert ("e.jsonl: no documents" if "no documents" in fault else "a.jsonl line 351") in said[0]
    assert [path.name for path in tmp_path.iterdir() if "c" in path.name.split(".")] == []


def test_a_source_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines([row(n) for n in range(200)]))
    encode = TaskReadings.encode

    def change(self: TaskReadings, *arguments: Any) -> Any:
        path.write_text(path.read_text().replace("Text 9:", "Text 0:"))
        return encode(self, *arguments)

    monkeypatch.setattr(TaskReadings, "encode", change)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was being read"):
        prepare([Source(path)], tmp_path / "c", vocab_size=300, rule=RULE, executor=LOCAL)


# -- tasks that die ----------------------------------------------------------------------------------------------------


def test_a_killed_task_redoes_only_what_it_had_not_finished(tmp_path: Path) -> None:
    """Its process is killed: datatrove's own pool would wait for it for ever."""
    seen: list[int] = []
    with Workers() as workers:
        run_stage(Numbers(tmp_path), tmp_path / "stage", Executor("local", 2, 2), workers, seen.append)
    assert (tmp_path / "killed").exists()
    assert sorted((tmp_path / "tries").read_text().split()) == list("012345")
    assert sum(seen) == 6
    statistics = json.loads((tmp_path / "stage" / "2-tasks" / "stats.json").read_text())
    assert statistics[0]["stats"]["units"]["total"] + statistics[0]["stats"]["found done"]["total"] == 6
    assert (tmp_path / "stage" / "2-tasks" / "logs" / "task_00001.log").is_file()


# -- Slurm and Ray -----------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of Slurm that run arrays here."""
    return arrays_here(tmp_path / "bin", monkeypatch)


@pytest.mark.slow
def test_slurm_arrays_make_the_same_corpus(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines([row(n) for n in range(200)]))
    command = ["prepare", "--source", str(path), "--vocab-size", "300", "--executor", "slurm", "--tasks", "1"]
    options = ["--slurm", "partition=cpu", "--slurm", "time=1:00:00", "--slurm", "exclusive"]
    assert main([*command, *options, "--out", str(tmp_path / "c")]) == 0, capsys.readouterr()
    here = prepare([Source(path)], tmp_path / "here", vocab_size=300)
    assert manifest_of(tmp_path / "c") == manifest_of(here)
    script = (slurm / "script").read_text()
    for line in ("partition=cpu", "time=1:00:00", "exclusive", "cpus-per-task=1", "array=0-0"):
        assert f"#SBATCH --{line}\n" in script
    assert "qos" not in script
    assert len((slurm / "asked").read_text().splitlines()) == 2  # reading, encoding


def test_an_array_that_ends_unfinished_is_said(slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines([row(n) for n in range(20)]))
    with pytest.raises(DataError, match=r"reading: 2 of 2 pieces were not finished; .* the same command does the rest"):
        prepare([Source(path)], tmp_path / "c", vocab_size=300, executor=Executor("slurm", 2))
    assert (tmp_path / ".c.work").is_dir()
    with pytest.raises(DataError, match=r"--slurm a b=c: write KEY=VALUE"):
        prepare([Source(path)], tmp_path / "c", executor=Executor("slurm", 2, slurm=("a b=c",)))


def test_an_array_that_is_in_the_queue_is_not_submitted_again(slurm: Path, tmp_path: Path) -> None:
    """A command that was killed, and is given again: it waits for what the first one submitted."""
    (slurm / "squeue").write_text(
        f"#!/bin/sh\necho look >> {slurm}/looks\n[ $(wc -l < {slurm}/looks) -gt 3 ] || echo 7\n"
    )
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines([row(n) for n in range(20)]))
    with pytest.raises(DataError, match="reading: 2 of 2 pieces were not finished"):
        prepare([Source(path)], tmp_path / "c", vocab_size=300, executor=Executor("slurm", 2))
    assert not (slurm / "asked").exists()
    assert len((slurm / "looks").read_text().split()) == 6


@pytest.mark.slow
def test_ray_reads_the_same(sources: list[Source], tmp_path: Path) -> None:
    """One stage with two workers; benchmarks/data.py --executor ray makes whole corpora."""
    pytest.importorskip("ray", reason="needs ray (extra scale)")
    few = [source for source in sources if source.path.suffix != ".jsonl"]
    with Workers() as workers:
        ray = TaskReadings(few, RULE, Executor("ray", 2, 2), workers, tmp_path, "plan", lambda *_: lambda _: None)
        found = ray.read("reading", Reading())
    expected = HereReadings(few, RULE, lambda name: lambda count: None, False).read("reading", Reading())
    assert found.totals == expected.totals
    for name in ("codes", "sizes", "draws", "ids"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.sample.texts() == expected.sample.texts()


# -- copies ------------------------------------------------------------------------------------------------------------


WORDS = ["alder", "birch", "cedar", "elm", "fir", "hazel", "juniper", "larch", "maple", "oak", "pine", "rowan"]


def story(n: int) -> str:
    """Sixty words in an order of their own."""
    return " ".join(random.Random(n).choices(WORDS, k=60))


def test_copies_are_left_out_as_if_they_had_not_been_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 6000)
    rows: list[dict[str, Any]] = [{"id": f"d{n}", "text": story(n), "domain": "xy"[n % 2]} for n in range(300)]
    copies, last = [{**rows[n], "id": f"c{n}", "domain": "z"} for n in range(40, 60)], {"id": "last", "text": "no copy"}
    last["domain"] = "x"
    (tmp_path / "clean.jsonl").write_text(json_lines([*rows, last]))
    (tmp_path / "copied.jsonl").write_text(json_lines([*rows, *copies, last]))
    clean = manifest_of(prepare([Source(tmp_path / "clean.jsonl")], tmp_path / "clean", vocab_size=300, rule=RULE))
    for executor in (None, LOCAL):
        settings: dict[str, Any] = {"vocab_size": 300, "rule": RULE, "executor": executor, "overwrite": True}
        out = prepare([Source(tmp_path / "copied.jsonl")], tmp_path / "c", dedup="exact", **settings)
        made = manifest_of(out)
        assert made["fingerprint"] == clean["fingerprint"]
        assert (made["sources"][0]["documents"], made["sources"][0]["copies"]) == (301, 20)
        assert made["duplicates"]["domains"] == {"z": 20}
        first = made["duplicates"]["examples"][0]
        at = f"{tmp_path}/copied.jsonl line"
        assert first == {"id": "c40", "at": f"{at} 301", "copy_of": {"id": "d40", "at": f"{at} 41"}}
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    show_corpus(out, console)
    told = console.export_text()
    assert "copied.jsonl: 1 file read, 301 documents, 20 copies" in told
    assert "copies (exact): 20 left out: 20 in z" in told
    assert "id 'c40' is a copy of 'd40'" in told


def test_nearly_equal_texts_are_found_at_any_number_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 6000)
    rows = [{"id": f"d{n}", "text": story(n)} for n in range(60)]
    near = [{"id": f"n{n}", "text": f"{story(n)} and one more"} for n in range(10, 18)]
    same = [{"id": f"s{n}", "text": f"{story(n)}!"} for n in (11, 50)] + [{"id": "e", "text": story(12)}]
    (tmp_path / "a.jsonl").write_text(json_lines([*rows, *near, *same]))
    found = []
    for tasks in (1, 5):
        out = prepare(
            [Source(tmp_path / "a.jsonl")],
            tmp_path / f"c{tasks}",
            vocab_size=300,
            rule=RULE,
            dedup="minhash",
            executor=Executor("local", tasks, 1),
        )
        found.append(manifest_of(out))
    assert found[0] == found[1]
    assert Corpus.open(out).ids == [row["id"] for row in rows]
    assert found[0]["duplicates"]["documents"] == len(near) + len(same)


def test_what_is_asked_of_no_executor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines([row(n) for n in range(20)]))
    given = [Source(tmp_path / "a.jsonl")]
    with pytest.raises(DataError, match=r"--dedup minhash: compared by tasks; add --executor local"):
        prepare(given, tmp_path / "c", dedup=COPIES[1])
    with pytest.raises(DataError, match="no such way to find copies"):
        prepare(given, tmp_path / "c", dedup="fuzzy")
    with pytest.raises(DataError, match="--tasks 0: must be at least 1"):
        prepare(given, tmp_path / "c", executor=Executor("local", 0))
    with pytest.raises(DataError, match="--slurm a: is for --executor slurm"):
        prepare(given, tmp_path / "c", executor=Executor("local", slurm=("a",)))
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(DataError, match=r"--executor local: needs datatrove.*pip install 'megaopus\[scale\]'"):
        prepare(given, tmp_path / "c", executor=LOCAL)
    assert not (tmp_path / "c").exists()
