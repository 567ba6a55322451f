"""Text features made by tasks or in pieces are those of one process; a sample that they are fitted to hardly shows."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megaopus.__main__ import main
from megaopus.config.compose import compose
from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.corpus_tools.tasks.hands import task_hands
from megaopus.data import feature_work, text_features
from megaopus.data.corpus import Corpus
from megaopus.data.feature_work import CountNgrams, Describe, Hands
from megaopus.data.folder import StoppedError
from megaopus.data.run_data import RunData
from megaopus.data.sequences import Sequences
from megaopus.data.text_features import SequenceTextFeatures, ensure_text_features, text_features_folder
from megaopus.errors import DataError

SEQ_LEN = 32
QUIET = Console(quiet=True)
SAMPLE = 400
"""Fewer sequences than the pool has, more than the proxy has."""


def opened(path: Path) -> tuple[Sequences, Sequences]:
    corpus = Corpus.open(path)
    return Sequences(corpus, "pool", SEQ_LEN), Sequences(corpus, "proxy", SEQ_LEN, ["docs"])


@pytest.fixture(scope="module")
def sides(tiny_corpus: Path) -> tuple[Sequences, Sequences]:
    return opened(tiny_corpus)


def made(folder: Path) -> dict[str, bytes]:
    """Everything that lies in a folder of features."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


def shared_out(units: CountNgrams | Describe, advance: Callable[[int], None]) -> None:
    """Do units as another process does: sent there, and in an order of its own."""
    sent = pickle.loads(pickle.dumps(units))
    for number in reversed(sent.numbers()):
        assert not units.done(number)
        sent.work(number)


@pytest.mark.parametrize("sample", [1 << 20, SAMPLE])
def test_bytes_do_not_depend_on_who_works(
    sides: tuple[Sequences, Sequences], tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: int
) -> None:
    """In one unit here, and in many that are sent elsewhere; all parts at once, and one by one."""
    given: dict[str, Any] = {"sample": sample, "again": partial(opened, tiny_corpus)}
    ensure_text_features(*sides, str(tmp_path / "here"), QUIET, judges=True, **given)
    for name, tokens in (("_UNIT_TOKENS", 5000), ("_READ_TOKENS", 2000), ("_CACHED_TOKENS", 600)):
        monkeypatch.setattr(feature_work, name, tokens)
    assert len(sides[0]) * SEQ_LEN > 5 * 5000
    ensure_text_features(*sides, str(tmp_path / "sent"), QUIET, judges=True, hands=shared_out, **given)
    assert made(tmp_path / "sent") == made(tmp_path / "here")
    for asked in ({}, {"judges": True}, {"ngrams": True}):
        several = {"judges": False, "ngrams": False} | asked
        folder = ensure_text_features(*sides, str(tmp_path / "parts"), QUIET, hands=shared_out, **several, **given)
    found, expected = made(tmp_path / "parts"), made(tmp_path / "here")
    name = folder.name
    assert found.pop(f"{name}.ngrams/sketch.npy") == expected.pop(f"{name}/sketch.npy")
    assert found == expected
    assert (folder / "moments.npy").exists() == (sample == SAMPLE)
    whole, parts = (SequenceTextFeatures(sides[0], tmp_path / each / name) for each in ("here", "parts"))
    ids = torch.arange(len(sides[0]))
    assert torch.equal(whole.features(ids), parts.features(ids))
    assert not list(tmp_path.rglob(".*.work"))


def test_tasks_of_datatrove_make_them_too(
    sides: tuple[Sequences, Sequences], tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datatrove", reason="needs datatrove (extra scale)")
    ensure_text_features(*sides, str(tmp_path / "here"), QUIET)
    monkeypatch.setattr(feature_work, "_UNIT_TOKENS", 4000)
    with task_hands(Executor("local", 3, 1)) as hands:
        again = partial(opened, tiny_corpus)
        ensure_text_features(*sides, str(tmp_path / "tasks"), QUIET, hands=hands, again=again)
    assert made(tmp_path / "tasks") == made(tmp_path / "here")


# -- what was stopped --------------------------------------------------------------------------------------------------


def stopping(stage: str, after: int, did: list[str]) -> Hands:
    """Does so many units of a stage, and ends as a driver whose tasks died; ``did`` is told of each."""

    def hands(units: CountNgrams | Describe, advance: Callable[[int], None]) -> None:
        left = [number for number in units.numbers() if not units.done(number)]
        for number in left[: after if units.name == stage else None]:
            units.work(number)
            did.append(f"{units.name} {number}")
        if units.name == stage:
            raise StoppedError("stopped")

    return hands


def test_what_was_stopped_goes_on_where_it_was(
    sides: tuple[Sequences, Sequences], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of either stage; nothing that was finished is done again."""
    monkeypatch.setattr(feature_work, "_UNIT_TOKENS", 8000)
    ensure_text_features(*sides, str(tmp_path / "straight"), QUIET)
    did: list[str] = []
    parent = str(tmp_path / "stopped")
    with (tmp_path / "said").open("w") as stream:
        console = Console(width=500, file=stream)
        for stage in ("counting n-grams", "describing sequences"):
            with pytest.raises(StoppedError):
                ensure_text_features(*sides, parent, console, hands=stopping(stage, 2, did))
        assert not text_features_folder(*sides, parent).exists()
        ensure_text_features(*sides, parent, console, hands=stopping("", 0, did))
    assert made(tmp_path / "stopped") == made(tmp_path / "straight")
    assert len(did) == len(set(did))
    assert min(sum(each.startswith(stage) for each in did) for stage in ("counting", "describing")) > 4
    assert (tmp_path / "said").read_text().count("going on from what a run that was stopped left") == 2


def swapped(path: Path) -> tuple[Sequences, Sequences]:
    pool, proxy = opened(path)
    return proxy, pool


def test_another_corpus_of_the_same_name_is_refused(
    sides: tuple[Sequences, Sequences], tiny_corpus: Path, tmp_path: Path
) -> None:
    """As a task on another machine may find it there."""
    with pytest.raises(DataError, match="changed while its text features were worked out"):
        ensure_text_features(*sides, str(tmp_path), QUIET, hands=shared_out, again=partial(swapped, tiny_corpus))


# -- a sample ----------------------------------------------------------------------------------------------------------


class Documents(list[None]):
    """As many as there may be, of a corpus that is not there."""

    def __init__(self, name: str, count: int):
        super().__init__([None] * count)
        self.path = Path(name)


class InMemory:
    """Sequences of made-up documents, without a corpus: a share of each one's words is of the kind of wanted text.

    Shares are beta-distributed: below 1 and 1 most of a sequence is of one kind, as in a pool of several domains.
    """

    seq_len = 128

    def __init__(self, name: str, count: int, shares: tuple[float, float], seed: int, words: int):
        draw = np.random.default_rng(seed)
        ranks = np.minimum(draw.zipf(1.2, (count, self.seq_len + 1)), words) - 1
        is_wanted = draw.random(ranks.shape) < draw.beta(*shares, count)[:, None]
        usual, other = (np.random.default_rng(each).permutation(words) for each in (101, 102))
        self._tokens = np.where(is_wanted, other[ranks], usual[ranks])
        self.key, self.corpus = json.dumps([name, seed]), Documents(name, count)

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._tokens[rows])

    def first_document_of(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(rows) // 2


def picks(pool: Any, folder: Path) -> list[set[int]]:
    """The quarter of each buffer of 256 that is most important."""
    importance = SequenceTextFeatures(pool, folder).importance(torch.arange(len(pool)))
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(5))
    return [set(part[importance[part].argsort()[-64:]].tolist()) for part in order.split(256)]


@pytest.mark.parametrize(("shares", "words"), [((0.3, 0.9), 300), ((0.15, 0.6), 1000)])
def test_picks_of_a_sample_are_those_of_the_whole(tmp_path: Path, shares: tuple[float, float], words: int) -> None:
    pool: Any = InMemory("pool", 2560, shares, 1, words)
    proxy: Any = InMemory("proxy", 500, (8.0, 2.0), 2, words)
    whole, sampled = (
        picks(pool, ensure_text_features(pool, proxy, str(tmp_path / name), QUIET, ngrams=False, sample=sample))
        for name, sample in (("whole", 2560), ("sampled", 1280))
    )
    shared = sum(len(a & b) for a, b in zip(whole, sampled, strict=True)) / sum(map(len, whole))
    assert shared >= 0.98
    assert whole != sampled


def test_features_of_the_whole_pool_go_on_to_be_used(sides: tuple[Sequences, Sequences], tmp_path: Path) -> None:
    """Of an earlier version, and a pool that counts as large now; what is made beside it is of the whole pool too."""
    parent = str(tmp_path / "a")
    whole = ensure_text_features(*sides, parent, QUIET, judges=True)
    assert text_features_folder(*sides, parent, SAMPLE) == whole
    beside = whole.with_name(f"{whole.name}.proxy")
    before = (beside / "proxy.npy").read_bytes()
    shutil.rmtree(beside)
    assert ensure_text_features(*sides, parent, QUIET, judges=True, sample=SAMPLE) == whole
    assert (beside / "proxy.npy").read_bytes() == before
    names = {text_features_folder(*sides, str(tmp_path / "b"), sample).name for sample in (SAMPLE, 300, 1 << 20)}
    assert len(names) == 3
    assert whole.name in names


@pytest.mark.parametrize("documents", [1, 2, 777])
def test_halves_in_a_file_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: int) -> None:
    """By every other document in which sequences begin; where there is one, by the sequences, for none may be empty."""
    monkeypatch.setattr(feature_work, "BLOCK", 100)
    pool: Any = InMemory("pool", 3000, (1.0, 1.0), 1, 300)
    firsts = np.sort(np.random.default_rng(0).integers(0, documents, 3000)) * 3
    firsts = np.concatenate([firsts[1000:], firsts[:1000]])  # domain after domain, documents in corpus order
    pool.first_document_of = lambda rows: firsts[rows]
    sides = [feature_work.Side(pool, np.arange(3000), kept) for kept in (None, tmp_path / "halves.npy")]
    for side in sides:
        side.divide()
    found = [side.halves_of(np.arange(3000)).tolist() for side in sides]
    assert found[0] == found[1]
    assert 1000 < sum(found[0]) < 2000


# -- the verb ----------------------------------------------------------------------------------------------------------


def settings(corpus: Path, tmp_path: Path, *more: str) -> list[str]:
    where = [f"data.path={corpus}", f"data.text_features_path={tmp_path / 'traits'}", f"data.seq_len={SEQ_LEN}"]
    return [*where, "data.target_domains=[docs]", *more]


def test_a_run_finds_what_the_verb_made(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(tiny_corpus, tmp_path, "selection=opus")
    assert main(["features", *given]) == 0
    said = capsys.readouterr().out
    config = compose(given)
    data = RunData.open(config.data, config.data_needs())
    assert f"pool: {len(data.pool):,} sequences, n-grams of {len(data.pool):,} of them counted; proxy:" in said
    assert "next: python -m megaopus train" in said
    monkeypatch.setattr(text_features, "work_out", lambda *given: 1 / 0)
    folder = data.ensure_text_features(QUIET)
    size = sum(path.stat().st_size for path in folder.glob("*.npy"))
    assert size < 52 * len(data.pool) + 2000  # what predicts nothing asks for no n-grams
    cascade = compose(settings(tiny_corpus, tmp_path, "selection=opus_cascade"))
    with pytest.raises(ZeroDivisionError):
        RunData.open(cascade.data, cascade.data_needs()).ensure_text_features(QUIET)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["selection=uniform"], "selection.method=uniform reads no text features"),
        (["selection=opus", "--tasks", "3"], "--tasks and --slurm are of an executor"),
        (["selection=opus", "--workers", "3"], "--workers are of an executor"),
        (["selection=opus", "--executor", "local", "--tasks", "0"], "--tasks 0: must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_said(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["features", *settings(tiny_corpus, tmp_path), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "traits").exists()
