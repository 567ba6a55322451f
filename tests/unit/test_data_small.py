"""Small corpora and few long documents: every split that is asked for can be run on, or prepare says why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megaopus.__main__ import main
from megaopus.corpus_tools.floors import Documents, fill
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.reading import cut
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.corpus_tools.split_rule import POOL, PROXY, VALIDATION
from megaopus.data.config import DataConfig
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.needs import DataNeeds
from megaopus.data.run_data import RunData
from megaopus.errors import DataError

NEEDS = DataNeeds(seed=0, steps=2, buffer_size=2, proxy=True)


def words(count: int, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(f"w{n}" + ("\n\n" if n % 97 == 0 else "") for n in draw.integers(0, 5000, count))


def source(folder: Path, texts: dict[str, str], name: str = "s") -> Source:
    rows = [{"id": key, "text": text} for key, text in texts.items()]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(folder / f"{name}.jsonl")


def shares(corpus: Corpus) -> list[float]:
    """Of the tokens, by split."""
    return [corpus.lengths[corpus.split_codes == code].sum() / corpus.lengths.sum() for code in range(len(SPLITS))]


def text_of(corpus: Corpus, place: int) -> str:
    start = corpus.offsets[place]
    return corpus.tokenizer().decode(corpus.tokens[start : start + corpus.lengths[place] - 1].tolist())


def test_sixty_documents_can_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With no flag and the default length; validation had no document at all."""
    made = source(tmp_path, {f"d{n}": words(150, n) for n in range(60)})
    assert main(["prepare", "--source", str(made.path), "--out", str(tmp_path / "c")]) == 0
    said = capsys.readouterr().out
    assert "note: validation: 2 documents more than the hash gave it, so that it holds a sequence of 256 tokens" in said
    opened = RunData.open(DataConfig(path=str(tmp_path / "c")), NEEDS).summary()
    assert min(opened.sequences.values()) >= 1
    assert shares(Corpus.open(tmp_path / "c"))[POOL] > 0.9


def test_every_named_domain_has_a_proxy_and_validation(tmp_path: Path) -> None:
    sources = [
        source(tmp_path, {f"{name}{n}": words(150, 40 * seed + n) for n in range(40)}, name)
        for seed, name in enumerate("abc")
    ]
    rule = SplitRule(wanted=("a", "b"))
    path = str(prepare(sources, tmp_path / "c", vocab_size=1000, rule=rule))
    opened = RunData.open(DataConfig(path=path, target_domains=["a", "b"]), NEEDS)
    assert opened.summary().validation == {"a": 1, "b": 1, "c": 1}
    assert opened.proxy.domains == ["a", "b"]


def test_one_long_text_is_cut_and_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = words(60_000)
    made = source(tmp_path, {"book": text})
    options = ["--proxy-fraction", "0.05", "--validation-fraction", "0.05", "--vocab-size", "257"]
    assert main(["prepare", "--source", str(made.path), "--out", str(tmp_path / "c"), *options]) == 0
    size = len(text) // 200
    assert (
        f"domain s: long documents are cut into pieces of about {size:,} characters (ids ID#1"
        in capsys.readouterr().out
    )
    corpus = Corpus.open(tmp_path / "c", verify=True)
    assert corpus.ids == [f"book#{n}" for n in range(1, 201)]
    assert "".join(text_of(corpus, place) for place in range(200)) == text
    found = shares(corpus)
    assert found[VALIDATION] == pytest.approx(0.05, abs=0.03)
    assert found[PROXY] == pytest.approx(0.05, abs=0.03)
    assert min(RunData.open(DataConfig(path=str(tmp_path / "c")), NEEDS).summary().sequences.values()) > 1
    assert corpus.manifest["sources"][0]["documents"] == 1


def test_a_long_text_that_the_hash_holds_out_is_cut_too(tmp_path: Path) -> None:
    text = words(8_000)
    rules = (SplitRule(0.01, 0.01, seed=seed) for seed in range(2000))
    rule = next(rule for rule in rules if rule.draw(text.encode())[0] < rule.validation_fraction)
    sources = [source(tmp_path, {f"d{n}": words(40, n) for n in range(200)}, "short"), source(tmp_path, {"x": text})]
    corpus = Corpus.open(prepare(sources, tmp_path / "c", vocab_size=257, rule=rule))
    of_text = corpus.domain_codes == corpus.domains.index("s")
    assert 0.9 < corpus.lengths[of_text & (corpus.split_codes == POOL)].sum() / corpus.lengths[of_text].sum() < 1
    assert not any("#" in name for name in corpus.ids[:200])


def test_few_long_documents_in_a_large_corpus_give_their_share(tmp_path: Path) -> None:
    books = {f"book{n}": words(2600, n) for n in range(12)}
    short = source(tmp_path, {f"d{n}": words(40, n) for n in range(300)}, "short")
    corpus = Corpus.open(prepare([short, source(tmp_path, books, "books")], tmp_path / "c", vocab_size=257))
    counts = corpus.manifest["counts"]["books"]
    assert counts["validation"]["documents"] == counts["proxy"]["documents"] == 1
    assert set(books) == set(corpus.ids[300:])  # no book is cut: one of twelve may be held out


def test_too_little_text_is_an_error_or_a_note(tmp_path: Path) -> None:
    lone = source(tmp_path, {"a": "a few words alone"})
    with pytest.raises(
        DataError,
        match=r"none of the 1 documents can be held out for the split validation, so that no run would accept the corp"
        r".*--validation-fraction 0 and runs another corpus \(data\.validation_path\)",
    ):
        prepare([lone], tmp_path / "c", vocab_size=300)
    with pytest.raises(DataError, match=r"for the split proxy, .*--proxy-fraction 0 and runs another"):
        prepare([lone], tmp_path / "c", vocab_size=300, rule=SplitRule(0.01, 0))
    letters = source(tmp_path, {"a": "x", "b": "yyy"})
    with pytest.raises(DataError, match=r"the split validation has 2 tokens, too few for any run; add text"):
        prepare([letters], tmp_path / "c", vocab_size=257, rule=SplitRule(0, 0.01))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]
    few = prepare([source(tmp_path, {f"d{n}": words(12, n) for n in range(8)})], tmp_path / "c", vocab_size=300)
    notes = [note for note in Corpus.open(few).manifest["notes"] if "runs need" in note]
    longest = {note.split(":")[0]: int(note.split("data.seq_len=")[1].split()[0]) for note in notes}
    assert longest == {"pool": 248, "validation": 46, "proxy": 45}
    assert RunData.open(DataConfig(path=str(few), seq_len=min(longest.values())), NEEDS).proxy
    with pytest.raises(DataError, match="no domain fills one sequence"):
        RunData.open(DataConfig(path=str(few), seq_len=min(longest.values()) + 1), NEEDS)
    with pytest.raises(DataError, match="seq_len = 1: must be at least 2"):
        SplitRule(seq_len=1)


@pytest.mark.parametrize("seed", range(40))
def test_what_floors_never_break(seed: int) -> None:
    """On random corpora: equal texts together, no unwanted proxy, nothing taken from held-out splits, a pool that is
    most of each domain, and nothing changed where a split is large."""
    draw = np.random.default_rng(seed)
    count, domains = int(draw.integers(4, 300)), int(draw.integers(1, 5))
    texts = draw.integers(0, 2**32, int(draw.integers(3, count + 1)), dtype=np.uint32)
    lengths = draw.integers(1, [20, 400, 30_000][seed % 3], len(texts))
    of = draw.integers(0, len(texts), count)
    codes = draw.integers(0, domains, count)
    codes[:domains] = np.arange(domains)
    names = [f"d{code}" for code in range(domains)]
    rule = SplitRule(0.02, 0.03, ("d0",) if seed % 2 else ())
    fractions = texts[of] / 2**32
    splits = np.where(fractions < 0.03, VALIDATION, np.where(fractions < 0.05, PROXY, POOL)).astype(np.uint8)
    wanted = codes == 0 if rule.wanted else np.ones(count, bool)
    splits[(splits == PROXY) & np.isin(of, of[~wanted])] = POOL
    documents = Documents(codes, splits, texts[of], lengths[of].astype(np.uint32))
    filled = fill(documents, names, rule, may_cut=False)
    for text in np.unique(of):
        assert len(set(filled.splits[of == text].tolist())) == 1
    assert not np.isin(of[filled.splits == PROXY], of[~wanted]).any()
    assert (filled.splits[splits != POOL] == splits[splits != POOL]).all()
    moved = (splits == POOL) & (filled.splits != POOL)
    assert sum(filled.moved.values()) == moved.sum()
    sizes = lengths[of]
    for split, fraction in ((VALIDATION, 0.03), (PROXY, 0.02)):
        before = [sizes[(splits == split) & (codes == code)].sum() for code in range(domains)]
        if max(before) >= 6 * 256 and "d0" not in rule.wanted and fraction * sizes.sum() < 6 * 256:
            assert filled.moved[split] == 0
    alone = np.bincount(of, minlength=len(texts))[of] == 1  # a copy in another domain moves with its text
    for code in range(domains):
        here = codes == code
        if moved[here].any() and alone[here].all() and (splits[here] == POOL).all():
            assert 2 * sizes[here & (filled.splits == POOL)].sum() >= sizes[here].sum()
    assert (fill(documents, names, replace(rule, proxy_fraction=0, validation_fraction=0), True).splits == splits).all()


def test_pieces_join_to_the_text_and_end_at_breaks() -> None:
    text = words(3000)
    pieces = cut(text, 700)
    assert "".join(pieces) == text
    assert all(500 < len(piece) < 900 for piece in pieces)
    assert all(piece[-1] in " \n" for piece in pieces[:-1])
    assert cut("x" * 1000, 250) == ["x" * 250] * 4
    blank = "word" + " " * 5000 + "end"
    assert "".join(cut(blank, 600)) == blank
    assert all(piece.strip() for piece in cut(blank, 600))
    assert cut("short", 600) == ["short"]
