"""Sources as people have them: folders with more than documents in them, rows that are broken, tables of every form."""

from __future__ import annotations

import csv
import gzip
import io
import json
import types
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megaopus.__main__ import main
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.readers import stored
from megaopus.corpus_tools.readers.registry import READERS, Reader, reader_of_file
from megaopus.corpus_tools.sources import Fields, Source, SourceReader
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import FILES, Corpus
from megaopus.errors import DataError

POOL = SplitRule(0, 0)
"""Nothing is held out."""
ROWS = [
    {"id": f"d{n}", "text": f'Document {n}, with a comma, a "quote"\nand {"words " * (n % 5)}', "n": n}
    for n in range(30)
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def texts_of(source: Source) -> list[tuple[str, str, str]]:
    return [(document.id, document.domain, document.text) for document in SourceReader(source)]


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_the_same_sources_give_the_same_bytes_as_ever(tmp_path: Path) -> None:
    """Digests of what commit a20a2cd wrote; no merges are learnt, so the tokenizer library has no say."""
    rows = [
        {"id": f"d{n}", "domain": ("wanted", "other")[n % 2], "text": f"Document {n}. " + "word " * (n % 7 + 1) * 40}
        for n in range(400)
    ]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([{**row, "score": n / 4} for n, row in enumerate(rows)]))
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for n in range(40):
        (tmp_path / "texts" / ("deep" if n % 2 else "") / f"t{n}.txt").write_text(f"Text {n} " * 300)
    sources = [Source(tmp_path / "rows.jsonl", None, Fields(keep=("score",))), Source(tmp_path / "texts")]
    out = prepare(sources, tmp_path / "c", vocab_size=257, rule=SplitRule(0.1, 0.1, ("wanted",)))
    files = manifest_of(out)["files"]
    assert {name: files[name]["sha256"][:16] for name in FILES[:4]} == {
        "tokens.bin": "2a488864195b653d",
        "tokens.idx": "93e890fcff5a5fd0",
        "documents.jsonl": "4590ada852bb3203",
        "documents.npy": "3ed4bd317496ef4d",
    }
    digests = [(each["sha256"][:16], each["documents"]) for each in manifest_of(out)["sources"]]
    assert digests == [("ab8de44737c1794a", 400), ("ddb4c7eb8866c6e1", 40)]


# -- folders and packed files ------------------------------------------------------------------------------------------


def test_a_long_window_is_read_within_the_memory_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(jsonl(ROWS[:3])) + packer.compress(jsonl(ROWS[3:])) + packer.flush())
    memory = types.SimpleNamespace(available=3 << 30)
    monkeypatch.setattr(stored.psutil, "virtual_memory", lambda: memory)
    assert [text for _, _, text in texts_of(Source(path))] == [row["text"] for row in ROWS]
    memory.available = 1 << 30
    with pytest.raises(
        DataError, match=r"zst: needs 2 GiB of memory to unpack \(its window\), 1 GiB are free.*--long=27"
    ):
        texts_of(Source(path))


SKIPPED = {
    ".ipynb_checkpoints/rows.jsonl": "hidden",
    "_temporary/rows.jsonl": "hidden",
    "deep/._b.jsonl": "hidden",
    ".c.work/rows.jsonl": "hidden",
    "dataset_info.json": "metadata",
    "deep/dataset_infos.json": "metadata",
    "deep/state.json": "metadata",
    "README.md": "metadata",
    "notes.txt": "texts beside tables",
    "deep/rows.arrow": "of unknown ending",
    "old/c.jsonl": "excluded",
    "deep/b.tmp.jsonl": "excluded",
    "corpus/documents.jsonl": "of a prepared corpus",
    "corpus/manifest.json": "of a prepared corpus",
    "corpus/tokens.bin": "of a prepared corpus",
    "corpus.scores/dsir/column.json": "of a prepared corpus",
}


def test_files_that_are_no_documents_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("clean", "full"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_bytes(jsonl(ROWS[:10]))
        (tmp_path / name / "deep" / "b.jsonl").write_bytes(jsonl(ROWS[10:]))
    for name in SKIPPED:
        path = tmp_path / "full" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{\n  "splits": {"train": 3}\n}\n')
    (tmp_path / "full" / "linked").symlink_to(tmp_path / "clean")
    command = [
        "prepare",
        "--vocab-size",
        "300",
        "--proxy-fraction",
        "0",
        "--exclude",
        "old",
        "--exclude",
        "*.tmp.jsonl",
    ]
    made = {}
    for name in ("clean", "full"):
        made[name] = tmp_path / f"{name}.corpus"
        assert main([*command, "--source", f"docs={tmp_path / name}", "--out", str(made[name])]) == 0
    assert Corpus.open(made["full"]).fingerprint == Corpus.open(made["clean"]).fingerprint
    counts = {reason: list(SKIPPED.values()).count(reason) for reason in SKIPPED.values()}
    source = manifest_of(made["full"])["sources"][0]
    assert source["skipped"] == {**counts, "links to a folder or to nothing": 1}
    assert source["files"] == 2
    assert source["sha256"] == manifest_of(made["clean"])["sources"][0]["sha256"]
    said = capsys.readouterr().out
    assert "clean: 2 files read, 30 documents\n" in said
    assert "full: 2 files read, 17 skipped (2 excluded, 4 hidden, " in said


def test_a_folder_that_holds_its_own_corpus_is_prepared_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    prints = []
    for _ in range(2):
        out = prepare([Source(tmp_path)], tmp_path / "corpus", vocab_size=300, rule=POOL, overwrite=True)
        prints.append(Corpus.open(out).fingerprint)
    assert prints[0] == prints[1]
    with pytest.raises(DataError, match=r"corpus: no documents: .* \(skipped: 7 of a prepared corpus\)"):
        Source(out).files()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"\(skipped: 1 metadata\); it was saved by 'datasets': write hf:.*saved"):
        Source(tmp_path / "saved").files()


def test_texts_named_readme_are_documents_below_the_top(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE.txt", "tool/README.md", "readmes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert [name for name, _ in Source(tmp_path).files()] == ["readmes.txt", "tool/README.md"]
    assert texts_of(Source(tmp_path / "README.md"))[0][2] == "text of README.md"  # named, it is taken


# -- rows that are broken ----------------------------------------------------------------------------------------------

GOOD = jsonl(ROWS[:1])
FAULTS = {
    "not valid JSON": (b'{"text": "cut\n', r"line 2: not valid JSON \("),
    "not an object": (b"[1]\n", r"line 2: a JSON list, not an object"),
    "no text field": (b'{"body": "x"}\n', r"line 2: no field 'text' \(fields: body\).*PATH,text=NAME"),
    "a field of the wrong type": (b'{"text": 5, "id": "b"}\n', r"line 2: 'text' is a int, not a string"),
    "id used before": (b'{"text": "other", "id": "d0"}\n', r"line 2: id 'd0' was already used at .*line 1"),
    "half a surrogate pair": (
        b'{"text": "a", "id": "\\ud800"}\n',
        r"line 2: 'id' has half a surrogate pair at character 0",
    ),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', r"line 2: not UTF-8 at byte 13"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_broken_row_stops_or_is_left_out_and_counted(reason: str, tmp_path: Path) -> None:
    broken, message = FAULTS[reason]
    path = tmp_path / "s.jsonl"
    path.write_bytes(GOOD + broken + jsonl(ROWS[1:]))
    with pytest.raises(DataError, match=rf"s\.jsonl {message}.*; --on-error skip leaves such out and counts them"):
        prepare([Source(path)], tmp_path / "c", vocab_size=300)
    assert [each.name for each in tmp_path.iterdir()] == ["s.jsonl"]
    left = prepare([Source(path, skip_faulty=True)], tmp_path / "c", vocab_size=300)
    (seen,) = manifest_of(left)["sources"]
    assert {why: each["count"] for why, each in seen["left_out"].items()} == {reason: 1}
    assert "line 2" in seen["left_out"][reason]["first"]
    assert seen["documents"] == 30
    path.write_bytes(jsonl(ROWS))
    assert (
        Corpus.open(left).fingerprint
        == Corpus.open(prepare([Source(path)], tmp_path / "d", vocab_size=300)).fingerprint
    )


def test_what_was_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(
        b"".join(broken for broken, _ in FAULTS.values()) + jsonl(ROWS) + b'{"text": null}\n' + jsonl(ROWS[:2])
    )
    command = ["prepare", "--source", str(path), "--vocab-size", "300", "--out", str(tmp_path / "c"), "--on-error"]
    assert main([*command, "stop"]) == 2
    capsys.readouterr()
    assert main([*command, "skip"]) == 0
    said = capsys.readouterr().out
    assert "s.jsonl: 1 file read, 30 documents, 1 empty, 9 left out (" in said  # the first row with id d0 counts
    assert "3 id used before" in said
    assert f"  first not UTF-8: {path} line 7: not UTF-8 at byte 13 (0xe9); convert the file to UTF-8\n" in said


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_the_rest_of_a_damaged_file_is_left_out(kind: str, tmp_path: Path) -> None:
    rows = [{"id": f"x{n}", "text": f"{n * 7919}"} for n in range(6000 if kind == "zst" else 2000)]
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(kind, bytes)
    (tmp_path / "a").mkdir()
    ending = "parquet" if kind == "parquet" else f"jsonl.{kind}"
    (tmp_path / "a" / f"a.{ending}").write_bytes(pack(jsonl(rows))[:-1000])
    (tmp_path / "a" / "b.jsonl").write_bytes(jsonl(ROWS))
    corpus = Corpus.open(prepare([Source(tmp_path / "a", skip_faulty=True)], tmp_path / "c", vocab_size=257))
    (seen,) = corpus.manifest["sources"]
    assert seen["left_out"]["damaged file"]["count"] == 1
    read = seen["documents"] - 30
    assert corpus.ids == [row["id"] for row in [*rows[:read], *ROWS]]
    assert read > 500 or kind == "parquet"


def test_numbers_of_any_length_are_read_past(tmp_path: Path) -> None:
    long = b'{"text": "kept", "id": "a", "big": ' + b"9" * 5000 + b"}\n"
    (tmp_path / "s.jsonl").write_bytes(long)
    assert texts_of(Source(tmp_path / "s.jsonl")) == [("a", "s", "kept")]
    for field, message in {
        "id": r"line 1: 'big' is a number of 5,000 digits; write a non-empty string",
        "text": r"line 1: 'big' is a number of 5,000 digits, not a string",
        "keep": r"line 1: 'big' is a number of 5,000 digits; keep numbers, text",
    }.items():
        fields = Fields(keep=("big",)) if field == "keep" else Fields(**{field: "big"})
        with pytest.raises(DataError, match=message):
            texts_of(Source(tmp_path / "s.jsonl", None, fields))
    (tmp_path / "s.jsonl").write_bytes(long[:-2000] + b"}\n")
    assert texts_of(Source(tmp_path / "s.jsonl", None, Fields(id="big")))[0][0] == "9" * 3002
    with pytest.raises(DataError, match=r"'big' is a whole number above 1e308; keep it as text"):
        texts_of(Source(tmp_path / "s.jsonl", None, Fields(keep=("big",))))
    (tmp_path / "s.jsonl").write_bytes(b"{" + long)
    with pytest.raises(DataError, match=r"line 1: not valid JSON \("):
        texts_of(Source(tmp_path / "s.jsonl"))


def test_marks_at_the_start_of_joined_files_are_skipped_and_null_is_empty(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    content = mark + jsonl(ROWS[:2]) + mark + b"\n" + mark + jsonl(ROWS[2:3]) + b'{"text": null}\n'
    (tmp_path / "s.jsonl").write_bytes(content)
    reader = SourceReader(Source(tmp_path / "s.jsonl"))
    assert [document.text for document in reader] == [row["text"] for row in ROWS[:3]]
    assert reader.empty == 1
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "t.parquet")
    reader = SourceReader(Source(tmp_path / "t.parquet"))
    assert ([document.text for document in reader], reader.empty) == (["a", "b"], 1)


# -- tables and fields -------------------------------------------------------------------------------------------------


def delimited(rows: list[dict[str, Any]], delimiter: str) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["s.csv", "s.tsv", "s.csv.gz", "s.tsv.zst"])
def test_delimited_tables_have_the_documents_of_json_lines(name: str, tmp_path: Path) -> None:
    rows = [{**row, "word": f"w{row['n']}", "none": None, "zip": f"0{row['n']}"} for row in ROWS]
    rows[7]["text"] = "long " * 30_000  # longer than the module's limit for a cell
    rows[8]["text"] = "42"
    content = ("\ufeff" + delimited(rows, "\t" if "tsv" in name else ",")).encode()
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(content))
    (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    fields = Fields(keep=("n", "word", "none", "zip"))
    readers = [SourceReader(Source(tmp_path / each, "d", fields)) for each in (name, "s.jsonl")]
    found = [[(each.id, each.domain, each.text, each.columns) for each in reader] for reader in readers]
    assert found[0] == found[1]
    assert [columns["n"] for *_, columns in found[0]] == list(range(30))


BROKEN_TABLES = {
    "too many cells": (b"id,text\na,b\nc,d,e\nf,g\n", r"line 3: 3 cells, but 2 columns in the first line"),
    "text after a quote": (b'id,text\na,b\nc,"d"e\nf,g\n', r"line 3: not valid CSV \(.*read up to line 3\)"),
    "not UTF-8": (b'id,text\na,b\nc,"\xe9\n"\nf,g\n', r"line 3: not UTF-8 at byte 3"),
}


@pytest.mark.parametrize("fault", BROKEN_TABLES)
def test_broken_rows_of_delimited_tables(fault: str, tmp_path: Path) -> None:
    content, message = BROKEN_TABLES[fault]
    path = tmp_path / "s.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(Source(path))
    assert [text for _, _, text in texts_of(Source(path, skip_faulty=True))] == ["b", "g"]
    path.write_bytes(b"id,id\na,b\n")
    with pytest.raises(DataError, match=r"line 1: the names of columns are \['id', 'id'\]; give each column one"):
        texts_of(Source(path))
    path.write_bytes(b"id,body\na,b\n")
    with pytest.raises(DataError, match=r"line 2: no field 'text' \(fields: body, id\)"):
        texts_of(Source(path))


def test_a_plugin_may_read_csv_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    READERS.load()
    monkeypatch.setattr(READERS, "_entries", dict(READERS))
    theirs = READERS.register("zzz", Reader(endings=(".csv",), text=lambda stored: ""))
    assert reader_of_file(Path("a.csv")) is theirs
    assert reader_of_file(Path("a.tsv.gz")) is READERS["delimited"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_within_fields(kind: str, tmp_path: Path) -> None:
    rows = [{"doc": {"text": f"t{n}", "meta": {"id": f"i{n}", "score": n}}, "a.b": f"d{n % 2}"} for n in range(5)]
    rows[3]["doc"] = None  # type: ignore[typeddict-item]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "s.parquet")
    else:
        (tmp_path / "s.jsonl").write_bytes(jsonl(rows))
    fields = Fields("doc.text", "doc.meta.id", "a.b", ("doc.meta.score", "doc.gone"))
    reader = SourceReader(Source(tmp_path / f"s.{kind}", None, fields))
    found = [(each.id, each.domain, each.text, each.columns) for each in reader]
    assert found == [(f"i{n}", f"d{n % 2}", f"t{n}", {"doc.meta.score": n, "doc.gone": None}) for n in (0, 1, 2, 4)]
    assert reader.empty == 1
    with pytest.raises(DataError, match=r"no field 'doc\.body' \("):
        texts_of(Source(tmp_path / f"s.{kind}", None, Fields("doc.body")))


def test_each_source_names_its_own_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"doc": {"text": "one"}, "key": "k", "kind": "x"}]))
    (tmp_path / "b,c.jsonl").write_bytes(jsonl([{"body": "two", "id": "z", "kind": "y"}]))
    common = Fields(text="body", domain="kind")
    parsed = [
        Source.parse(argument, common)
        for argument in (f"{tmp_path}/a.jsonl,text=doc.text,id=key", f"web={tmp_path}/b,c.jsonl", "hf:n:c,domain=lang")
    ]
    assert [texts_of(source) for source in parsed[:2]] == [[("k", "x", "one")], [("z", "web", "two")]]
    assert (parsed[2].path, parsed[2].fields) == (Path("hf:n:c"), Fields("body", "id", "lang"))
    with pytest.raises(
        DataError, match=r"a\.jsonl,txt=body: no option 'txt'; after a path may come text, id and domain"
    ):
        Source.parse("a.jsonl,txt=body")


def test_sub_folders_name_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("en/a.txt", "en/deep/b.txt", "fr/a.txt", "c.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(f"text of {name} " * 9)
    command = ["prepare", "--source", str(tmp_path / "texts"), "--vocab-size", "300", "--validation-fraction", "0"]
    assert main([*command, "--proxy-fraction", "0", "--folder-domains", "--out", str(tmp_path / "c")]) == 0
    capsys.readouterr()
    corpus = Corpus.open(tmp_path / "c")
    assert [corpus.domains[code] for code in corpus.domain_codes] == ["texts", "en", "en", "fr"]
    assert corpus.ids == ["texts/c.txt", "texts/en/a.txt", "texts/en/deep/b.txt", "texts/fr/a.txt"]
    (tmp_path / "texts" / "en" / "rows.jsonl").write_bytes(jsonl([{"text": "x", "domain": "own"}, {"text": "y"}]))
    source = Source(tmp_path / "texts", folder_domains=True)
    assert [domain for _, domain, _ in texts_of(source)] == ["en", "en"]
    assert {domain for _, domain, _ in texts_of(Source(tmp_path / "texts", "one", folder_domains=True))} == {"one"}
    assert [domain for _, domain, _ in texts_of(Source(tmp_path / "texts"))] == ["own", "texts"]
