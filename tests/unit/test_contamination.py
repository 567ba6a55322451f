"""Benchmark items found in a run's corpus, against a search through texts and bytes word by word."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megaopus.config.parse import to_yaml
from megaopus.config.run_config import RunConfig
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError
from megaopus.evaluation import contamination
from megaopus.evaluation.contamination import find_contamination, write_contamination
from megaopus.evaluation.items import read_contamination
from megaopus.record.parquet import FOLDER, ChoiceSink
from megaopus.selection.candidate_table import CandidateTable

L = 96
LONG = 12
"""The document that is longer than many sequences."""
Counts = dict[str, list[int | None]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents of made-up words, some with letters of several bytes, so that tokens end within words and letters."""
    folder, draw = tmp_path_factory.mktemp("contamination"), np.random.default_rng(0)
    words = ["".join(draw.choice(list("abdeiklmnorstuéü語")) for _ in range(draw.integers(2, 8))) for _ in range(900)]
    rows = []
    for number in range(70):
        count = 700 if number == LONG else int(draw.integers(5, 60))
        marks = draw.choice(["", "", "", ",", ".", "-"], count)
        text = " ".join(f"{word}{mark}" for word, mark in zip(draw.choice(words, count), marks, strict=True))
        rows.append({"id": f"d{number}", "domain": "ab"[number % 2], "text": text.capitalize()})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = SplitRule(0.2, 0.1, wanted=("a",), seq_len=L, seed=5)
    return Corpus.open(prepare([Source(folder / "rows.jsonl")], folder / "corpus", vocab_size=330, rule=rule))


def run_folder(folder: Path, corpus: Corpus, picked: Sequence[int] | None) -> Path:
    """As training leaves it, with these sequences picked; None: picks were not recorded."""
    folder.mkdir(parents=True)
    config = RunConfig()
    config.data.path, config.data.seq_len = str(corpus.path), L
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "environment.json").write_text(json.dumps({"corpus": corpus.fingerprint}))
    if picked is not None:
        count = len(Sequences(corpus, "pool", L))
        numbers = np.arange(count)
        columns = {"id": numbers, "sequence": numbers, "domain": numbers * 0, "picked": np.isin(numbers, picked)}
        sink = ChoiceSink(folder / FOLDER)
        for step in range(2):
            sink.add(step, CandidateTable(columns | {"probability": np.full(count, 1 / count)}, ["a"]))
            sink.flush()
    return folder


# -- the oracle --------------------------------------------------------------------------------------------------------


def words_with_places(text: str) -> list[tuple[str, int, int]]:
    """(word, first byte, end) of each word."""
    found = []
    for each in re.finditer(r"[^\W_]+", text):
        first = len(text[: each.start()].encode())
        found.append((each.group().lower(), first, first + len(each.group().encode())))
    return found


def grams(item: str) -> list[list[str]]:
    words = [word for word, _, _ in words_with_places(item)]
    length = min(13, len(words))
    return [words[at : at + length] for at in range(len(words) - length + 1)] if length >= 8 else []


class Brute:
    """Texts of a split, word by word, with the tokens that each word is of."""

    def __init__(self, corpus: Corpus, split: str):
        tokenizer, self.documents = corpus.tokenizer(), []
        for document in np.flatnonzero(corpus.split_codes == SPLITS.index(split)).tolist():
            start, length = int(corpus.offsets[document]), int(corpus.lengths[document])
            tokens = corpus.tokens[start : start + length - 1].tolist()
            text = tokenizer.decode(tokens)
            # a token of a byte-level tokenizer has one letter a byte
            ends = np.cumsum([len(tokenizer.id_to_token(token)) for token in tokens])
            assert ends[-1] == len(text.encode())
            words = words_with_places(text)
            line = "".join(f" {word}" for word, _, _ in words) + " "
            self.documents.append((line, words, start, ends))

    def meets(self, item: str, held: Sequence[set[int]] | None = None) -> bool:
        """Say whether a document has a run of words of the item; ``held``: within one of these sets of tokens."""
        for gram in grams(item):
            for line, words, start, ends in self.documents:
                if f" {' '.join(gram)} " not in line:
                    continue
                for at in range(len(words) - len(gram) + 1):
                    if [word for word, _, _ in words[at : at + len(gram)]] == gram:
                        first, end = words[at][1], words[at + len(gram) - 1][2]
                        needed = np.arange(np.searchsorted(ends, first, "right"), np.searchsorted(ends, end) + 1)
                        if held is None or any(each.issuperset((needed + start).tolist()) for each in held):
                            return True
        return False


def places(corpus: Corpus, sequences: Sequences) -> list[np.ndarray]:
    """Positions in the token file that each sequence has, by the rule in the class's docstring."""
    found = []
    for domain in sequences.domains:
        inside = (corpus.split_codes == SPLITS.index("pool")) & (corpus.domain_codes == corpus.domains.index(domain))
        stream = np.concatenate([corpus.offsets[n] + np.arange(corpus.lengths[n]) for n in np.flatnonzero(inside)])
        found += [stream[j * L : j * L + L + 1] for j in range((len(stream) - 1) // L)]
    return found


# -- tests -------------------------------------------------------------------------------------------------------------


def made_items(corpus: Corpus) -> dict[str, list[str]]:
    """Items from windows of documents in other letters and marks, from two documents each, and of new words."""
    draw, found = np.random.default_rng(1), {"taken": [], "straddling": [], "new": [], "short": ["one two three"]}
    documents = [re.findall(r"[^\W_]+", text) for text in corpus.texts(np.arange(len(corpus)))]
    for number, words in enumerate(documents):
        for length in (7, 8, 10, 13, 16):
            if len(words) > length:
                for _ in range(6 if number == LONG else 1):
                    at = int(draw.integers(len(words) - length))
                    found["taken"].append(" (".join(words[at : at + length]).upper() + "?")
        following = documents[(number + 1) % len(documents)]
        found["straddling"].append(" ".join([*words[-7:], *following[:7]]))
        found["new"].append(" ".join(f"new{n}" for n in range(number, number + 20)))
    return found


def edges(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    """The first and the last words of a sequence's own text, with the parts of words that it begins and ends in."""
    words = re.findall(r"[^\W_]+", corpus.tokenizer().decode(corpus.tokens[tokens].tolist()))
    return [" ".join(words[:13]), " ".join(words[-13:])]


def test_items_are_met_where_brute_force_meets_them(corpus: Corpus, tmp_path: Path) -> None:
    pool = Sequences(corpus, "pool", L)
    picked = list(range(0, len(pool), 3)) + list(range(1, len(pool), 9))  # some of them neighbours
    line = places(corpus, pool)
    held = [set(line[number].tolist()) for number in picked]
    in_pool, in_proxy = Brute(corpus, "pool"), Brute(corpus, "proxy")
    items = made_items(corpus) | {"edges": [edge for tokens in line for edge in edges(corpus, tokens)]}
    found = find_contamination(run_folder(tmp_path / "run", corpus, picked), items, workers=1)
    assert [row["task"] for row in found["tasks"]] == list(items)
    for row in found["tasks"]:
        texts = items[row["task"]]
        long = [text for text in texts if grams(text)]
        assert row["items"] == len(texts)
        assert row["too_short"] == len(texts) - len(long)
        assert row["pool"] == sum(in_pool.meets(text) for text in long)
        assert row["proxy"] == sum(in_proxy.meets(text) for text in long)
        assert row["picks"] == sum(in_pool.meets(text, held) for text in long)
    taken, straddling, new, short, edge = found["tasks"]
    assert edge["picks"] < edge["pool"] < edge["items"] - edge["too_short"]
    assert 0 < taken["picks"] < taken["pool"] < taken["items"]
    assert taken["proxy"] > 0
    assert straddling["pool"] + straddling["proxy"] + new["pool"] == 0
    assert (short["items"], short["too_short"]) == (1, 1)
    assert found["corpus"] == {"path": str(corpus.path), "fingerprint": corpus.fingerprint}
    assert (found["picked_sequences"], found["notes"]) == (len(picked), [])


def test_planted_items_are_found_where_they_were_planted(corpus: Corpus, tmp_path: Path) -> None:
    """Of a long document, a pick that holds the other half does not count."""
    text = corpus.texts([LONG])[0]
    assert SPLITS[corpus.split_codes[LONG]] == "pool"
    pool = Sequences(corpus, "pool", L)
    early, late = (" ".join(re.findall(r"[^\W_]+", part)) for part in (text[200:330], text[-330:-200]))
    proxy = np.flatnonzero(corpus.split_codes == SPLITS.index("proxy"))
    copied = max(corpus.texts(proxy), key=len)
    items = {"early": [early], "late": [late], "both": [early, late], "proxy": [copied]}
    numbers, _, starts, _ = pool.stretches_of(np.array([LONG]))
    half = corpus.offsets[LONG] + corpus.lengths[LONG] // 2
    run = run_folder(tmp_path / "run", corpus, numbers[starts > half].tolist())
    found = find_contamination(run, items, workers=1)
    counts: Counts = {row["task"]: [row["pool"], row["proxy"], row["picks"]] for row in found["tasks"]}
    assert counts == {"early": [1, 0, 0], "late": [1, 0, 1], "both": [2, 0, 1], "proxy": [0, 1, 0]}
    assert read_contamination(write_contamination(run, found).parent) == found
    assert sorted(path.name for path in run.iterdir()) == [
        FOLDER,
        "config.yaml",
        "contamination.json",
        "environment.json",
    ]


def test_stretches_are_the_tokens_of_sequences(corpus: Corpus) -> None:
    pool = Sequences(corpus, "pool", L)
    asked = np.arange(len(corpus))[::-1]
    got = {(int(s), int(d), int(a), int(e)) for s, d, a, e in zip(*pool.stretches_of(asked), strict=True)}
    wanted = set()
    for number, tokens in enumerate(places(corpus, pool)):
        owners = np.searchsorted(corpus.offsets, tokens, side="right") - 1
        for owner in np.unique(owners):
            own = tokens[owners == owner]
            wanted.add((number, int(owner), int(own[0]), int(own[-1]) + 1))
    assert got == wanted


def test_workers_and_blocks_do_not_change_what_is_found(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, items = run_folder(tmp_path / "run", corpus, range(0, 40, 2)), {"taken": made_items(corpus)["taken"]}
    alone = find_contamination(run, items, workers=1)
    monkeypatch.setattr(contamination, "BLOCK_TOKENS", 500)
    monkeypatch.setattr(contamination, "FEW_TOKENS", 500)
    monkeypatch.setattr(contamination, "_shared", through_workers)
    assert find_contamination(run, items, workers=2) == alone


def through_workers(corpus: Corpus, blocks, wanted, workers):  # type: ignore[no-untyped-def]
    """Do what the processes do, in this one: to start them takes seconds."""
    contamination._start(corpus.path, wanted)
    return (contamination._work(block) for block in blocks)


def test_what_is_not_there_is_said(corpus: Corpus, tmp_path: Path) -> None:
    items = {"task": [corpus.texts([LONG])[0]]}
    run = run_folder(tmp_path / "run", corpus, None)
    found = find_contamination(run, items, workers=1)
    assert (found["tasks"][0]["pool"], found["tasks"][0]["picks"], found["picked_sequences"]) == (1, None, None)
    assert found["notes"] == [f"no picks: {run / FOLDER} is not there (logging.selection)"]
    (run / "environment.json").write_text('{"corpus": "another"}')
    with pytest.raises(DataError, match="another corpus than the run read lies there"):
        find_contamination(run, items, workers=1)
    with pytest.raises(DataError, match=r"config\.yaml: missing; name the run_dir"):
        find_contamination(tmp_path, items, workers=1)
    longer = run_folder(tmp_path / "longer", corpus, range(4))
    launch = longer / "launches/000"
    launch.mkdir(parents=True)
    shutil.copy(longer / "config.yaml", launch)
    assert find_contamination(longer, items, workers=1)["tasks"][0]["picks"] is not None
    text = (launch / "config.yaml").read_text().replace("column: null", "column: quality")
    (launch / "config.yaml").write_text(text)
    assert find_contamination(longer, items, workers=1)["notes"] == [
        "no picks: launches of the run cut their sequences from other pools (data.filter)"
    ]
