"""Tables, packed files, data sets of the hub's form, columns that are kept, and tokenizers of every form."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source, SourceReader
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import ROWS, Corpus
from megaopus.data.tokenizer import BPE_FILES, load_tokenizer, train_tokenizer
from megaopus.errors import DataError

ROWS_OF = [
    {
        "body": f"Document {i} about {'birds' if i % 2 else 'stones'}.",
        "url": f"u{i}",
        "kind": "ab"[i % 2],
        "score": i / 4,
    }
    for i in range(2500)
]
FIELDS = Fields(text="body", id="url", domain="kind", keep=("score", "missing"))
EXPECTED = [(row["url"], row["kind"], row["body"], {"score": row["score"], "missing": None}) for row in ROWS_OF]
WHOLE = SplitRule(0, 0)


def lines() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS_OF)


def write(folder: Path, kind: str) -> str:
    """The rows in one of the forms; returns what ``--source`` takes."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl.zst":
        half = len(lines()) // 2  # two frames, as parallel packers write them
        path.write_bytes(zstandard.compress(lines()[:half]) + zstandard.compress(lines()[half:]))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS_OF), path, row_group_size=700)
    elif kind == "folder":
        (path / "deep").mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(ROWS_OF[:1000]), path / "a.parquet")
        (path / "deep" / "b.jsonl").write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in ROWS_OF[1000:]))
        (path / "notes.md").write_text("not a table")
    elif kind == "hub":
        path.mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(ROWS_OF), path / "train.parquet")
        return f"hf:{path}"
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS_OF).save_to_disk(str(path))
        return f"hf:{path}"
    elif kind == "saved_splits":
        made = datasets.Dataset.from_list(ROWS_OF)
        datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(str(path))
        return f"hf:{path}::train"
    return str(path)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet", "folder", "hub", "saved", "saved_splits"])
def test_every_form_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
    readers = [SourceReader(Source.parse(write(tmp_path, kind), FIELDS)) for _ in range(1)]
    readers.append(SourceReader(readers[0].source))
    for reader in readers:
        found = [(d.id, d.domain, d.text, dict(d.columns)) for d in reader]
        assert found == EXPECTED
        assert reader.bytes > 0
    assert readers[0].sha256 == readers[1].sha256


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_a_changed_value_changes_the_digest(kind: str, tmp_path: Path) -> None:
    digests = []
    for name, first in (("a", 0.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        rows = [{**ROWS_OF[0], "score": first}, *ROWS_OF[1:5]]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name / "rows.parquet")
        source = f"hf:{tmp_path / name}" if kind == "hub" else str(tmp_path / name / "rows.parquet")
        reader = SourceReader(Source.parse(source, FIELDS))
        assert len(list(reader)) == 5
        digests.append(reader.sha256)
    assert digests[0] != digests[1]


def test_columns_are_kept_in_the_document_table(tmp_path: Path) -> None:
    source = Source.parse(write(tmp_path, "parquet"), FIELDS)
    corpus = Corpus.open(prepare([source], tmp_path / "c", vocab_size=300, rule=WHOLE), verify=True)
    rows = [json.loads(line) for line in (corpus.path / ROWS).read_text().splitlines()]
    assert [row["columns"] for row in rows] == [columns for *_, columns in EXPECTED]
    assert [row["id"] for row in rows] == [row["url"] for row in ROWS_OF]
    assert corpus.domains == ["a", "b"]
    plain = Source.parse(str(source.path), Fields(text="body", id="url", domain="kind"))
    without = Corpus.open(prepare([plain], tmp_path / "d", vocab_size=300, rule=WHOLE))
    assert "columns" not in (without.path / ROWS).read_text()
    np.testing.assert_array_equal(without.tokens, corpus.tokens)


FAULTS = {
    "a list to keep": ({**ROWS_OF[0], "score": [1]}, r"rows\.parquet row 1: 'score' is a list; keep numbers"),
    "no text": ({"text": "x"}, r"rows\.parquet: no field 'body' \(fields: text\);.*--text-field"),
    "text is a number": ({**ROWS_OF[0], "body": 5}, r"rows\.parquet row 1: 'body' is a int, not a string"),
    "twice the same id": (None, r"rows\.parquet row 2: id 'u0' was already used at .*rows\.parquet row 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_tables(fault: str, tmp_path: Path) -> None:
    row, message = FAULTS[fault]
    rows = [ROWS_OF[0], ROWS_OF[0]] if row is None else [row]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        prepare([Source.parse(str(tmp_path / "rows.parquet"), FIELDS)], tmp_path / "c", vocab_size=257)
    assert not (tmp_path / "c").exists()


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (f"hf:{tmp_path / 'empty'}", "hf:nobody/nothing", f"hf:{write(tmp_path, 'hub')[3:]}::validation"):
        with pytest.raises(DataError, match=r"hf:.*: cannot be read \(\w+.*check the name, configuration and split"):
            prepare([Source.parse(source, FIELDS)], tmp_path / "c", vocab_size=257)


def test_names_of_hub_sources(tmp_path: Path) -> None:
    source = Source.parse("web=hf:HuggingFaceFW/fineweb-edu:sample-10BT")
    assert (source.domain, source.name, source.single_domain) == (
        "web",
        "HuggingFaceFW/fineweb-edu:sample-10BT:train",
        "web",
    )
    source = Source.parse("hf:roneneldan/TinyStories::validation")
    assert (source.name, source.single_domain) == ("roneneldan/TinyStories:validation", "TinyStories")


@pytest.mark.parametrize("names", [*BPE_FILES, ("tokenizer.json",)], ids="-".join)
def test_tokenizers_from_a_folder(names: tuple[str, ...], tmp_path: Path) -> None:
    texts = [row["body"] for row in ROWS_OF[:200]]
    trained = train_tokenizer(iter(texts), 400)
    if len(names) == 1:
        trained.save(str(tmp_path / names[0]))
    else:
        for written, name in zip(trained.model.save(str(tmp_path)), names, strict=True):
            Path(written).rename(tmp_path / name)
    loaded = load_tokenizer(tmp_path)
    for text in (*texts[:3], " ünïcode\n\n<|endoftext|>"):
        assert loaded.encode(text).ids == trained.encode(text).ids
        assert loaded.decode(loaded.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no tokenizer in it; it needs a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("broken line")
    with pytest.raises(DataError, match=r"encoder\.json and vocab\.bpe are not a BPE"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: no such tokenizer file or folder, and not to be had"):
        load_tokenizer("nobody/nothing")
