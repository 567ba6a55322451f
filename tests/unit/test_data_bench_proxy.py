"""The verb proxy: nearest documents by a brute-force cosine, what leaves the pool, overlaps, going on after a kill."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megaopus.__main__ import main
from megaopus.cli.proxy import show
from megaopus.corpus_tools import benchmark_proxy, nearest_documents
from megaopus.corpus_tools.benchmark_proxy import USUAL, Limits, assign, build, read_items
from megaopus.corpus_tools.held_out import divide
from megaopus.corpus_tools.near_duplicates import ALIKE, NearDuplicates
from megaopus.corpus_tools.nearest_documents import OVERLAP_WORDS, Found, Item
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
    built = build(corpus, asked, tmp_path / "new", tokens=600, limits=Limits(), drop_overlap=drop, console=console)
    show(corpus, built, console)
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


def questions() -> list[Item]:
    """Forty items of each topic, some of them twice."""
    rng = np.random.default_rng(5)
    found = [Item(f"{topic} {n}", " ".join(rng.choice(words, 8))) for topic, words in TOPICS.items() for n in range(40)]
    return [*found, *(Item(f"{item.name} again", item.text) for item in found[::7])]


def is_held(text: str, share: float) -> bool:
    """As it is described: the first 8 bytes of a digest of the text, as a fraction."""
    return hash_of(text) < share


def test_what_is_held_out_is_seen_by_nothing_else(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items by which no document was looked for, documents in no other split, chosen by hash: in a corpus of them."""
    asked, items, share = [], questions(), 0.2
    law = np.flatnonzero((corpus.domain_codes == corpus.domains.index("law")) & (corpus.split_codes == 0))
    shared = corpus.texts([law[0]])[0]  # a document that an item held out is a part of
    leaked = next(
        Item(f"leaked {n}", text)
        for n in range(20)
        if is_held(text := " ".join(shared.split()[n : n + OVERLAP_WORDS]), share)
    )
    items.append(leaked)

    def recorded(texts: list[str], sample: Iterator[str]) -> HashedTfidf:
        asked.extend(texts)
        return HashedTfidf(texts, sample)

    monkeypatch.setattr(nearest_documents, "HashedTfidf", recorded)
    built = build(corpus, items, tmp_path / "new", tokens=900, limits=Limits(), held_out=share, workers=1)
    made, old = Corpus.open(built.path, verify=True), np.asarray(corpus.split_codes)
    held_items = [item for item in items if is_held(item.text, share)]
    assert 0.1 < len(held_items) / len(items) < 0.3
    assert asked == [item.text for item in items if item not in held_items]
    held, proxy, pool = (np.flatnonzero(made.split_codes == code) for code in (4, 1, 0))
    contents = [made.tokens[made.offsets[n] : made.offsets[n] + made.lengths[n]].tolist() for n in range(len(made))]
    taken = built.found.documents[np.lexsort((built.found.documents, -built.found.similarity))]
    taken = [n for place, n in enumerate(taken) if contents[n] not in [contents[m] for m in taken[:place]]]
    reached = max(taken.index(n) for n in proxy)
    near = [n for n in taken[: reached + 1] if made.split_codes[n] != 3]
    for text, document in zip(corpus.texts(near), near, strict=True):
        assert (document in held) == is_held(text, share)
    assert 2 < len(held) < len(proxy)
    assert not {tuple(contents[n]) for n in held} & {tuple(contents[n]) for n in (*proxy, *pool)}
    assert made.lengths[proxy].sum() <= 900
    assert not any(shared in text for text in made.texts([*proxy, *pool]))
    assert not any(old[n] == 2 for n in (*held, *proxy))
    target = made.target
    assert target is not None
    assert target.domains == ["items", "nearest"]
    assert set(target.split_codes) == {4}
    assert target.texts(range(len(target))) == [item.text for item in held_items] + made.texts(held)
    assert target.ids == [item.name for item in held_items] + [made.ids[n] for n in held]
    assert [target.domains[code] for code in target.domain_codes] == ["items"] * len(held_items) + ["nearest"] * len(
        held
    )
    assert (target.tokenizer_sha256, target.eod_id) == (made.tokenizer_sha256, made.eod_id)
    assert (target.tokens[target.offsets + target.lengths - 1] == made.eod_id).all()
    assert sum(splits["target"]["documents"] for splits in made.manifest["counts"].values()) == len(held)
    shutil.move(target.path, tmp_path / "aside")
    with pytest.raises(DataError, match=r"new/target: missing, though .* names it; copy the whole folder .*new again"):
        _ = Corpus.open(built.path).target
    shutil.copytree(corpus.path, target.path)
    with pytest.raises(DataError, match=r"new/target: another target than this corpus was made with; copy the whole"):
        Corpus.open(built.path, verify=True)
    again = build(made, items, tmp_path / "without", tokens=900, limits=Limits(), held_out=0)
    assert Corpus.open(again.path).target is None
    assert "target" not in [path.name for path in again.path.iterdir()]


def test_of_few_items_one_is_always_looked_for_by() -> None:
    items = [Item(text, text) for text in ("algae", "orbit", "court")]
    for count in (1, 3):
        searched, held = divide(items[:count], 0.999999)
        assert len(searched) == 1
        assert sorted(item.text for item in [*searched, *held]) == sorted(item.text for item in items[:count])


def test_near_duplicates_of_what_is_held_out_are_not_in_the_proxy(pages: Corpus) -> None:
    """The other way round too, whatever their number may be."""
    names = ["a0", "a1", "a2", "b0", "b1"]
    documents, items = np.array([pages.ids.index(name) for name in names]), np.array([0, 0, 0, 1, 1])
    digest, no = np.arange(5, dtype=np.uint64), np.zeros(5, dtype=bool)
    found = Found(documents, np.linspace(0.9, 0.5, 5), items, no, no, digest, np.zeros(2, bool))
    mixed = 0
    for share in sorted(hash_of(PAGES[name][1]) for name in names)[:-1]:
        chosen = assign(pages, found, 10**6, Limits(per_near_duplicate=3), False, share + 1e-9)
        proxy, held, left = ({pages.ids[n] for n in np.flatnonzero(chosen.splits == code)} for code in (1, 4, 3))
        assert proxy | held | left == set(names)
        assert held == {name for name in names if hash_of(PAGES[name][1]) <= share} - left
        assert not {name[0] for name in proxy} & {name[0] for name in held}
        assert chosen.passed_over["per_near_duplicate"] == len(left)
        mixed += bool(left)
    assert mixed


def hash_of(text: str) -> float:
    return int(hashlib.sha256(f"target:{text}".encode()).hexdigest()[:16], 16) / 16**16


@pytest.mark.slow
def test_tasks_find_the_same(corpus: Corpus, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many chunks: by tasks of datatrove, and sent elsewhere in another order, where another corpus is refused."""
    pytest.importorskip("datatrove", reason="needs datatrove (extra scale)")
    monkeypatch.setattr(benchmark_proxy, "CHUNK", 20)
    command = ["proxy", "--corpus", str(corpus.path), "--items", str(items), "--tokens", "600"]
    command += ["--min-tokens", "20", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "here")]) == 0
    assert main([*command, "--out", str(tmp_path / "tasks"), "--executor", "local", "--tasks", "3"]) == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("here", "tasks")]
    assert manifests[0] == manifests[1]
    done: list[int] = []

    def hands(units: nearest_documents.SearchChunks, advance: Any) -> None:
        sent = pickle.loads(pickle.dumps(units))
        for number in reversed(sent.numbers()):
            sent.work(number)
            done.append(number)
        other = pickle.loads(pickle.dumps(replace(units, fingerprint="of another")))
        with pytest.raises(DataError, match="changed while its documents were compared"):
            other.work(0)

    asked = read_items([Source.parse(str(items))], ["query", "choices"])
    limits = replace(USUAL, min_tokens=20)
    made = build(corpus, asked, tmp_path / "sent", tokens=600, limits=limits, hands=hands)
    assert Corpus.open(made.path).fingerprint == manifests[0]["fingerprint"]
    assert len(done) > 5


def test_a_killed_run_goes_on(corpus: Corpus, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_proxy, "CHUNK", 30)
    asked = read_items([Source(items)], ["query", "choices"])
    shared = build(corpus, asked, tmp_path / "whole", tokens=600, limits=Limits(), workers=2)
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
            build(corpus, asked, tmp_path / "new", tokens=600, limits=Limits(), workers=1)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".new.work").glob("near-*.npz")}
    assert len(kept) == 3
    calls.clear()
    counted = lambda *args: calls.append(args) or digest(*args)  # noqa: E731
    monkeypatch.setattr(nearest_documents, "_digest", counted)
    assert (
        Corpus.open(build(corpus, asked, tmp_path / "new", tokens=600, limits=Limits(), workers=1).path).fingerprint
        == whole
    )
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
    out = build(corpus, asked, tmp_path / "new", tokens=400, limits=Limits(), encoder="some/model").path
    assert Corpus.open(out).manifest["provenance"]["proxy"]["encoder"] == "some/model"
    assert asked_for == ["some/model"]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataError, match=r"needs sentence_transformers, .* 'megaopus\[sentence-transformers\]'"):
        build(corpus, asked, tmp_path / "other", tokens=400, encoder="some/model")


def test_mistakes_are_named(corpus: Corpus, items: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"items\.jsonl line 1: no text under goal \(fields: choices, label, query\)"):
        read_items([Source(items)], ["goal"])
    with pytest.raises(DataError, match="no document fits a proxy of 3 tokens; use more --tokens"):
        build(corpus, [Item("one", "algae")], tmp_path / "new", tokens=3, limits=Limits())
    with pytest.raises(DataError, match=r"no document fits a proxy of 600 tokens of documents of at least 256"):
        build(corpus, [Item("one", "algae")], tmp_path / "new", tokens=600)
    with pytest.raises(DataError, match="larger than the pool it leaves, 0; use fewer --tokens"):
        build(corpus, [Item("one", "algae")], tmp_path / "new", tokens=10**9, limits=Limits())
    with pytest.raises(DataError, match=r"held-out share 1: must lie in \[0, 1\); 0.1 is usual, 0 holds nothing out"):
        build(corpus, [Item("one", "algae")], tmp_path / "new", tokens=600, held_out=1)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"notes\.txt: not a table"):
        read_items([Source(tmp_path / "notes.txt")], ["query"])
    assert not (tmp_path / "new").exists()


PAGES = {
    "a0": (0, "the green algae of a lichen supply the fungus with oxygen and with sugar that light makes in them"),
    "a1": (0, "the green algae of a lichen supply the fungus with oxygen and with sugar that light makes in it"),
    "a2": (0, "Green algae of a lichen supply the fungus, with oxygen, and with the sugar that light makes there!"),
    "short": (0, "algae"),
    "b0": (1, "a court asks what the tenant signed before the judge reads one clause of the contract aloud again"),
    "a3": (0, "algae and a fungus in one lichen share what neither of them would have alone on a dry rock or bark"),
    "b1": (1, "a court asks what a tenant signed before some judge reads one clause of the contract aloud again"),
}
"""Name -> (number of the nearest item, text); the nearest first. a1 and a2 are nearly a0, b1 is nearly b0."""
LIMITED = [
    # limits, what is passed over by each, the proxy, what leaves the pool beside it
    (Limits(), (0, 0, 0), "a0 a1 a2 short b0 a3 b1", ""),
    (Limits(min_tokens=12), (1, 0, 0), "a0 a1 a2 b0 a3 b1", ""),
    (Limits(per_item=2), (0, 3, 0), "a0 a1 b0 b1", ""),
    (Limits(per_near_duplicate=1), (0, 0, 3), "a0 short b0 a3", "a1 a2 b1"),
    (Limits(per_near_duplicate=2), (0, 0, 1), "a0 a1 short b0 a3 b1", "a2"),
    (Limits(min_tokens=12, per_item=1, per_near_duplicate=1), (1, 4, 0), "a0 b0", ""),
    (Limits(min_tokens=12, per_item=2, per_near_duplicate=1), (1, 0, 3), "a0 b0 a3", "a1 a2 b1"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("limits")
    texts = {name: text for name, (_, text) in PAGES.items()} | {f"w{n}": f"word{n} " * 30 for n in range(30)}
    lines = [json.dumps({"id": name, "domain": "d", "text": text}) + "\n" for name, text in texts.items()]
    (folder / "rows.jsonl").write_text("".join(lines))
    source, rule = [Source(folder / "rows.jsonl")], SplitRule(0, 0)
    return Corpus.open(prepare(source, folder / "corpus", vocab_size=400, rule=rule))


@pytest.mark.parametrize(("limits", "passed_over", "proxy", "left_out"), LIMITED)
def test_limits(limits: Limits, passed_over: tuple[int, ...], proxy: str, left_out: str, pages: Corpus) -> None:
    documents = np.array([pages.ids.index(name) for name in PAGES])
    count, item = len(documents), np.array([item for item, _ in PAGES.values()])
    nearness, digest = np.linspace(0.9, 0.3, count), np.arange(count, dtype=np.uint64)
    found = Found(documents, nearness, item, np.zeros(count, bool), np.zeros(count, bool), digest, np.zeros(2, bool))
    chosen = assign(pages, found, int(pages.lengths[documents].sum()), limits, drop_overlap=False)
    assert [pages.ids[number] for number in documents[chosen.places]] == proxy.split()
    assert tuple(chosen.passed_over.values()) == passed_over
    assert {pages.ids[number] for number in np.flatnonzero(chosen.splits == 1)} == set(proxy.split())
    assert {pages.ids[number] for number in np.flatnonzero(chosen.splits == 3)} == set(left_out.split())


def test_near_duplicates_are_those_that_share_most_words() -> None:
    """Against the definition, set by set: every pair of random texts of 60 words out of 90, and of edited copies."""
    rng = np.random.default_rng(0)
    texts = [set(rng.choice(90, 60, replace=False).tolist()) for _ in range(40)]
    texts += [set(sorted(text)[: 60 - 2 * cut]) for cut, text in enumerate(texts[:20])]
    known, asked = NearDuplicates(), 0
    for number, words in enumerate(texts):
        expected = sum(len(words & other) >= ALIKE * len(words | other) for other in texts[:number])
        text = ". ".join(f"W{word}" for word in words)
        assert known.count(text) == expected
        known.add(text)
        asked += expected
    assert asked >= 5
    known.add("")
    assert known.count("") == known.count("?!") == 0


def test_command_line(
    corpus: Corpus,
    items: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--corpus", str(corpus.path), "--items", str(items), "--tokens", "600", "--out", str(tmp_path / "new")]
    assert main(["proxy", *options, "--per-item", "-1"]) == 2
    assert "--per-item -1: must not be negative; 0 is no limit" in capsys.readouterr().err
    assert main(["proxy", *options, "--min-tokens", "20", "--per-item", "3"]) == 0
    said = capsys.readouterr().out
    assert "shares of tokens" in said
    assert "0 of 2 items, 1 documents (no item fell into it; a larger" in said
    assert re.search(r"passed over: under 20 tokens \(--min-tokens\) +│ +\d+ ", said)
    assert re.search(r"passed over: beyond 3 of an item \(--per-item\) +│ +\d+ ", said)
    assert re.search(r"passed over: near-duplicates \(--per-near-duplicate\) +│ +[1-9]\d* ", said)
    made = Corpus.open(tmp_path / "new")
    told = made.manifest["provenance"]["proxy"]
    assert told["limits"] == {"min_tokens": 20, "per_item": 3, "per_near_duplicate": USUAL.per_near_duplicate}
    assert told["documents"] == (made.split_codes == 1).sum()
    assert 1 <= told["most_documents_of_an_item"] <= 3
    assert f"{told['passed_over']['per_near_duplicate']:,}" in said
    assert main(["proxy", *options]) == 2
    assert "already holds a corpus" in capsys.readouterr().err
