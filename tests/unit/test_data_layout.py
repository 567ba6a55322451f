"""A large corpus's layout is mapped from files, and says what a small one's in memory does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import index_memory
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data import layout, scores
from megaopus.data.config import FilterConfig
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.folder import new_folder
from megaopus.data.score_filter import kept_documents
from megaopus.data.scores import HIGHEST, column_folder, load_column, write_column
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

L = 16
FILTERS = [None, FilterConfig(column="q", keep=0.5), FilterConfig(column="q", at_least=-0.5, keep=0.7, per_domain=True)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder, draw = tmp_path_factory.mktemp("layout"), random.Random(1)
    rows = [
        {
            "id": f"d{n}",
            "domain": draw.choice(["news", "code", "verse"]),
            "text": "ab " * draw.choice([1, 5, 30]) + str(n),
        }
        for n in range(300)
    ]
    rows.insert(100, {"id": "short", "domain": "few", "text": "x", "grade": None})
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = SplitRule(0.1, 0.1, seq_len=L)
    source = Source(folder / "s.jsonl", fields=Fields(keep=("grade",)))
    found = Corpus.open(prepare([source], folder / "c", vocab_size=257, rule=rule))
    values = np.random.default_rng(0).standard_normal(len(found)).astype(np.float32)
    values[::17] = np.nan
    place = column_folder(found.path, "q")
    with new_folder(place, Console(quiet=True)) as growing:
        write_column(growing, found, values, HIGHEST, {})
    return found


def all_there_is(corpus: Corpus, config: FilterConfig | None) -> list[Any]:
    """List what every split and its sequences say."""
    found: list[Any] = []
    for split in SPLITS:
        kept = kept_documents(corpus, config) if config is not None and split == "pool" else None
        for domains in (None, ["verse", "code"]):
            made = Sequences(corpus, split, L, domains, kept)
            numbers = np.arange(len(made))
            stretches = made.stretches_of(np.arange(len(corpus)))
            found += [
                made.key,
                made.counts,
                made.left_out,
                made.read(numbers).tolist(),
                *map(np.ndarray.tolist, stretches),
            ]
            found += [made.documents_of(len(made) - 1), made.first_document_of(numbers).tolist()]
        if kept is not None:
            found += [kept.documents.tolist(), kept.summary(corpus), kept.told(corpus)]
    return found


@pytest.mark.parametrize("config", FILTERS, ids=["all", "best", "of each"])
def test_what_is_mapped_is_what_is_in_memory(
    corpus: Corpus, config: FilterConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_there_is(corpus, config)
    monkeypatch.setattr(layout, "BLOCK", 7)
    assert all_there_is(corpus, config) == expected
    assert not list(corpus.path.glob("layout-*/kept.npy"))
    monkeypatch.setattr(layout, "LARGE", 1)
    assert all_there_is(corpus, config) == expected
    monkeypatch.setattr(layout, "_fill", None)  # nothing is laid out twice
    assert all_there_is(corpus, config) == expected
    arrays = layout.layout_of(corpus, "validation")
    assert isinstance(arrays.starts, np.memmap)
    assert isinstance(arrays.documents, np.memmap)
    assert len(list(corpus.path.glob("layout-*/kept.npy"))) == (config is not None)
    for made in corpus.path.glob("layout-*/kept.npy"):
        made.unlink()


def test_a_kept_field_is_read_from_the_table_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_column(corpus, "grade")
    monkeypatch.setattr(scores, "LARGE", 1)
    first = load_column(corpus, "grade")
    monkeypatch.setattr(scores, "_kept", None)
    for found in (first, load_column(corpus, "grade")):
        assert isinstance(found.values, np.memmap)
        assert found.digest == expected.digest
        np.testing.assert_array_equal(found.values, expected.values)


def test_a_corpus_of_several_token_files_has_the_same_sequences(corpus: Corpus, tmp_path: Path) -> None:
    source = Source(corpus.path.parent / "s.jsonl", fields=Fields(keep=("grade",)))
    rule, most = SplitRule(0.1, 0.1, seq_len=L), 150
    made = Corpus.open(
        prepare([source], tmp_path / "c", vocab_size=257, rule=rule, file_tokens=most, workers=2), verify=True
    )
    files = sorted(path.name for path in made.path.glob("tokens*.bin"))
    assert files == made.manifest["shards"] == [f"tokens-{n:05d}.bin" for n in range(len(files))]
    sizes = [(made.path / name).stat().st_size // 2 for name in files]
    longest = int(made.lengths.max())
    assert all(most - longest < size <= most for size in sizes[:-1])  # of whole documents, and full
    assert made.ids == corpus.ids
    for split in SPLITS:
        found, expected = Sequences(made, split, L), Sequences(corpus, split, L)
        numbers = np.arange(len(expected))
        assert found.read(numbers).tolist() == expected.read(numbers).tolist()
    np.testing.assert_array_equal(load_column(made, "grade").values, load_column(corpus, "grade").values)
    with pytest.raises(DataError, match="file_tokens = 0: must be at least 1"):
        prepare([source], tmp_path / "d", file_tokens=0)


def test_a_split_without_documents_has_an_empty_layout(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "LARGE", 1)
    for _ in range(2):
        assert [len(array) for array in layout.layout_of(corpus, "left_out")] == [0, 1, len(corpus.domains) + 1]


def test_a_corpus_that_cannot_be_written_to_is_laid_out_in_memory(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    expected = layout.layout_of(corpus, "pool")
    monkeypatch.setattr(layout, "LARGE", 1)
    monkeypatch.setattr(layout, "layout_folder", lambda *given: corpus.path / "layout-none")
    monkeypatch.setattr(layout, "_write", refused)
    with pytest.warns(UserWarning, match="layout-none: .*Permission denied; each process holds 16 bytes a document"):
        found = layout.layout_of(corpus, "pool")
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_layout_that_was_cut_off_is_named(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "LARGE", 1)
    layout.layout_of(corpus, "proxy")
    place = layout.layout_folder(corpus, "proxy") / "starts.npy"
    content = Path(place).read_bytes()
    place.write_bytes(content[:-8])
    try:
        with pytest.raises(DataError, match=r"layout-.*: cannot be read .*; delete it, the next run lays it out again"):
            layout.layout_of(corpus, "proxy")
    finally:
        place.write_bytes(content)


def test_the_made_up_corpus_of_the_benchmark_is_opened_as_a_real_one(tmp_path: Path) -> None:
    index_memory.made_up(tmp_path / "corpus", 30_000)
    found = index_memory.opened(tmp_path / "corpus")
    assert found["highest"] >= found["own"] > 0
    assert found["seconds"] > 0
    pool = Sequences(Corpus.open(tmp_path / "corpus"), "pool", index_memory.SEQ_LEN)
    assert len(pool) > 1000
    assert pool.read([0, len(pool) - 1]).sum() == 0
