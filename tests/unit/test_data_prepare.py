"""prepare: what the corpus folder holds, how documents are split, and that it is all or nothing."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil

import numpy as np
import pytest
from rich.console import Console

from megaopus.__main__ import main
from megaopus.corpus_tools import prepare as prepare_module
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import FILES, ROWS, SPLITS, Corpus
from megaopus.errors import DataError

POOL = SplitRule(0, 0)
"""Nothing is held out."""
HALVES = SplitRule(proxy_fraction=0.3, validation_fraction=0.2, wanted=("wanted",))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_rows(count=60):
    return [
        {"id": f"d{i}", "domain": ("wanted", "other")[i % 2], "text": f"Document {i}. " + "word " * (i % 7 + 1)}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    source = write_rows(folder / "rows.jsonl", small_rows())
    return Corpus.open(prepare([Source(source)], folder / "corpus", vocab_size=300, rule=HALVES), verify=True)


def test_megatron_reads_the_documents_that_were_written(corpus):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(corpus.path / "tokens"))
    tokenizer = corpus.tokenizer()
    assert len(dataset) == len(corpus) == 60
    for index, row in enumerate(small_rows()):
        ids = np.array(dataset[index])
        assert ids[-1] == corpus.eod_id
        assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == row["text"]
        start, length = corpus.offsets[index], corpus.lengths[index]
        np.testing.assert_array_equal(corpus.tokens[start : start + length], ids)
    assert dataset.document_indices.tolist() == list(range(61))


def test_table_rows_and_manifest_agree(corpus):
    rows = [json.loads(line) for line in (corpus.path / "documents.jsonl").read_text().splitlines()]
    assert corpus.ids == [row["id"] for row in small_rows()] == [row["id"] for row in rows]
    assert [corpus.domains[code] for code in corpus.domain_codes] == [row["domain"] for row in rows]
    assert [SPLITS[code] for code in corpus.split_codes] == [row["split"] for row in rows]
    assert corpus.lengths.tolist() == [row["length"] for row in rows]
    for domain, splits in corpus.manifest["counts"].items():
        for split, counts in splits.items():
            here = [row["length"] for row in rows if (row["domain"], row["split"]) == (domain, split)]
            assert counts == {"documents": len(here), "tokens": sum(here)}


def test_only_wanted_domains_give_a_proxy_and_every_domain_gives_validation(corpus):
    counts = corpus.manifest["counts"]
    assert counts["other"]["proxy"]["documents"] == 0
    assert counts["wanted"]["proxy"]["documents"] > 0
    assert all(counts[domain]["validation"]["documents"] > 0 for domain in ("wanted", "other"))
    assert all(counts[domain]["pool"]["documents"] > 0 for domain in ("wanted", "other"))


def test_fingerprint_depends_on_content_not_on_place(tmp_path, corpus):
    elsewhere = tmp_path / "other place"
    elsewhere.mkdir()
    source = write_rows(elsewhere / "renamed.jsonl", small_rows())
    again = Corpus.open(prepare([Source(source)], tmp_path / "again", vocab_size=300, rule=HALVES))
    assert again.fingerprint == corpus.fingerprint
    rows = small_rows()
    rows[3]["text"] += "!"
    changed = prepare([Source(write_rows(source, rows))], tmp_path / "changed", vocab_size=300, rule=HALVES)
    assert Corpus.open(changed).fingerprint != corpus.fingerprint
    seeded = SplitRule(0.3, 0.2, ("wanted",), seed=1)
    other = prepare([Source(write_rows(source, small_rows()))], tmp_path / "seed", vocab_size=300, rule=seeded)
    assert Corpus.open(other).fingerprint != corpus.fingerprint


def test_equal_texts_never_lie_in_two_splits(tmp_path):
    rows = [{"text": f"text {i % 40}", "domain": ("wanted", "other")[i // 40 % 2]} for i in range(160)]
    rows += [{"text": f"only wanted {i}", "domain": "wanted"} for i in range(40)]
    out = prepare([Source(write_rows(tmp_path / "s.jsonl", rows))], tmp_path / "c", vocab_size=257, rule=HALVES)
    corpus = Corpus.open(out)
    splits: dict[str, set[int]] = {}
    for row, split in zip(rows, corpus.split_codes.tolist(), strict=True):
        splits.setdefault(row["text"], set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    # Each of these 40 texts is in the unwanted domain too, so none may be proxy; the others may.
    assert SPLITS.index("proxy") not in {split for i in range(40) for split in splits[f"text {i}"]}
    assert corpus.manifest["counts"]["wanted"]["proxy"]["documents"] > 0


def test_split_fractions_are_met(tmp_path):
    rows = [{"text": f"number {i:05}"} for i in range(4000)]
    source = Source(write_rows(tmp_path / "s.jsonl", rows))
    counts = Corpus.open(prepare([source], tmp_path / "c", vocab_size=257, rule=SplitRule(0.1, 0.05))).manifest[
        "counts"
    ]["s"]
    assert counts["proxy"]["documents"] == pytest.approx(400, abs=60)
    assert counts["validation"]["documents"] == pytest.approx(200, abs=45)


def test_sources_of_every_kind(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write('{"text": "from gzip", "id": 7}\n\n{"text": "  "}\n{"text": "no id", "domain": "own"}\n')
    folder = tmp_path / "essays"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("\ufeffplain ünïcode", encoding="utf-8")
    (folder / "deep" / "a.md").write_text("# mark-up", encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"\xff")
    readers = [
        SourceReader(Source.parse(argument))
        for argument in (f"{tmp_path}/rows.jsonl.gz", f"named={tmp_path}/rows.jsonl.gz", f"{folder}")
    ]
    found = [[(document.id, document.domain, document.text) for document in reader] for reader in readers]
    assert found[0] == [("7", "rows", "from gzip"), ("own/rows.jsonl.gz:4", "own", "no id")]
    assert found[1] == [("7", "named", "from gzip"), ("named/rows.jsonl.gz:4", "named", "no id")]
    assert found[2] == [("essays/b.txt", "essays", "plain ünïcode"), ("essays/deep/a.md", "essays", "# mark-up")]
    assert [reader.empty for reader in readers] == [1, 1, 0]


def test_special_tokens_written_in_a_text_stay_text(tmp_path):
    text = "a<|endoftext|>b"
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": text}]))
    corpus = Corpus.open(prepare([source], tmp_path / "c", vocab_size=257, rule=SplitRule(0, 0)))
    assert (np.asarray(corpus.tokens) == corpus.eod_id).sum() == 1
    assert corpus.lengths.tolist() == [len(text) + 1]


def test_tokenizer_is_trained_on_the_pool_alone(tmp_path):
    rows = small_rows()
    source = Source(write_rows(tmp_path / "a.jsonl", rows))
    first = Corpus.open(prepare([source], tmp_path / "a", vocab_size=300, rule=HALVES))
    held_out = [row for row, split in zip(rows, first.split_codes, strict=True) if SPLITS[split] != "pool"]
    kept = [row for row in rows if row not in held_out]
    assert held_out
    source = Source(write_rows(tmp_path / "b.jsonl", kept))
    second = Corpus.open(prepare([source], tmp_path / "b", vocab_size=300, rule=SplitRule(0, 0)))
    assert second.tokenizer_sha256 == first.tokenizer_sha256


def test_a_given_tokenizer_is_used_as_it_is(tmp_path, corpus):
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": "Document 5 of another corpus"}]))
    given = corpus.path / "tokenizer.json"
    other = Corpus.open(prepare([source], tmp_path / "c", tokenizer=given, rule=SplitRule(0, 0)))
    assert other.tokenizer_sha256 == corpus.tokenizer_sha256
    assert other.vocab_size == corpus.vocab_size == 300
    with pytest.raises(DataError, match=r"no token '</s>'; .*special tokens: '<\|endoftext\|>'"):
        prepare([source], tmp_path / "d", tokenizer=given, eod_token="</s>")


def test_a_finished_folder_is_kept_unless_told_otherwise(tmp_path):
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": "first"}]))
    out = prepare([source], tmp_path / "c", vocab_size=257, rule=POOL)
    before = Corpus.open(out).fingerprint
    write_rows(source.path, [{"text": "second"}])
    with pytest.raises(DataError, match=r"already holds a corpus; .*--overwrite"):
        prepare([source], out, vocab_size=257, rule=POOL)
    assert Corpus.open(out).fingerprint == before
    prepare([source], out, vocab_size=257, rule=POOL, overwrite=True)
    assert Corpus.open(out).fingerprint != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "s.jsonl"]


def test_a_folder_that_is_no_corpus_is_never_replaced(tmp_path):
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": "first"}]))
    with pytest.raises(DataError, match="exists and is not a corpus"):
        prepare([source], tmp_path, vocab_size=257, rule=POOL, overwrite=True)
    assert source.path.exists()


def test_a_failure_leaves_nothing_behind_and_the_old_corpus_alone(tmp_path, monkeypatch):
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": "first"}]))
    out = prepare([source], tmp_path / "c", vocab_size=257, rule=POOL)
    before = Corpus.open(out).fingerprint

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "_write_manifest", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left on device"):
        prepare([source], out, vocab_size=257, rule=POOL, overwrite=True)
    with pytest.raises(DataError, match="No space left"):
        prepare([source], tmp_path / "new", vocab_size=257, rule=POOL)
    assert Corpus.open(out, verify=True).fingerprint == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "s.jsonl"]


def test_what_a_killed_run_left_is_removed_with_a_line(tmp_path):
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": "first"}]))
    leftover = tmp_path / ".c.partial"
    leftover.mkdir()
    (leftover / "tokens.bin").write_bytes(b"half")
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    out = prepare([source], tmp_path / "c", vocab_size=257, rule=POOL, console=console)
    assert f"removed {leftover}, left by a run that was killed" in console.export_text()
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "manifest.json"])  # too short for a sequence
    assert not leftover.exists()


def test_killed_while_overwriting_gives_the_old_corpus_back(tmp_path):
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": "first"}]))
    out = prepare([source], tmp_path / "c", vocab_size=257, rule=POOL)
    before = Corpus.open(out).fingerprint
    out.rename(tmp_path / ".c.old")
    with pytest.raises(DataError, match="already holds a corpus"):
        prepare([source], out, vocab_size=257, rule=POOL)
    assert Corpus.open(out, verify=True).fingerprint == before
    assert not (tmp_path / ".c.old").exists()


def test_two_runs_cannot_write_one_corpus(tmp_path):
    source = Source(write_rows(tmp_path / "s.jsonl", [{"text": "first"}]))
    busy = tmp_path / ".c.partial"
    busy.mkdir()
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is writing it now"):
        prepare([source], tmp_path / "c", vocab_size=257, rule=POOL)
    assert busy.exists()
    os.close(descriptor)
    prepare([source], tmp_path / "c", vocab_size=257, rule=POOL)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = Source(write_rows(tmp_path / "s.jsonl", small_rows(4)))
    train = prepare_module.train_tokenizer

    def meddle(texts, vocab_size):
        made = train(texts, vocab_size)
        write_rows(source.path, small_rows(5))
        return made

    monkeypatch.setattr(prepare_module, "train_tokenizer", meddle)
    with pytest.raises(DataError, match=r"s\.jsonl: changed while it was being read"):
        prepare([source], tmp_path / "c", vocab_size=257)
    assert not (tmp_path / "c").exists()


def test_command_line(tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", small_rows())
    options = ["--vocab-size", "300", "--proxy-fraction", ".3", "--validation-fraction", ".2"]
    out = tmp_path / "c"
    command = ["prepare", "--source", str(source), "--out", str(out), *options]
    assert main([*command, "--target-domains", "wanted"]) == 0
    counts = Corpus.open(out).manifest["counts"]
    text, notes = capsys.readouterr()
    assert notes == ""
    assert f"fingerprint {Corpus.open(out).fingerprint[:16]}" in text
    assert f"{counts['wanted']['proxy']['documents']:,} / {counts['wanted']['proxy']['tokens']:,}" in text
    assert main([*command, "--wanted", "wanted", "--overwrite"]) == 0
    assert Corpus.open(out).manifest["counts"] == counts
    assert "note: --wanted is now --target-domains" in capsys.readouterr().err
    shutil.rmtree(out)
    assert main(["prepare", "--out", str(out)]) == 2
    assert "no source given; name at least one with --source, or --data NAME" in capsys.readouterr().err


def test_sources_of_a_data_config(tmp_path, capsys):
    """The shipped entries' sources are replaced by local ones; what else they say holds, but for the command line."""
    rows = [{"text": f"Page {i}", "id": f"p{i}", "score": i / 2, "int_score": i, "url": "u"} for i in range(300)]
    source = write_rows(tmp_path / "pages.jsonl", rows)
    common = ["prepare", "--source", f"web={source}", "--vocab-size", "300"]
    assert main([*common, "--data", "fineweb_edu", "--out", str(tmp_path / "a")]) == 0
    kept = [json.loads(line)["columns"] for line in (tmp_path / "a" / ROWS).read_text().splitlines()]
    assert kept[4] == {"url": "u", "score": 2.0, "int_score": 4}
    assert main([*common, "--data", "fineweb_edu", "--keep", "score", "--out", str(tmp_path / "b")]) == 0
    kept = [json.loads(line)["columns"] for line in (tmp_path / "b" / ROWS).read_text().splitlines()]
    assert kept[4] == {"score": 2.0}
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "data" / "pages.yaml").write_text(f"prepare:\n  sources: ['{source}']\n  text_field: id\n")
    assert main(["prepare", "--config-dir", str(mine), "--data", "pages", "--out", str(tmp_path / "c")]) == 0
    assert Corpus.open(tmp_path / "c").domains == ["pages"]
    capsys.readouterr()
    assert main(["prepare", "--data", "fineweb_edo", "--out", str(tmp_path / "d")]) == 2
    assert "did you mean data=fineweb_edu?" in capsys.readouterr().err
