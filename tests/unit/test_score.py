"""The verb score: methods without a checkpoint against plain loops; columns whole or not at all; going on."""

from __future__ import annotations

import errno
import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megaopus.__main__ import main
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data import feature_numbers, text_features
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.folder import StoppedError
from megaopus.data.scores import column_folder, load_column
from megaopus.errors import DataError
from megaopus.score.base import make_column, spans
from megaopus.score.hub import Classifier, HubPerplexity
from megaopus.score.ngrams import Dsir
from megaopus.score.quality import FastText
from megaopus.selection import SelectionConfig


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The tiny corpus under a name of its own, so that columns of other tests are not beside it."""
    place = tmp_path_factory.mktemp("score") / "corpus"
    place.symlink_to(tiny_corpus)
    return Corpus.open(place)


def domain(corpus: Corpus, name: str) -> np.ndarray:
    return np.flatnonzero(corpus.domain_codes == corpus.domains.index(name))


# -- dsir --------------------------------------------------------------------------------------------------------------


def dsir_by_hand(corpus: Corpus, target: list[np.ndarray], documents: np.ndarray) -> list[float]:
    """Document by document, n-gram by n-gram."""

    def grams(tokens: np.ndarray) -> tuple[list[int], list[int]]:
        uni, bi = feature_numbers.hashed(tokens.astype(np.uint64)[None])
        return uni[0].tolist(), bi[0].tolist()

    def log_chances(texts: list[np.ndarray]) -> list[dict[int, float]]:
        found = []
        for kind in range(2):
            counts = [1] * feature_numbers.BUCKETS
            for text in texts:
                for bucket in grams(text)[kind]:
                    counts[bucket] += 1
            found.append({n: float(np.log(count / sum(counts))) for n, count in enumerate(counts) if count > 1})
            found[-1][-1] = float(np.log(1 / sum(counts)))
        return found

    pool = [tokens_of(corpus, n) for n in np.flatnonzero(corpus.split_codes == SPLITS.index("pool"))]
    sides = log_chances(target), log_chances(pool)
    scores = []
    for number in documents:
        total = 0.0
        for kind, buckets in enumerate(grams(tokens_of(corpus, number))):
            odds = [
                sides[0][kind].get(b, sides[0][kind][-1]) - sides[1][kind].get(b, sides[1][kind][-1]) for b in buckets
            ]
            total += sum(odds) / len(odds) if odds else 0.0
        scores.append(total)
    return scores


def tokens_of(corpus: Corpus, number: int) -> np.ndarray:
    return corpus.tokens[corpus.offsets[number] :][: corpus.lengths[number] - 1]


def test_what_is_no_dsir_to_the_letter_is_called_dsir_like() -> None:
    """By the formula that the plain loops here and in test_data_traits.py hold."""
    (method,) = (each for each in fields(SelectionConfig) if each.name == "method")
    places = [str(method.metadata), str(Dsir.__doc__), str(text_features.SequenceTextFeatures.log_odds.__doc__)]
    root = Path(__file__).resolve().parents[2]
    places += [
        (root / name).read_text() for name in ("docs/selection.md", "docs/data.md", "configs/selection/dsir.yaml")
    ]
    assert all("DSIR-like" in text for text in places)


def test_dsir_is_what_a_plain_loop_finds(corpus: Corpus, tmp_path: Path) -> None:
    make_column(corpus, "dsir", Dsir(corpus, None))
    values = load_column(corpus, "dsir").values
    proxy = [tokens_of(corpus, n) for n in np.flatnonzero(corpus.split_codes == SPLITS.index("proxy"))]
    some = np.arange(0, len(corpus), 7)
    np.testing.assert_allclose(values[some], dsir_by_hand(corpus, proxy, some), rtol=1e-4, atol=1e-5)
    assert values[domain(corpus, "docs")].mean() > values[domain(corpus, "code")].mean()
    target = tmp_path / "code.jsonl"
    texts = corpus.texts(domain(corpus, "code")[:5])
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    make_column(corpus, "like_code", Dsir(corpus, Source(target)))
    values = load_column(corpus, "like_code").values
    wanted = [tokens_of(corpus, n) for n in domain(corpus, "code")[:5]]
    np.testing.assert_allclose(values[some], dsir_by_hand(corpus, wanted, some), rtol=1e-4, atol=1e-5)


def test_a_corpus_that_is_read_only_is_scored_by_another_name(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(DataError, match=rf"Read-only.* scores lie beside the corpus: ln -s {corpus.path} FOLDER"):
            make_column(corpus, "elsewhere", Dsir(corpus, None))
    (tmp_path / "mine").symlink_to(corpus.path)
    linked = Corpus.open(tmp_path / "mine")
    assert make_column(linked, "elsewhere", Dsir(linked, None)) == tmp_path / "mine.scores" / "elsewhere"
    assert not column_folder(corpus.path, "elsewhere").exists()
    assert load_column(linked, "elsewhere").values.std() > 0


def test_documents_of_one_token_and_a_target_that_is_not_there(tmp_path: Path) -> None:
    rows = [{"text": text, "grade": 1} for text in ("a", "b", "a long text " * 20)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(tmp_path / "short.jsonl", None, Fields(keep=("grade",)))
    place = prepare([source], tmp_path / "corpus", vocab_size=300, rule=SplitRule(0, 0))
    corpus = Corpus.open(place)
    with pytest.raises(DataError, match=r"split 'proxy' is empty; name a --target"):
        make_column(corpus, "dsir", Dsir(corpus, None))
    assert not column_folder(place, "dsir").exists()
    make_column(corpus, "dsir", Dsir(corpus, Source(tmp_path / "short.jsonl")))
    assert np.isfinite(load_column(corpus, "dsir").values).all()
    with pytest.raises(DataError, match=r"already have a column 'grade', from prepare; choose another --name"):
        make_column(corpus, "grade", Dsir(corpus, Source(tmp_path / "short.jsonl")))


# -- how a column is made ----------------------------------------------------------------------------------------------


class Numbered:
    """Scores a document by its number; stops once before document ``until``."""

    best = "highest"
    batch_tokens, chunk_tokens = 500, 2000

    def __init__(self, until: int | None = None):
        self.about: dict[str, Any] = {"method": "numbered"}
        self.stamps: list[Any] = []
        self.until, self.asked, self.closed = until, [], False  # type: ignore[var-annotated]

    def ready(self, work: Path, begin: Any) -> None: ...

    def scores(self, documents: np.ndarray) -> np.ndarray:
        if self.until is not None and documents[-1] >= self.until:
            raise StoppedError("stopped")
        self.asked += documents.tolist()
        return documents.astype(np.float64)

    def finish(self, folder: Path, work: Path) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_a_run_that_was_stopped_goes_on_and_leaves_the_corpus_as_it_was(corpus: Corpus) -> None:
    first = Numbered(until=60)
    with pytest.raises(StoppedError):
        make_column(corpus, "numbered", first)
    assert first.closed
    assert not column_folder(corpus.path, "numbered").exists()
    second = Numbered()
    out = make_column(corpus, "numbered", second)
    assert 0 < min(second.asked) <= 60  # whole chunks are not scored again
    assert second.asked == list(range(min(second.asked), len(corpus)))
    assert load_column(corpus, "numbered").values.tolist() == list(range(len(corpus)))
    assert [path.name for path in sorted(out.iterdir())] == ["column.json", "scores.npy"]
    assert not list(out.parent.glob(".*"))
    with pytest.raises(DataError, match=r"already holds a score column; .*--overwrite"):
        make_column(corpus, "numbered", Numbered())
    third = Numbered()
    make_column(corpus, "numbered", third, overwrite=True)
    assert third.asked == list(range(len(corpus)))
    Corpus.open(corpus.path, verify=True)


class LostRank:
    """A mesh of two ranks of which the other is gone, as far as the first can tell."""

    rank = 0
    shape = SimpleNamespace(world_size=2)

    def broadcast_object(self, value: Any) -> Any:
        return value


class OnRanks(Numbered):
    """Loses the other rank before document ``until``."""

    def join(self) -> Any:
        return LostRank()

    def scores(self, documents: np.ndarray) -> np.ndarray:
        try:
            return super().scores(documents)
        except StoppedError:
            raise RuntimeError("Connection closed by peer\nand a trace") from None


def test_what_is_done_is_kept_where_another_rank_is_lost(corpus: Corpus) -> None:
    first, second = OnRanks(until=60), OnRanks()
    with pytest.raises(StoppedError, match=r"cannot go on together \(Connection closed by peer\); .* same command"):
        make_column(corpus, "on_ranks", first)
    assert first.closed
    make_column(corpus, "on_ranks", second)
    assert 0 < min(second.asked) <= 60
    assert load_column(corpus, "on_ranks").values.tolist() == list(range(len(corpus)))


def test_spans_cover_everything_once() -> None:
    lengths = np.array([3, 4, 50, 1, 1, 1, 9])
    assert [part.tolist() for part in spans(lengths, 10)] == [[0, 1], [2], [3, 4, 5], [6]]


# -- fastText ----------------------------------------------------------------------------------------------------------


def test_fasttext_is_trained_here_and_its_model_used_again(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(corpus.path)
    assert main(["score", "--corpus", path, "--method", "fasttext"]) == 0
    said = capsys.readouterr().out
    assert "quantiles of fasttext" in said
    assert "data.filter.column=fasttext data.filter.keep=0.3" in said
    values = load_column(corpus, "fasttext").values
    docs, code = values[domain(corpus, "docs")], values[domain(corpus, "code")]
    assert (docs[:, None] > code[None]).mean() > 0.65  # of a few documents of documentation against all else
    model = column_folder(corpus.path, "fasttext") / "model.bin"
    again = ["score", "--corpus", path, "--method", "fasttext", "--model", str(model), "--name", "again"]
    assert main(again) == 2
    assert "no label named; give the one that is scored with --label: __label__negative, __label__positive" in (
        capsys.readouterr().err
    )
    assert main([*again, "--label", "positive"]) == 0
    assert load_column(corpus, "again").values.tolist() == values.tolist()
    assert main([*again, "--label", "positive", "--positive", "x.jsonl"]) == 2
    assert "--model: is a trained classifier; leave --positive" in capsys.readouterr().err


def test_fasttext_from_files(corpus: Corpus, tmp_path: Path) -> None:
    sides = []
    for name in ("code", "docs"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in corpus.texts(domain(corpus, name))))
        sides.append((Source(path),))
    columns = []
    for name in ("first", "second"):
        make_column(corpus, name, FastText(corpus, positive=sides[0], negative=sides[1]))
        columns.append(load_column(corpus, name).values)
    for values in columns:  # threads train as they come, so that no two models are equal
        assert values[domain(corpus, "code")].min() > values[domain(corpus, "docs")].max()
    assert np.corrcoef(*columns)[0, 1] > 0.95
    (tmp_path / "no.bin").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no.bin: not a fastText model"):
        FastText(corpus, tmp_path / "no.bin", "x")


def test_fasttext_starts_from_vectors_that_were_all_set(corpus: Corpus, tmp_path: Path) -> None:
    """With fewer threads most of them are what the memory held before (fastText 0.9.2)."""
    dirty = [np.full(1 << 24, 1e9, dtype=np.float32) for _ in range(4)]  # what is freed is handed out again
    del dirty
    method = FastText(corpus)
    method.ready(tmp_path, lambda what, tokens: lambda count: None)
    vectors = method._model.get_input_matrix()
    assert np.abs(vectors).max() < 10
    assert not (vectors == 0).all(axis=1).any()


def test_an_extra_that_is_missing_is_named(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fasttext", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"needs fasttext, which is not installed: pip install 'megaopus\[fasttext\]'"):
        FastText(corpus)
    with pytest.raises(DataError, match=r"needs transformers, .*'megaopus\[transformers\]'"):
        HubPerplexity(corpus, "gpt2")


# -- transformers ------------------------------------------------------------------------------------------------------


def saved(folder: Path, corpus: Corpus, kind: str, **settings: Any) -> str:
    """A tiny model with random weights and the corpus's own tokenizer, in ``folder``."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any]
    if kind == "GPT2LMHeadModel":
        sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 24, "initializer_range": 0.4}
        config = transformers.GPT2Config(vocab_size=corpus.vocab_size, **sizes)
    else:
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        more = {"max_position_embeddings": 24, "initializer_range": 0.4, **settings}
        config = transformers.BertConfig(vocab_size=corpus.vocab_size, **sizes, **more)
    getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer(), bos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=24
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Twelve documents, from one character to several windows."""
    folder = tmp_path_factory.mktemp("few")
    texts = ["a", "of it", *(f"sentence {n} of the text. " * n for n in range(1, 11))]
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus.open(prepare([Source(folder / "few.jsonl")], folder / "corpus", vocab_size=300))


@pytest.mark.parametrize("windows", ["mean", "first"])
def test_perplexity_of_a_hub_model_is_what_a_plain_loop_finds(few: Corpus, tmp_path: Path, windows: str) -> None:
    transformers = importlib.import_module("transformers")
    name = saved(tmp_path / "lm", few, "GPT2LMHeadModel")
    make_column(few, f"lm_{windows}", HubPerplexity(few, name, windows, device="cpu"))
    column = load_column(few, f"lm_{windows}")
    assert column.best == "lowest"
    model = transformers.GPT2LMHeadModel.from_pretrained(name).eval()
    for number, value in enumerate(column.values):
        tokens = torch.tensor([few.eod_id, *tokens_of(few, number).tolist()])
        losses: list[float] = []
        for start in range(0, len(tokens) - 1, 23):
            part = tokens[start : start + 24]
            with torch.no_grad():
                chances = model(part[None]).logits[0, :-1].log_softmax(-1)
            losses += [-float(row[token]) for row, token in zip(chances, part[1:], strict=True)]
            if windows == "first":
                break
        assert value == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_sequence_classifier_is_asked_for_one_label(few: Corpus, tmp_path: Path, capsys: Any) -> None:
    transformers = importlib.import_module("transformers")
    names = {0: "low", 1: "mid", 2: "high"}
    name = saved(tmp_path / "three", few, "BertForSequenceClassification", num_labels=3, id2label=names)
    with pytest.raises(DataError, match=r"several labels; give the one that is scored with --label: low, mid, high"):
        Classifier(few, name)
    with pytest.raises(DataError, match=r"--max-tokens 99: must lie in \[2, 24\]"):
        Classifier(few, name, max_tokens=99, label="high")
    model = transformers.BertForSequenceClassification.from_pretrained(name).eval()
    asked = {"chance": {"label": "high"}, "logit": {"label": "2", "logit": True, "windows": "mean"}}
    for column, settings in asked.items():
        make_column(few, column, Classifier(few, name, device="cpu", **settings))  # type: ignore[arg-type]
        for number, value in enumerate(load_column(few, column).values):
            tokens = torch.from_numpy(tokens_of(few, number).astype(np.int64))
            parts = tokens.split(24) if column == "logit" else [tokens[:24]]
            with torch.no_grad():
                logits = [model(part[None]).logits[0] for part in parts]
            outputs = [each[2] if column == "logit" else each.softmax(0)[2] for each in logits]
            weights = [len(part) / sum(map(len, parts)) for part in parts]
            assert value == pytest.approx(sum(float(o) * w for o, w in zip(outputs, weights, strict=True)), rel=1e-4)


def test_a_regression_has_no_label_to_name(few: Corpus, tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    name = saved(tmp_path / "one", few, "BertForSequenceClassification", num_labels=1)
    command = ["score", "--corpus", str(few.path), "--method", "classifier", "--model", name, "--name", "edu"]
    assert main(command) == 0
    model = transformers.BertForSequenceClassification.from_pretrained(name).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_of(few, 3).astype(np.int64))[None, :24]).logits[0, 0]
    assert load_column(few, "edu").values[3] == pytest.approx(float(expected), rel=1e-4)


def test_other_methods_are_one_process_s_work(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["score", "--corpus", str(corpus.path), "--method", "dsir"]) == 2
    assert "--method dsir: without --checkpoint it is one process's work: leave torchrun out" in capsys.readouterr().err


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "dsir", "--model", "x"], "--model: says nothing to --method dsir; it is for perplexity and"),
        (["--method", "perplexity"], "needs --checkpoint (a run of ours, a Hugging Face folder) or"),
        (
            ["--method", "perplexity", "--model", "x", "--checkpoint", "y"],
            "takes --checkpoint or --model; leave one out",
        ),
        (["--method", "utility"], "--method utility: needs --checkpoint"),
        (["--method", "dsir", "parallel.tp=2"], "parallel.tp=2: says nothing to --method dsir; it is for perplexity"),
        (
            ["--method", "perplexity", "--model", "x", "parallel.tp=2"],
            "parallel.tp=2: says nothing without --checkpoint",
        ),
        (["--method", "classifier"], "--method classifier: needs --model"),
        (["--method", "classifier", "--model", "/no/such"], "--model /no/such: cannot be read as AutoModelForSeq"),
        (["--method", "perplexity", "--checkpoint", "/no/such"], "neither a complete checkpoint nor a run folder"),
        (["--method", "dsir", "--name", "a/b"], "column name 'a/b': use letters, digits"),
        (["--method", "dsir", "--target", "no.jsonl"], "no.jsonl: no such file or folder"),
    ],
)
def test_options_that_do_not_go_together(
    corpus: Corpus, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "--corpus", str(corpus.path), *options]) == 2
    assert message in capsys.readouterr().err
