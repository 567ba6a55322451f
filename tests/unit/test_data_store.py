"""A corpus in an object store is read as a local one is, also while the store is away for a while."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaopus.cli.main import main
from megaopus.config.compose import compose
from megaopus.config.validation import validate
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.data import store
from megaopus.data.corpus import Corpus
from megaopus.data.scores import load_column
from megaopus.data.sequences import Sequences
from megaopus.data.store import RangeReader, Store, read_object
from megaopus.errors import ConfigError, DataError
from megaopus.training.signals import STOP_EXIT_CODE
from tests.cluster.slurm import until
from tests.faults import at_step
from tests.object_store import Away, object_store, put_bytes, put_once
from tests.pool import Pool

ADDRESS, L = "s3://bucket/books", 16


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    rows = []
    for n in range(200):
        text = f"document {n} " * (3 + n % 20)
        rows.append({"text": text, "grade": n, "spans": [[0, 8]], "domain": "ab"[n % 2]})
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(folder / "s.jsonl", fields=Fields(keep=("grade",), loss_spans="spans"))
    return prepare([source], folder / "books", vocab_size=300, rule=SplitRule(0.1, 0.1, seq_len=L))


@pytest.fixture
def away(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Away]:
    """The corpus in a bucket, and an empty cache."""
    with object_store(tmp_path / "cache", monkeypatch) as there:
        put_once(local, ADDRESS)
        yield there


def everything(place: str | Path, given: Store | None = None) -> list[object]:
    """List what a run reads of a corpus."""
    corpus = Corpus.open(place, store=given)
    pool = Sequences(corpus, "pool", L)
    numbers = np.arange(len(pool))
    tokens = pool.read(numbers[::-1])
    return [
        corpus.fingerprint,
        pool.key,
        tokens.tolist(),
        corpus.texts(np.array([3, 5])),
        corpus.loss_tokens().tolist(),
        load_column(corpus, "grade").values.tolist(),
        corpus.ids,
        corpus.tokens[10:50].tolist(),
        corpus.tokens[np.array([7, 1])].tolist(),
    ]


def test_a_corpus_in_a_store_is_the_local_one(away: Away, local: Path, tmp_path: Path) -> None:
    assert everything(ADDRESS) == everything(local)
    Corpus.open(ADDRESS, verify=True)
    copies = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "manifest.json" in copies
    assert "tokens.bin" not in copies  # only blocks of it
    config = compose([f"data.path={ADDRESS}", f"data.seq_len={L}", "model=tiny"])
    assert validate(config, 1) == []


def test_blocks_are_kept_up_to_a_bound(
    away: Away, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BLOCK_BYTES", 256)
    assert everything(ADDRESS, Store(most_bytes=1000)) == everything(local)
    for folder in (tmp_path / "cache" / "blocks").iterdir():
        assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= 1000
    asked: list[object] = []
    monkeypatch.setattr(store.RangeReader, "_fetch", lambda self, numbers: asked.append(numbers))
    corpus = Corpus.open(ADDRESS)
    kept = sorted(int(path.name) for path in next((tmp_path / "cache" / "blocks").iterdir()).iterdir())
    corpus.read(np.array([128 * kept[0]]), np.array([5]))  # in a block that is there
    assert asked == []


def test_threads_do_not_trip_over_each_other_s_blocks(tmp_path: Path) -> None:
    blocks = store._Blocks(tmp_path, 50)

    def work(start: int) -> None:
        for n in range(start, start + 300):
            number = n % 8
            found = blocks.get(number)
            assert found in (None, bytes([number]) * 10)
            blocks.put(number, bytes([number]) * 10)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 50


def test_a_store_that_is_away_for_a_while_is_waited_for(away: Away, local: Path) -> None:
    corpus = Corpus.open(ADDRESS)
    away.leave()
    threading.Timer(2.0, away.come_back).start()
    began = time.monotonic()
    with pytest.warns(UserWarning, match=r"tokens\.bin: not answered .*; asking again for 600 s"):
        found = corpus.read(np.array([0]), np.array([40]))
    assert time.monotonic() - began > 1.5
    assert found.tolist() == Corpus.open(local).tokens[:40].tolist()


def test_a_store_that_stays_away_is_named(away: Away) -> None:
    corpus = Corpus.open(ADDRESS, store=Store(patience_s=1.0))
    away.leave()
    named = r"s3://bucket/books/tokens\.bin: not answered for 1 s .* the same command goes on"
    with pytest.warns(UserWarning, match="asking again"), pytest.raises(DataError, match=named):
        corpus.read(np.array([0]), np.array([40]))
    away.come_back()


def test_what_is_not_there_is_named(away: Away) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/none/manifest\.json: no such object"):
        Corpus.open("s3://bucket/none")
    with pytest.raises(ConfigError, match=r"data\.path = 's3://bucket/none': .*no such object"):
        compose(["data.path=s3://bucket/none"])


def test_rules_of_settings_ask_for_a_manifest_once(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing answers: each of them would wait for it."""
    asked: list[str] = []

    def read(address: str, store: Store) -> bytes:
        asked.append(address)
        return read_object(address, Store(patience_s=0))

    monkeypatch.setattr("megaopus.config.corpus_rules.read_object", read)
    compose([f"data.path={ADDRESS}", f"data.seq_len={L}", "train.epochs=1", "model=tiny"])
    assert asked == [f"{ADDRESS}/manifest.json"]
    away.leave()
    with pytest.raises(ConfigError, match="not answered for 0 s"):
        compose([f"data.path={ADDRESS}", f"data.seq_len={L}", "model=tiny"])
    assert len(asked) == 2
    away.come_back()


def test_digests_are_checked_there_too(away: Away, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of token files and the table; what was kept of what lay there before is not taken for it."""
    changed = bytearray((local / "tokens.bin").read_bytes())
    changed[1000] ^= 1
    put_once(local, "s3://bucket/changed")
    put_bytes(bytes(changed), "s3://bucket/changed/tokens.bin")
    Corpus.open("s3://bucket/changed")  # the size is right
    monkeypatch.setattr(store, "BLOCK_BYTES", 256)
    with pytest.raises(DataError, match=r"s3://bucket/changed/tokens\.bin: changed since it was prepared"):
        Corpus.open("s3://bucket/changed", verify=True)
    one, other = (RangeReader(f"{ADDRESS}/tokens.bin", 100, Store(), version) for version in "ab")
    one.read(np.array([0]), np.array([8]))
    assert other._cache.get(0) is None


SMALL = ["model=tiny", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", f"data.seq_len={L}"]
RUN = [*SMALL, "selection=opus_exact", "selection.warmup_steps=1", "train.steps=4", "train.global_batch_size=8"]


def trained(place: str | Path, run_dir: Path, *more: str) -> int:
    """Train a small run on a corpus; returns its exit code."""
    return main(["train", *RUN, f"data.path={place}", f"run_dir={run_dir}", "train.eval_every=2", *more])


def found_by(run_dir: Path) -> list[object]:
    """Losses, picks and validations of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "target_loss", "losses")
    return [{name: line.get(name) for name in kept} for line in lines]


def trained_on_a_rank(place: str, run_dir: Path, folder: Path, first_wait_s: float) -> tuple[int, int]:
    """Train on a rank with a cache of its own; returns its exit code, and how often the store did not answer it.

    Before update 2 rank 0 has the store taken away: it says so with a file in ``folder``, and waits for another.
    """
    rank, failures, ask_patiently = os.environ["RANK"], [0], store.patiently
    os.environ[store.CACHE] = str(folder / f"cache-{rank}")
    store.BLOCK_BYTES, store._FIRST_WAIT_S = 512, first_wait_s

    def patiently(address: str, ask: Callable[[], Any], patience_s: float, **more: Any) -> Any:
        def once() -> Any:
            try:
                return ask()
            except Exception:
                failures[0] += 1
                raise

        return ask_patiently(address, once, patience_s, **more)

    def leave() -> None:
        if rank == "0" and store.is_address(place):
            (folder / "leave").touch()
            until((folder / "gone").exists, 60, "the store stays")

    store.patiently = patiently
    with at_step(2, leave):
        return trained(place, run_dir, "train.steps=6", "train.micro_batch_size=4"), failures[0]


def outage(away: Away, local: Path, folder: Path, pool: Pool, seconds: float, first_wait_s: float) -> list[int]:
    """Hold a run of two ranks that lost its store for so long to the straight one; returns failures by rank."""
    straight = pool.submit(2, trained_on_a_rank, str(local), folder / "straight", folder, first_wait_s)
    run = pool.submit(2, trained_on_a_rank, ADDRESS, folder / "run", folder, first_wait_s)
    until(lambda: (folder / "leave").exists() or run.done(), 120, "no update 2")
    away.leave()
    (folder / "gone").touch()
    time.sleep(seconds)
    away.come_back()
    assert [code for code, _ in (*straight.result(), *run.result())] == [0, 0, 0, 0]
    found, expected = found_by(folder / "run"), found_by(folder / "straight")
    assert len(found) >= 6
    assert found == expected
    return [failures for _, failures in run.result()]


def test_two_ranks_wait_for_their_store(away: Away, local: Path, tmp_path: Path, pool: Pool) -> None:
    """Both meet the outage, several times, and go on to the same bits."""
    failures = outage(away, local, tmp_path, pool, seconds=1.5, first_wait_s=0.05)
    assert min(failures) >= 3, failures


def test_a_run_whose_store_stays_away_saves_and_goes_on_later(
    away: Away, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, ends with the code that requeues, and when it is given again comes to the same bits."""
    assert trained(local, tmp_path / "local") == 0
    monkeypatch.setattr(store, "BLOCK_BYTES", 512)
    calls, fetch, leaves_at = [0], store.RangeReader._fetch, 5

    def fetched(self: store.RangeReader, numbers: list[int]) -> dict[int, bytes]:
        calls[0] += 1
        if calls[0] == leaves_at:
            away.leave()
        return fetch(self, numbers)

    monkeypatch.setattr(store.RangeReader, "_fetch", fetched)
    with pytest.warns(UserWarning, match="asking again"):
        assert trained(ADDRESS, tmp_path / "good", "data.store_patience_s=1") == STOP_EXIT_CODE
    away.come_back()
    assert list((tmp_path / "good" / "checkpoints").iterdir())
    assert trained(ADDRESS, tmp_path / "good") == 0
    assert calls[0] > leaves_at
    assert found_by(tmp_path / "good") == found_by(tmp_path / "local")
