"""Documents kept by a score: which, what the sequences are then, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megaopus.__main__ import main
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.config import FilterConfig
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.score_filter import gumbel, kept_documents
from megaopus.data.scores import column_folder, load_column, write_column
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError
from megaopus.settings import problems

POOL = SPLITS.index("pool")
DOMAINS = ("books", "code")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two domains with 60 documents each, the fields grade (a number, or none) and mood (text) kept."""
    folder = tmp_path_factory.mktemp("keeping")
    sources = []
    for domain in DOMAINS:
        rows = [
            {
                "id": f"{domain}{n}",
                "text": f"{domain} number {n}: " + f"{domain} words {n % 7} " * (10 + n % 13),
                "grade": None if n % 10 == 0 else n % 6,
                "mood": "glad",
            }
            for n in range(60)
        ]
        path = folder / f"{domain}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(Source(path, domain, Fields(keep=("grade", "mood"))))
    return prepare(sources, folder / "corpus", vocab_size=300, rule=SplitRule(0.1, 0.1))


@pytest.fixture(scope="module")
def corpus(place: Path) -> Corpus:
    corpus = Corpus.open(place)
    values = np.random.default_rng(0).normal(size=len(corpus)).astype(np.float32)
    values[corpus.domain_codes == 1] += 1
    values[::11] = np.nan
    written(corpus, "quality", values, "highest")
    written(corpus, "loss", values, "lowest")
    return corpus


def written(corpus: Corpus, name: str, values: np.ndarray, best: str) -> Path:
    folder = column_folder(corpus.path, name)
    folder.mkdir(parents=True)
    write_column(folder, corpus, values, best, {})
    return folder


def kept_by(corpus: Corpus, **settings: object) -> np.ndarray:
    config = FilterConfig(**settings)  # type: ignore[arg-type]
    assert not problems(config)
    kept = kept_documents(corpus, config)
    assert kept is not None
    assert not kept.documents[corpus.split_codes != POOL].any()
    return np.flatnonzero(kept.documents)


def best_of(corpus: Corpus, members: np.ndarray, values: np.ndarray, fraction: float, of: np.ndarray) -> list[int]:
    """By sorting in plain Python, up to a fraction of the tokens of ``of``."""
    left, found = fraction * corpus.lengths[of].sum(), []
    for n in sorted((n for n in members.tolist() if values[n] == values[n]), key=lambda n: -values[n]):
        left -= corpus.lengths[n]
        if left < 0:
            break
        found.append(n)
    return sorted(found)


def test_the_best_fraction_of_the_pool_or_of_each_domain(corpus: Corpus) -> None:
    values = load_column(corpus, "quality").values
    pool = np.flatnonzero(corpus.split_codes == POOL)
    overall = kept_by(corpus, column="quality", keep=0.3)
    assert overall.tolist() == best_of(corpus, pool, values, 0.3, pool)
    parts = [pool[corpus.domain_codes[pool] == code] for code in range(2)]
    each = [best_of(corpus, part, values, 0.3, part) for part in parts]
    by_domain = kept_by(corpus, column="quality", keep=0.3, per_domain=True)
    assert by_domain.tolist() == sorted(each[0] + each[1])
    assert set(overall.tolist()) != set(by_domain.tolist())
    assert kept_by(corpus, column="loss", keep=0.3).tolist() == best_of(corpus, pool, -values, 0.3, pool)
    turned = kept_by(corpus, column="loss", keep=0.3, order="highest")
    assert turned.tolist() == overall.tolist()
    everything = kept_by(corpus, column="quality", keep=1.0)
    assert everything.tolist() == pool[np.isfinite(values[pool])].tolist()  # none without a score


def test_thresholds_come_before_the_fraction(corpus: Corpus) -> None:
    values = load_column(corpus, "quality").values
    pool = np.flatnonzero(corpus.split_codes == POOL)
    between = [n for n in pool.tolist() if 0 <= values[n] <= 1]
    assert kept_by(corpus, column="quality", at_least=0, at_most=1).tolist() == between
    few = kept_by(corpus, column="quality", at_most=1, keep=0.1)
    under = np.array([n for n in pool.tolist() if values[n] <= 1])
    assert few.tolist() == best_of(corpus, under, values, 0.1, pool)


def test_a_field_that_prepare_kept_is_a_column(corpus: Corpus) -> None:
    grades = {row["index"]: row["columns"]["grade"] for row in rows_of(corpus)}
    kept = kept_by(corpus, column="grade", at_least=4)
    pool = np.flatnonzero(corpus.split_codes == POOL)
    assert kept.tolist() == [n for n in pool.tolist() if grades[n] is not None and grades[n] >= 4]
    with pytest.raises(DataError, match=r"row 1: mood is the text 'glad', not a number"):
        load_column(corpus, "mood")


def rows_of(corpus: Corpus) -> list[dict]:
    return [json.loads(line) for line in (corpus.path / "documents.jsonl").read_text().splitlines()]


def test_a_draw_has_the_chances_of_the_softmax(corpus: Corpus) -> None:
    scores = np.array([0.0, 1.0, 2.0, -1.0])
    temperature, draws = 0.7, 4000
    first = [int(np.argmax(scores / temperature + gumbel(4, seed))) for seed in range(draws)]
    expected = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    found = np.bincount(first, minlength=4) / draws
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / draws)
    drawn = kept_by(corpus, column="quality", keep=0.3, temperature=0.5)
    share = corpus.lengths[drawn].sum() / corpus.lengths[corpus.split_codes == POOL].sum()
    assert 0.28 < share <= 0.3
    assert drawn.tolist() == kept_by(corpus, column="quality", keep=0.3, temperature=0.5).tolist()
    assert drawn.tolist() != kept_by(corpus, column="quality", keep=0.3, temperature=0.5, seed=1).tolist()
    values = load_column(corpus, "quality").values
    merit = {
        temperature: values[kept_by(corpus, column="quality", keep=0.3, temperature=temperature)].mean()
        for temperature in (0.01, 0.5, 100.0)
    }
    assert merit[0.01] > merit[0.5] > merit[100.0]


def test_sequences_are_the_kept_documents_cut_up(corpus: Corpus) -> None:
    kept = kept_documents(corpus, FilterConfig(column="quality", keep=0.5))
    assert kept is not None
    pool, whole = (Sequences(corpus, "pool", 16, kept=each) for each in (kept, None))
    for code, name in enumerate(DOMAINS):
        members = np.flatnonzero(kept.documents & (corpus.domain_codes == code))
        stream = np.concatenate([corpus.tokens[corpus.offsets[n] :][: corpus.lengths[n]] for n in members])
        mine = np.flatnonzero(pool.domain_of(np.arange(len(pool))) == pool.domains.index(name))
        assert pool.tokens(mine)[:, :-1].flatten().tolist() == stream[: 16 * len(mine)].tolist()
        assert len(mine) == (len(stream) - 1) // 16
    assert pool.key != whole.key
    assert whole.key == json.dumps([corpus.fingerprint, "pool", 16, list(DOMAINS)])  # as it was without filters
    other = kept_documents(corpus, FilterConfig(column="quality", keep=0.6))
    assert Sequences(corpus, "pool", 16, kept=other).key != pool.key


def test_columns_that_cannot_be_used(corpus: Corpus, place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no score column 'qualty'; did you mean quality\? it has: grade, loss, mood, q"
    ):
        load_column(corpus, "qualty")
    with pytest.raises(DataError, match=r"column name '../x': use letters"):
        load_column(corpus, "../x")
    other = Corpus.open(prepare([Source(place.parent / "books.jsonl", "books")], tmp_path / "other", vocab_size=300))
    folder = written(other, "quality", np.zeros(len(other), np.float32), "highest")
    (folder / "column.json").write_text((column_folder(place, "quality") / "column.json").read_text())
    with pytest.raises(DataError, match=r"scores of another corpus \(fingerprint .*score again"):
        load_column(other, "quality")
    broken = written(corpus, "broken", np.zeros(len(corpus), np.float32), "highest")
    values = np.load(broken / "scores.npy")
    values[3] = 1
    np.save(broken / "scores.npy", values)
    with pytest.raises(DataError, match=r"scores.npy: not the 120 scores that were written"):
        load_column(corpus, "broken")
    (broken / "column.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken: cannot be read \(KeyError: 'corpus'\); delete its folder"):
        load_column(corpus, "broken")
    with pytest.raises(DataError, match=r"keeps none of the pool's \d+ documents \(scores of 'quality' there: from -"):
        kept_documents(corpus, FilterConfig(column="quality", at_least=100))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"keep": 0.3}, "column"),
        ({"column": "x"}, "column"),
        ({"column": "x", "keep": 0.0}, "keep"),
        ({"column": "x", "keep": 1.5}, "keep"),
        ({"column": "x", "at_least": 2.0, "at_most": 1.0}, "at_least"),
        ({"column": "x", "keep": 0.3, "order": "best"}, "order"),
        ({"column": "x", "keep": 0.3, "temperature": 0.0}, "temperature"),
        ({"column": "x", "at_least": 0.3, "temperature": 1.0}, "temperature"),
        ({"column": "x", "at_least": 0.3, "per_domain": True}, "per_domain"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, key: str) -> None:
    assert [problem.key for problem in problems(FilterConfig(**settings))] == [key]


def test_a_filtered_run_is_resumed_with_the_same_filter_only(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [
        "train",
        *("model=tiny", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "engine=cpu"),
        *(f"data.path={corpus.path}", "data.seq_len=16", "train.global_batch_size=2", "train.micro_batch_size=2"),
        *(f"run_dir={tmp_path / 'run'}", "train.eval_every=0", "optim.warmup_steps=1"),
    ]
    keep = "data.filter={column: quality, keep: 0.5}"
    assert main([*run, "train.steps=2", keep]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"filtered by quality: {len(kept_by(corpus, column='quality', keep=0.5))} of" in said
    run.append("resume_allow=[train.steps]")
    assert main([*run, "train.steps=4", keep]) == 0
    capsys.readouterr()
    assert main([*run, "train.steps=6", "data.filter={column: loss, keep: 0.5}"]) == 2
    assert "filter.column: saved 'quality', now 'loss'" in capsys.readouterr().err
    assert main([*run, "train.steps=6"]) == 2
    assert "filter.keep: saved 0.5, now None" in capsys.readouterr().err
    assert main(["check", *run[1:], keep]) == 0
    said = capsys.readouterr().out
    assert "Documents of the pool that the filter keeps" in said
    assert "0.5 best (highest)" in said
