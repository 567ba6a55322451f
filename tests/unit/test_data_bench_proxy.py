"""The verb proxy: nearest documents by a brute-force cosine, what leaves the pool, overlaps, going on after a kill."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megaopus.__main__ import main
from megaopus.cli.proxy import show
from megaopus.corpus_tools import benchmark_proxy, nearest_documents
from megaopus.corpus_tools.benchmark_proxy import build, read_items
from megaopus.corpus_tools.nearest_documents import Item
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.similarity import HashedTfidf, shared_runs
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import ROWS, Corpus
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

TOPICS = {
    "biology": [
        "cell",
        "bacteria",
        "lichen",
        "algae",
        "fungus",
        "protein",
        "enzyme",
        "tissue",
        "plant",
        "oxygen",
        "leaf",
        "root",
    ],
    "law": [
        "court",
        "judge",
        "clause",
        "contract",
        "statute",
        "appeal",
        "verdict",
        "tenant",
        "lawyer",
        "witness",
        "oath",
        "bail",
    ],
    "noise": [f"w{n}" for n in range(40)],
}
QUESTION = "which of the green algae and fungus supplies oxygen to a lichen that lives on bark in the shade"
ITEMS = [
    {"query": "What does a lichen gain from algae?", "choices": ["oxygen", "protein from the fungus"], "label": 0},
    {"query": QUESTION, "choices": {"text": ["leaf tissue", "enzyme"], "label": ["A", "B"]}, "label": 1},
]


def texts() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    found = [(topic, " ".join(rng.choice(words, 40))) for topic, words in TOPICS.items() for _ in range(60)]
    found += [("biology", found[0][1]), ("law", f"the exam asked: {QUESTION}, and nobody knew")]
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("bench")
    rows = [{"id": f"d{i}", "domain": topic, "text": text} for i, (topic, text) in enumerate(texts())]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = SplitRule(0.05, 0.1, seed=3)
    return Corpus.open(prepare([Source(folder / "rows.jsonl")], folder / "corpus", vocab_size=400, rule=rule))


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


def cosine(first: str, second: str, documents: list[str]) -> float:
    """TF-IDF as it is described, word by word."""
    bags = [Counter(re.findall(r"[^\W_]+", text.lower())) for text in (first, second)]
    frequency = Counter(word for text in documents for word in set(re.findall(r"[^\W_]+", text.lower())))
    idf = {w: math.log((1 + len(documents)) / (1 + frequency[w])) + 1e-3 for bag in bags for w in bag}
    rows = [{w: (1 + math.log(c)) * idf[w] for w, c in bag.items()} for bag in bags]
    norms = [math.sqrt(sum(v * v for v in row.values())) for row in rows]
    return sum(value * rows[1].get(word, 0) for word, value in rows[0].items()) / (norms[0] * norms[1])


def test_similarities_are_those_of_brute_force(items: Path) -> None:
    documents = [text for _, text in texts()]
    asked = [item.text for item in read_items([Source(items)], ["query", "choices"])]
    assert "leaf tissue" in asked[1]
    assert "A" not in asked[1].split()
    best, which = HashedTfidf(asked, iter(documents)).nearest([*documents, "", "unseenword"])
    for place, text in enumerate(documents):
        expected = [cosine(text, item, documents) for item in asked]
        assert best[place] == pytest.approx(max(expected), abs=1e-5)
        assert expected[which[place]] == pytest.approx(max(expected), abs=1e-5)
    assert best[-2:].tolist() == [0, 0]


def test_runs_of_words() -> None:
    first = shared_runs("The cat, sat; on a MAT today", 3)
    assert len(first) == 5
    assert np.isin(shared_runs("sat on a", 3), first).all()
    assert not np.isin(shared_runs("on sat a", 3), first).any()
    assert len(shared_runs("too short", 3)) == 0


@pytest.mark.parametrize("drop", [False, True])
def test_the_nearest_become_the_proxy_and_leave_the_pool(
    corpus: Corpus, items: Path, tmp_path: Path, drop: bool
) -> None:
    asked = read_items([Source(items)], ["query", "choices"])
    console = Console(record=True, width=220, file=(tmp_path / "log").open("w"))
    built = build(corpus, asked, tmp_path / "new", tokens=600, drop_overlap=drop, console=console)
    show(corpus, asked, built, console)
    out = built.path
    made = Corpus.open(out, verify=True)
    proxy, pool = (np.flatnonzero(made.split_codes == code) for code in (1, 0))
    assert 0 < made.lengths[proxy].sum() <= 600
    domains = {made.domains[code] for code in made.domain_codes[proxy]}
    overlapping = made.ids.index(f"d{len(texts()) - 1}")
    held_out = corpus.split_codes == 2
    if held_out[overlapping]:
        pytest.fail("the overlapping document is in validation: choose another seed")
    assert made.split_codes[overlapping] == (3 if drop else 1)
    assert domains == ({"biology"} if drop else {"biology", "law"})
    np.testing.assert_array_equal(made.split_codes == 2, held_out)
    contents = [made.tokens[made.offsets[n] : made.offsets[n] + made.lengths[n]].tolist() for n in range(len(made))]
    chosen = [contents[n] for n in proxy]
    assert sorted(built.found.documents[built.chosen]) == proxy.tolist()
    assert not any(contents[n] in chosen for n in pool)
    rows = [json.loads(line)["split"] for line in (out / ROWS).read_text().splitlines()]
    assert rows == [("pool", "proxy", "validation", "left_out")[code] for code in made.split_codes]
    assert made.fingerprint != corpus.fingerprint
    summary = made.manifest["provenance"]["proxy"]
    assert sum(summary["proxy_share"].values()) == pytest.approx(1, abs=1e-3)
    assert summary["overlapping_documents"] == {"pool": 0, "proxy": int(not drop), "left_out": int(drop)}
    assert summary["overlapping_items"] == 1
    said = console.export_text()
    assert "nearest documents" in said
    assert "items met: 1 of 2" in said
    Sequences(made, "pool", 16)


@pytest.mark.slow
def test_a_killed_run_goes_on(corpus: Corpus, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_proxy, "CHUNK", 30)
    asked = read_items([Source(items)], ["query", "choices"])
    shared = build(corpus, asked, tmp_path / "whole", tokens=600, workers=2)
    whole = Corpus.open(shared.path).fingerprint
    digest, calls = nearest_documents._digest, []

    def interrupted(*args: object) -> int:
        calls.append(args)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return digest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(nearest_documents, "_digest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, asked, tmp_path / "new", tokens=600, workers=1)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".new.work").glob("near-*.npz")}
    assert len(kept) == 3
    calls.clear()
    counted = lambda *args: calls.append(args) or digest(*args)  # noqa: E731
    monkeypatch.setattr(nearest_documents, "_digest", counted)
    assert Corpus.open(build(corpus, asked, tmp_path / "new", tokens=600, workers=1).path).fingerprint == whole
    assert len(calls) == (corpus.split_codes != 2).sum() - 90
    assert not (tmp_path / ".new.work").exists()


def test_a_sentence_transformers_model_by_name(
    corpus: Corpus, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's interface, as a model that counts letters has it."""
    asked_for = []

    class Letters:
        def __init__(self, name: str):
            asked_for.append(name)

        def encode(self, texts: list[str], normalize_embeddings: bool, show_progress_bar: bool) -> np.ndarray:
            assert normalize_embeddings
            rows = np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)
            return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Letters))
    asked = read_items([Source(items)], ["query", "choices"])
    out = build(corpus, asked, tmp_path / "new", tokens=400, encoder="some/model").path
    assert Corpus.open(out).manifest["provenance"]["proxy"]["encoder"] == "some/model"
    assert asked_for == ["some/model"]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataError, match="--encoder some/model: needs sentence_transformers"):
        build(corpus, asked, tmp_path / "other", tokens=400, encoder="some/model")


def test_mistakes_are_named(corpus: Corpus, items: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"items\.jsonl line 1: no text under goal \(fields: choices, label, query\)"):
        read_items([Source(items)], ["goal"])
    with pytest.raises(DataError, match="no document fits a proxy of 3 tokens"):
        build(corpus, [Item("one", "algae")], tmp_path / "new", tokens=3)
    with pytest.raises(DataError, match="larger than the pool it leaves, 0; use fewer --tokens"):
        build(corpus, [Item("one", "algae")], tmp_path / "new", tokens=10**9)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"notes\.txt: not a table"):
        read_items([Source(tmp_path / "notes.txt")], ["query"])
    assert not (tmp_path / "new").exists()


def test_command_line(corpus: Corpus, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--corpus", str(corpus.path), "--items", str(items), "--tokens", "600", "--out", str(tmp_path / "new")]
    assert main(["proxy", *options]) == 0
    assert "shares of tokens" in capsys.readouterr().out
    assert main(["proxy", *options]) == 2
    assert "already holds a corpus" in capsys.readouterr().err
