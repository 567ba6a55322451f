"""Every fault of a source or a corpus folder is named by place, with what to do; nothing is written."""

from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pytest
import zstandard

from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import CODE_DTYPE, Corpus, fingerprint_of, sha256_file
from megaopus.data.index import map_index, write_index
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

GOOD = b'{"text": "good"}\n'
TRUNCATED = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000)))[:-2000]

ZST = zstandard.compress(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000)))

BROKEN_SOURCES = {
    "broken json": ("s.jsonl", GOOD * 2 + b'{"text": "cut off\n', r"s\.jsonl line 3: not valid JSON \(.*column \d+\)"),
    "not an object": ("s.jsonl", GOOD + b"[1, 2]\n", r"s\.jsonl line 2: a JSON list, not an object"),
    "no text": (
        "s.jsonl",
        GOOD + b'{"body": "x", "id": "1"}\n',
        r"line 2: no field 'text' \(fields: body, id\); rename",
    ),
    "text no string": ("s.jsonl", b'{"text": ["a"]}\n', r"line 1: 'text' is a list, not a string"),
    "half surrogate": (
        "s.jsonl",
        b'{"text": "ab\\ud800"}\n',
        r"line 1: 'text' has half a surrogate pair at character 2",
    ),
    "bad id": ("s.jsonl", b'{"text": "a", "id": {}}\n', r"line 1: 'id' is \{\}; write a non-empty string"),
    "not utf-8": ("s.jsonl", GOOD + b'{"text": "caf\xe9"}\n', r"line 2: not UTF-8 at byte 13 \(0xe9\); convert"),
    "text not utf-8": ("s.txt", b"caf\xe9", r"s\.txt: not UTF-8 at byte 3 \(0xe9\)"),
    "truncated gzip": ("s.jsonl.gz", TRUNCATED, r"damaged or truncated gzip after line \d{2,} \(.*\); copy"),
    "no gzip": ("s.jsonl.gz", GOOD, r"damaged or truncated gzip after line 0 \(Not a gzipped file"),
    "nothing in it": ("s.jsonl", b"\n\n", r"s\.jsonl: no documents in it; drop this source"),
    "only empty documents": ("s.jsonl", b'{"text": " "}\n', r"no documents in it \(1 empty ones\)"),
    "unknown ending": ("s.docx", b"PK", r"s\.docx: unknown ending; .*\.jsonl"),
    "no parquet": ("s.parquet", b"PAR1", r"s\.parquet: not a readable parquet file"),
    "truncated zstandard": ("s.jsonl.zst", ZST[:-20], r"damaged or truncated zstandard after line \d+ \(.*\); copy"),
    "no zstandard": ("s.jsonl.zst", GOOD, r"damaged or truncated zstandard after line 0"),
    "duplicate ids": (
        "s.jsonl",
        b'{"text": "a", "id": "x"}\n{"text": "b"}\n{"text": "c", "id": "x"}\n',
        r"s\.jsonl line 3: id 'x' was already used at .*s\.jsonl line 1; make ids unique",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_SOURCES)
def test_broken_source(tmp_path, fault):
    name, content, message = BROKEN_SOURCES[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([Source(tmp_path / name)], tmp_path / "c", vocab_size=257)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_source(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file or folder; check the path"):
        prepare([Source(tmp_path / "gone.jsonl")], tmp_path / "c")
    with pytest.raises(DataError, match="no source given"):
        prepare([], tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no documents: the folder has no \.txt or \.md file, nor a table"):
        prepare([Source(tmp_path / "empty")], tmp_path / "c")


def test_the_same_source_twice_is_a_duplicate(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(GOOD)
    source = Source(tmp_path / "s.jsonl")
    with pytest.raises(DataError, match=r"id 's/s\.jsonl:1' was already used at .*s\.jsonl line 1"):
        prepare([source, source], tmp_path / "c")


def test_bad_settings(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(GOOD)
    source = Source(tmp_path / "s.jsonl")
    with pytest.raises(DataError, match=r"tok\.json: no such tokenizer file"):
        prepare([source], tmp_path / "c", tokenizer=tmp_path / "tok.json")
    (tmp_path / "tok.json").write_text("{}")
    with pytest.raises(DataError, match=r"tok\.json: not a tokenizer\.json"):
        prepare([source], tmp_path / "c", tokenizer=tmp_path / "tok.json")
    with pytest.raises(DataError, match=r"vocab_size = 100, .*at least 257"):
        prepare([source], tmp_path / "c", vocab_size=100)
    with pytest.raises(DataError, match=r"proxy_fraction = 1\.5: must lie in \[0, 1\)"):
        SplitRule(proxy_fraction=1.5)
    with pytest.raises(DataError, match="must stay below 1"):
        SplitRule(0.5, 0.5)
    with pytest.raises(DataError, match="wanted domain 'x': no document has it; the sources have: s"):
        prepare([source], tmp_path / "c", rule=SplitRule(wanted=("x",)))
    with pytest.raises(DataError, match="none of the 1 documents is in the pool"):
        prepare([source], tmp_path / "c", rule=SplitRule(0, 0.999999))
    (tmp_path / "n.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(40)))
    with pytest.raises(DataError, match=r"a proxy of \d+ documents is larger than the pool of \d+ .*lower the proxy"):
        prepare([Source(tmp_path / "n.jsonl")], tmp_path / "c", rule=SplitRule(0.9, 0))
    with pytest.raises(DataError, match="--source =x: not understood; write PATH or DOMAIN=PATH"):
        Source.parse("=x")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_documents_of_odd_sizes(tmp_path):
    """One letter, and a document many times as long as a batch or chunk of text: whole, in order, in their domains."""
    giant = "".join(f"{i * 7919 % 10007} " for i in range(250_000))
    texts = ["a", giant, "b", "an ordinary document", "\n.\n"]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = [
        prepare(
            [Source(tmp_path / "s.jsonl")], tmp_path / f"c{workers}", vocab_size=300, workers=workers, rule=NO_SPLIT
        )
        for workers in (1, 2)
    ]
    corpora = [Corpus.open(folder, verify=True) for folder in made]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    tokenizer = corpora[0].tokenizer()
    places = zip(corpora[0].offsets, corpora[0].lengths, strict=True)
    found = [corpora[0].tokens[start : start + length - 1] for start, length in places]
    assert [tokenizer.decode(tokens.tolist()) for tokens in found] == texts
    assert len(found[0]) == 1
    sequences = Sequences(corpora[0], "pool", 64)
    assert len(sequences) == (corpora[0].lengths.sum() - 1) // 64
    assert sequences.documents_of(0) == ["s/s.jsonl:1", "s/s.jsonl:2"]


NO_SPLIT = SplitRule(0, 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"text": f"document {i}", "id": f"d{i}"} for i in range(20)]
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare([Source(folder / "s.jsonl")], folder / "corpus", vocab_size=300)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def edit_manifest(folder, resign=True, **changes):
    """Change the manifest; ``resign`` makes its fingerprint fit again, as another tool's manifest would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    if resign:
        for name, entry in manifest["files"].items():
            entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        manifest["fingerprint"] = fingerprint_of(manifest)
    path.write_text(json.dumps(manifest))


def fails(folder, message, verify=False):
    with pytest.raises(DataError, match=message):
        Corpus.open(folder, verify=verify)


def test_no_corpus(tmp_path, copy):
    fails(tmp_path / "gone", r"gone: no such folder; make it with 'python -m megaopus prepare")
    (copy / "manifest.json").unlink()
    fails(copy, r"copy: not a prepared corpus \(no manifest\.json\)")


def test_manifest_not_readable(copy):
    (copy / "manifest.json").write_text("{")
    fails(copy, r"manifest\.json: not valid JSON")
    (copy / "manifest.json").write_text('{"format_version": 1}')
    fails(copy, r"manifest\.json: lacks documents, domains, eod_id")


def test_manifest_of_another_format(copy):
    edit_manifest(copy, format_version=99)
    fails(copy, "format version 99, this megaopus reads 1")


def test_manifest_edited_by_hand(copy):
    edit_manifest(copy, resign=False, eod_id=5)
    fails(copy, "its fingerprint does not fit its contents")


def test_truncated_tokens(copy):
    content = (copy / "tokens.bin").read_bytes()
    (copy / "tokens.bin").write_bytes(content[:-10])
    fails(copy, rf"tokens\.bin: cut off: {len(content) - 10:,} bytes, {len(content):,} by the manifest")


def test_missing_file(copy):
    (copy / "tokens.idx").unlink()
    fails(copy, r"tokens\.idx: missing, though the manifest lists it")


def test_wrong_magic(copy):
    content = (copy / "tokens.idx").read_bytes()
    (copy / "tokens.idx").write_bytes(b"XX" + content[2:])
    fails(copy, r"tokens\.idx: not a Megatron index \(wrong first bytes b'XXIDIDX")


def test_index_of_another_token_type(copy):
    index = copy / "tokens.idx"
    write_index(index, map_index(index).lengths.copy(), np.dtype("<i4"))
    edit_manifest(copy)
    fails(copy, r"tokens\.idx: tokens of int32, uint16 by the manifest")
    content = bytearray(index.read_bytes())
    content[17] = 5
    index.write_bytes(bytes(content))
    fails(copy, r"tokens\.idx: version 1, dtype code 5 are not read here")


def test_index_whose_documents_do_not_touch(copy):
    content = bytearray((copy / "tokens.idx").read_bytes())
    content[34:38] = (7777).to_bytes(4, "little")
    (copy / "tokens.idx").write_bytes(bytes(content))
    fails(copy, r"tokens\.idx: document 1 does not begin where the one before it ends")


def test_index_and_tokens_that_do_not_belong_together(copy):
    lengths = map_index(copy / "tokens.idx").lengths.copy()
    lengths[0] = 7777
    write_index(copy / "tokens.idx", lengths, np.dtype("<u2"))
    edit_manifest(copy)
    fails(copy, r"tokens\.idx: its documents have \d,\d+ tokens, tokens\.bin has \d+ by the manifest")


def test_document_counts_that_differ(copy):
    edit_manifest(copy, documents=19)
    fails(copy, r"tokens\.idx: 20 documents, 19 by the manifest")


def test_document_table_of_another_length(copy):
    np.save(copy / "documents.npy", np.zeros(3, dtype=CODE_DTYPE))
    edit_manifest(copy)
    fails(copy, r"documents\.npy: \(3,\) rows .* but the manifest has 20 documents")


def test_a_changed_token_is_found_when_asked_to_verify(copy):
    content = bytearray((copy / "tokens.bin").read_bytes())
    content[4] ^= 1
    (copy / "tokens.bin").write_bytes(bytes(content))
    Corpus.open(copy)
    fails(copy, r"tokens\.bin: changed since it was prepared .*fingerprint no longer stands for it", verify=True)


def test_token_outside_the_vocabulary(copy):
    corpus = Corpus.open(copy)
    highest = int(np.argmax(corpus.tokens))
    edit_manifest(copy, vocab_size=int(corpus.tokens.max()))
    fails(copy, rf"tokens\.bin: token \d+ at position {highest:,} lies outside the vocabulary of \d+", verify=True)
