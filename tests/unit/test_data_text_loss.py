"""Tokenizers that cannot write the text are refused, with figures; those that change case and spaces are not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megaopus.__main__ import main
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.corpus_tools.text_loss import Sample, TextLoss, unknown_id
from megaopus.data.corpus import Corpus
from megaopus.errors import DataError

POOL = SplitRule(0, 0)
ENGLISH = [f"The Quick brown fox, number {n}, jumps over it." for n in range(60)]
CHINESE = [f"敏捷的棕色狐狸跳过懒狗{n}" for n in range(20)]
EOD = "<|endoftext|>"


def bpe() -> Tokenizer:
    """Of the characters met, as was usual before bytes: what it does not know, it drops without a trace."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=[EOD], show_progress=False)
    tokenizer.train_from_iterator(ENGLISH, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT's: lower case, no accents, ``[UNK]`` for a word it cannot write."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=[EOD, "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([*ENGLISH, "0123456789"], trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """As SentencePiece's: ``<unk>`` is known by its number."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[EOD, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(ENGLISH, trainer)
    return tokenizer


def strict() -> Tokenizer:
    """Knows words alone and gives up at another."""
    return Tokenizer(models.WordLevel({EOD: 0, "The": 1}, unk_token="[UNK]"))


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tok.json"))
    return folder / "tok.json"


def source(folder: Path, texts: Iterable[str], name: str = "s") -> Source:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(folder / f"{name}.jsonl")


REFUSED = {
    "bpe": (
        bpe,
        r"\d\d\.\d % of the characters of a sample lost, 0\.0 % of the tokens unknown, 50\.0 % of the documents",
    ),
    "wordpiece": (wordpiece, r".* lost, \d\d\.\d % of the tokens unknown, 0\.0 % of the documents empty"),
    "unigram": (unigram, r".* lost, \d\d\.\d % of the tokens unknown, 0\.0 % of the documents empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_is_lost_is_refused_and_counted(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    texts = [text.rstrip("0123456789") if n % 2 else text for n, text in enumerate(CHINESE)]
    sources = [source(tmp_path, ENGLISH, "en"), source(tmp_path, texts, "zh")]
    given = saved(make(), tmp_path)
    with pytest.raises(
        DataError, match=f"cannot write the text of domain 'zh': {message}.*--max-lost 1 takes the loss"
    ):
        prepare(sources, tmp_path / "c", tokenizer=given, rule=POOL)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / ".c.work").exists()
    corpus = Corpus.open(prepare(sources, tmp_path / "c", tokenizer=given, rule=POOL, max_lost=1), verify=True)
    told = corpus.manifest["tokenization"]
    unknown = corpus.tokenizer().token_to_id({"wordpiece": "[UNK]", "unigram": "<unk>"}.get(name, "none"))
    assert told["all"]["unknown"] == (0 if unknown is None else int((np.asarray(corpus.tokens) == unknown).sum()))
    assert told["all"]["empty"] == int((corpus.lengths == 1).sum())
    assert told["all"]["tokens"] == len(corpus.tokens) - 80
    assert list(told["domains"]) == ["zh"]
    assert told["domains"]["zh"]["documents"] == 20
    assert told["domains"]["zh"]["lost_characters"] == sum(not c.isascii() for text in texts for c in text)


@pytest.mark.parametrize("make", [bpe, wordpiece, unigram])
def test_case_accents_and_spaces_may_change(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*ENGLISH, *(f"  {text.upper() if make is wordpiece else text}\n" for text in ENGLISH)]
    given = saved(make(), tmp_path)
    command = ["prepare", "--source", str(source(tmp_path, texts).path), "--tokenizer", str(given)]
    assert main([*command, "--out", str(tmp_path / "c")]) == 0
    none = "0.0 % of the characters of a sample lost, 0.0 % of the tokens unknown, 0.0 % of the documents empty"
    assert f"tokenizer: {none}\n" in capsys.readouterr().out


def test_what_the_sample_does_not_show_is_counted(tmp_path: Path) -> None:
    """Documents that become empty, past the beginnings that are decoded again."""
    texts = [text + " " * 1000 + "狐" * 200 for text in ENGLISH]
    given = saved(unigram(), tmp_path)
    with pytest.raises(DataError, match=r"'s': 0\.0 % of the characters of a sample lost, \d\.\d % of the tokens unk"):
        prepare([source(tmp_path, texts)], tmp_path / "c", tokenizer=given, rule=POOL)
    assert not (tmp_path / "c").exists()


def test_a_tokenizer_that_gives_up_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer cannot write this text \(.*\[UNK\].*\); use another, or none"):
        prepare([source(tmp_path, ENGLISH)], tmp_path / "c", tokenizer=saved(strict(), tmp_path), rule=POOL)
    with pytest.raises(DataError, match=r"max_lost = 2: must lie in \[0, 1\]"):
        prepare([source(tmp_path, ENGLISH)], tmp_path / "c", max_lost=2)


def test_unknown_tokens_of_every_model() -> None:
    found = {make.__name__: unknown_id(make()) for make in (bpe, wordpiece, unigram)}
    assert found == {"bpe": None, "wordpiece": 1, "unigram": 1}


def test_the_sample_does_not_depend_on_the_order() -> None:
    draws = np.random.default_rng(0).random(500).tolist()
    samples = [Sample(), Sample()]
    for sample, order in zip(samples, (range(500), reversed(range(500))), strict=True):
        for n in order:
            sample.offer("d", draws[n], f"{n}" + "x" * 2000)
    kept = samples[0].texts()
    assert kept == samples[1].texts()
    assert [text.rstrip("x") for text in kept["d"]] == [str(n) for n in np.argsort(draws)[:64]]
    assert TextLoss(documents=3, empty=1).shares()["of the documents empty"] == 1 / 3
