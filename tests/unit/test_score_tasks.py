"""The verb score by tasks: the column of one process, whoever does the chunks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megaopus.__main__ import main
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.tasks.hands import PlacedUnits
from megaopus.data.corpus import Corpus
from megaopus.data.folder import StoppedError
from megaopus.data.scores import column_folder
from megaopus.errors import DataError
from megaopus.score.base import make_column
from megaopus.score.ngrams import Dsir


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The tiny corpus under a name of its own, so that columns of other tests are not beside it."""
    place = tmp_path_factory.mktemp("score") / "corpus"
    place.symlink_to(tiny_corpus)
    return Corpus.open(place)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dsir, "chunk_tokens", 5000)
    monkeypatch.setattr(Dsir, "batch_tokens", 1500)


def scores(corpus: Corpus, name: str) -> np.ndarray:
    found: np.ndarray = np.load(column_folder(corpus.path, name) / "scores.npy")
    return found


def make(corpus: Corpus, target: Source | None = None) -> Dsir:
    return Dsir(corpus, target)


def test_a_column_by_tasks_is_that_of_one_process(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datatrove", reason="needs datatrove (extra scale)")
    make_column(corpus, "alone", Dsir(corpus, None))
    command = ["score", "--corpus", str(corpus.path), "--method", "dsir", "--name", "by_tasks"]
    assert main([*command, "--executor", "local", "--tasks", "3", "--workers", "1"]) == 0, capsys.readouterr()
    assert scores(corpus, "alone").tobytes() == scores(corpus, "by_tasks").tobytes()


def test_chunks_are_scored_once_wherever_they_are_sent(corpus: Corpus, tmp_path: Path) -> None:
    """In another order, in a process that opens corpus and method again; after a stop the rest alone is done."""
    target = tmp_path / "target.txt"
    target.write_text("a target of a few words, to be like\n" * 5)
    given = Source(target)
    did: list[str] = []

    def hands(units: PlacedUnits, advance: Callable[[int], None], most: int = 1000) -> None:
        sent = pickle.loads(pickle.dumps(units))
        for number in [each for each in reversed(sent.numbers()) if not sent.done(each)][:most]:
            sent.work(number)
            did.append(f"{units.name} {number}")
        if units.name == "scoring" and most < 1000:
            raise StoppedError("tasks died")

    again = partial(make, target=given)
    make_column(corpus, "alone_like", Dsir(corpus, given))
    with pytest.raises(StoppedError):
        make_column(corpus, "sent", Dsir(corpus, given), hands=partial(hands, most=7), again=again)
    make_column(corpus, "sent", Dsir(corpus, given), hands=hands, again=again)
    assert len(did) == len(set(did))
    assert min(sum(each.startswith(name) for each in did) for name in ("counting", "scoring")) > 7
    assert scores(corpus, "alone_like").tobytes() == scores(corpus, "sent").tobytes()


def test_another_corpus_of_the_same_name_is_refused(
    corpus: Corpus, target_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a task on another machine may find it there."""
    other = Corpus.open(target_corpus)

    def hands(units: PlacedUnits, advance: Callable[[int], None]) -> None:
        monkeypatch.setattr(Corpus, "open", lambda path: other)
        pickle.loads(pickle.dumps(units)).work(0)

    with pytest.raises(DataError, match="changed while it was scored"):
        make_column(corpus, "changed", Dsir(corpus, None), hands=hands, again=make)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--executor", "local", "--checkpoint", "runs/a", "--method", "perplexity"], "start it by torchrun instead"),
        (["--method", "dsir", "--tasks", "2"], "--tasks and --slurm are of an executor"),
        (["--method", "dsir", "--workers", "2"], "--workers are of an executor"),
        (["--method", "dsir", "--executor", "local", "--workers", "0"], "--workers 0: must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_said(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["score", "--corpus", str(corpus.path), "--name", "refused", *more]) == 2
    assert said in capsys.readouterr().err
    assert not column_folder(corpus.path, "refused").exists()
