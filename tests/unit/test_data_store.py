"""A corpus in an object store is read as a local one is, also while the store is away for a while."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
from megaopus.data.store import Store
from megaopus.errors import ConfigError, DataError
from megaopus.training.signals import STOP_EXIT_CODE

pytest.importorskip("s3fs", reason="extra s3 is not installed")
server = pytest.importorskip("moto.server", reason="moto is not installed")
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


class Away:
    """A store that can be taken away and brought back, with what it holds."""

    def __init__(self) -> None:
        self.server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def leave(self) -> None:
        self.server.stop()

    def come_back(self) -> None:
        self.server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()


@pytest.fixture
def away(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Away]:
    """The corpus in a bucket, and an empty cache."""
    import s3fs

    there = Away()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{there.port}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(store.CACHE, str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if not system.exists("bucket"):  # what it holds outlives a server
        system.mkdir("bucket")
        system.put(str(local), ADDRESS, recursive=True)
    yield there
    there.leave()
    s3fs.S3FileSystem.clear_instance_cache()


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
    named = r"s3://bucket/books/tokens\.bin: not answered for 1 s .* last checkpoint"
    with pytest.warns(UserWarning, match="asking again"), pytest.raises(DataError, match=named):
        corpus.read(np.array([0]), np.array([40]))
    away.come_back()


def test_what_is_not_there_is_named(away: Away) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/none/manifest\.json: no such object"):
        Corpus.open("s3://bucket/none")
    with pytest.raises(ConfigError, match=r"data\.path = 's3://bucket/none': .*no such object"):
        compose(["data.path=s3://bucket/none"])


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


def test_a_run_survives_a_store_that_comes_and_goes(
    away: Away, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on after a while as if nothing had been; if not, it saves, says so, and goes on later: the same bits."""
    assert trained(local, tmp_path / "local") == 0
    monkeypatch.setattr(store, "BLOCK_BYTES", 512)
    calls, fetch = [0], store.RangeReader._fetch

    def fetched(self: store.RangeReader, numbers: list[int]) -> dict[int, bytes]:
        calls[0] += 1
        if calls[0] == leaves_at:
            away.leave()
            if comes_back:
                threading.Timer(2.0, away.come_back).start()
        return fetch(self, numbers)

    monkeypatch.setattr(store.RangeReader, "_fetch", fetched)
    leaves_at, comes_back = 4, True
    with pytest.warns(UserWarning, match="asking again"):
        assert trained(ADDRESS, tmp_path / "while") == 0
    assert calls[0] > leaves_at + 2
    assert found_by(tmp_path / "while") == found_by(tmp_path / "local")
    monkeypatch.setenv(store.CACHE, str(tmp_path / "other"))
    calls[0], leaves_at, comes_back = 0, calls[0] - 1, False
    with pytest.warns(UserWarning, match="asking again"):
        assert trained(ADDRESS, tmp_path / "good", "data.store_patience_s=1") == STOP_EXIT_CODE
    away.come_back()
    assert list((tmp_path / "good" / "checkpoints").iterdir())
    assert trained(ADDRESS, tmp_path / "good") == 0
    assert found_by(tmp_path / "good") == found_by(tmp_path / "local")
