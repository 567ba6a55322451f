"""Sources in an object store make the corpus that files of this machine make, and are read piece by piece."""

from __future__ import annotations

import gzip
import json
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaopus.cli.main import main
from megaopus.corpus_tools import pieces, remote
from megaopus.corpus_tools.pieces import pieces_of
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.readers import parquet
from megaopus.corpus_tools.remote import Remote
from megaopus.corpus_tools.sources import Source, SourceReader
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.corpus_tools.tasks.executors import Executor
from megaopus.data import store
from megaopus.data.corpus import Corpus
from megaopus.data.store import Store
from megaopus.errors import DataError, StoreDownError
from tests.object_store import Away, object_store, put, put_bytes

RULE = SplitRule(0.1, 0.1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of every kind."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"text": f"Text {n}: " + " ".join(f"w{n * k % 97}" for k in range(n % 40))} for n in range(600)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "a.jsonl").write_text("".join(lines[:500]) + "[1]\n" + "".join(lines[500:]))
    with gzip.open(folder / "g.json.gz", "wt") as stream:
        stream.write("".join(lines).replace("Text", "Other"))
    (folder / "texts").mkdir()
    for n in range(2):
        (folder / "texts" / f"t{n}.txt").write_text(f"File {n} " * 60)
    (folder / "web" / "deep").mkdir(parents=True)
    for part, name in enumerate(("web/0.parquet", "web/1.parquet", "web/deep/2.parquet")):
        texts = [f"Row {n} {part} " + "x" * (n % 50) + str(n * n) for n in range(400)]
        table = pa.table({"text": texts, "domain": ["pq"[n % 2] for n in range(400)], "unread": range(400)})
        pq.write_table(table, folder / name, row_group_size=50, compression="none")
    (folder / "web" / "README.md").write_text("about it")
    (folder / "large").mkdir()
    table = pa.table({"text": [f"Row {n} " + f"x{n} " * 300 for n in range(400)]})
    pq.write_table(table, folder / "large" / "a.parquet", row_group_size=25, compression="none", use_dictionary=False)
    return folder


@pytest.fixture
def away(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Away]:
    """The files in a bucket; blocks of few bytes."""
    import s3fs

    monkeypatch.setattr(remote, "BLOCK_BYTES", 20000)
    monkeypatch.setattr(remote, "_BEYOND_BYTES", 100)
    monkeypatch.setattr(parquet, "_HELD_BYTES", 15000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 15000)
    with object_store(tmp_path / "cache", monkeypatch) as there:
        if not s3fs.S3FileSystem().exists("bucket/files"):
            put(files, "s3://bucket/files")
        yield there


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is asked for: address, first byte, and the one after the last."""
    seen: list[tuple[str, int, int]] = []
    read = remote.read_ranges

    def noted(system: Any, address: str, starts: list[int], ends: list[int], store: Store) -> list[bytes]:
        seen.extend((address, *each) for each in zip(starts, ends, strict=True))
        return read(system, address, starts, ends, store)

    monkeypatch.setattr(remote, "read_ranges", noted)
    return seen


def sources(place: str | Path) -> list[Source]:
    names = ("a.jsonl", "g.json.gz", "texts", "web")
    return [Source.parse(f"{place}/{name}", skip_faulty=True) for name in names]


def told(corpus: Path) -> dict[str, Any]:
    """The manifest without where sources lie, and the digests of what is in a store, of its list of objects."""
    manifest = json.loads((corpus / "manifest.json").read_text().replace("s3://bucket/files", "HERE"))
    for source in manifest["sources"]:
        del source["sha256"]
    return manifest


def test_the_corpus_is_that_of_local_files(away: Away, files: Path, tmp_path: Path) -> None:
    """In one process and by tasks; every kind of file, faults that are left out, nothing left in the cache."""
    here = prepare(sources(files), tmp_path / "here", vocab_size=300, rule=RULE)
    expected = json.loads(json.dumps(told(here)).replace(str(files), "HERE"))
    assert expected["sources"][0]["left_out"]["not an object"]["count"] == 1
    assert expected["sources"][3]["skipped"] == {"metadata": 1}
    there = sources("s3://bucket/files")
    assert len(pieces_of(there)) > 8
    for name, executor in (("alone", None), ("tasks", Executor("local", 3, 1))):
        given = here / "tokenizer.json" if name == "alone" else None
        found = prepare(there, tmp_path / name, tokenizer=given, vocab_size=300, rule=RULE, executor=executor)
        assert told(found) == expected
        assert Corpus.open(found, verify=True).fingerprint == Corpus.open(here).fingerprint
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_piece_is_read_by_its_range(
    away: Away, files: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines and row groups, each byte once, and of other bytes a footer (64 KiB at first) or the rest of a line."""
    for name, most in (("a.jsonl", 25000), ("large/a.parquet", 130000)):
        monkeypatch.setattr(pieces, "PIECE_BYTES", most)
        source, size = Source.parse(f"s3://bucket/files/{name}", skip_faulty=True), (files / name).stat().st_size
        cut = pieces_of([source])
        assert len(cut) >= 2
        for piece in pickle.loads(pickle.dumps(cut)):  # as a task gets it
            (stretch,) = piece.stretches
            first, end = stretch.part.bytes if name.endswith("parquet") else stretch.part[:2]
            asked.clear()
            reader = SourceReader(source, stretches=piece.stretches)
            assert list(reader)
            inside = [each for each in asked if each[1] < end and each[2] > first]
            outside = sum(each[2] - each[1] for each in asked) - (end - first)
            assert {each[0] for each in asked} == {f"s3://bucket/files/{name}"}
            assert max(each[2] - each[1] for each in asked) <= remote.BLOCK_BYTES
            assert sum(each[2] - each[1] for each in inside) >= end - first
            assert 0 <= outside <= (70000 if name.endswith("parquet") else 500), (asked, first, end)
    assert size > 4 * 70000


def test_patterns_choose_among_the_objects(away: Away, files: Path, tmp_path: Path) -> None:
    names = {
        "web/*.parquet": ["0.parquet", "1.parquet"],
        "web/**/*.parquet": ["0.parquet", "1.parquet", "deep/2.parquet"],
        "web/*/[0-9].parquet": ["deep/2.parquet"],
        "*.json?": ["a.jsonl"],
    }
    for pattern, expected in names.items():
        source = Source.parse(f"web=s3://bucket/files/{pattern},text=text")
        assert [name for name, _ in source.files()] == expected
        assert source.domain == "web"
    source = Source.parse("s3://bucket/files/web/*.parquet")
    local = Source(files / "web", exclude=("deep",))
    assert (source.name, source.single_domain) == (local.name, local.single_domain) == ("web", "web")
    assert [each.text for each in SourceReader(source)] == [each.text for each in SourceReader(local)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s3://bucket/none", r"s3://bucket/none: no such file or folder"),
        ("s3://bucket/files/*.csv", r"s3://bucket/files/\*\.csv: no such file or folder"),
        ("s3://nobucket/x", r"s3://nobucket/x: no such object \(The specified bucket does not exist\)"),
        ("s3://bucket/files/web/README", r"no such file or folder"),
        ("s3:///x*", r"names no bucket; write s3://BUCKET/PATH"),
        ("s3://bucket/files/web/deep/nothing.xyz", "no such file or folder"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(
    given: str, said: str, away: Away, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        prepare([Source.parse(given)], tmp_path / "c", vocab_size=300)
    assert not any("c" in path.name.split(".") for path in tmp_path.iterdir())


def test_keys_that_are_missing_are_said_at_once(
    away: Away, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So are those that may not, a store that is not there, and the extra that is not installed."""
    command = ["prepare", "--source", "s3://bucket/files/web", "--out", str(tmp_path / "c")]
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        _forget()
        began = time.monotonic()
        assert main(command) == 2
        assert time.monotonic() - began < 10
        said = r"error: s3://bucket/files/web: cannot be asked for (Unable to locate credentials); check"
        assert capsys.readouterr().err.startswith(said)
    _forget()
    with monkeypatch.context() as patch:
        patch.setattr("s3fs.S3FileSystem.find", _refuse)
        assert main(command) == 2
        assert "s3://bucket/files/web: may not be read (Access Denied); give" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_LOOK_PATIENCE_S", 0.5)
        away.leave()
        assert main(command) == 2
        assert "s3://bucket/files/web: not answered for 0 s (EndpointConnectionError" in capsys.readouterr().err
        away.come_back()
    with monkeypatch.context() as patch:
        patch.setattr("fsspec.filesystem", _not_installed)
        assert main(command) == 2
        assert "pip install 'megaopus[s3]'" in capsys.readouterr().err
    assert not any("c" in path.name.split(".") for path in tmp_path.iterdir())


def _refuse(*_: Any, **__: Any) -> None:
    raise PermissionError("Access Denied")


def _not_installed(*_: Any, **__: Any) -> None:
    raise ImportError("Install s3fs to access S3")


def _forget() -> None:
    """Let the next look make its connection anew."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_comes_back_is_waited_for(
    away: Away, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stays away ends the command, which goes on from what is done when it is given again."""
    monkeypatch.setattr(store, "_FIRST_WAIT_S", 0.05)
    names = ("web",)
    local = [Source.parse(f"{files}/{name}", skip_faulty=True) for name in names]
    expected = json.loads((prepare(local, tmp_path / "h", vocab_size=300) / "manifest.json").read_text())
    read, calls, back, leaves_at = remote.read_ranges, [0], [True], 12

    def leaving(*given: Any) -> list[bytes]:
        calls[0] += 1
        if calls[0] == leaves_at:
            away.leave()
            if back[0]:
                threading.Timer(0.7, away.come_back).start()
        return read(*given)

    monkeypatch.setattr(remote, "read_ranges", leaving)
    there = [Source.parse(f"s3://bucket/files/{name}", skip_faulty=True, store=Store(patience_s=20)) for name in names]
    with pytest.warns(UserWarning, match="asking again for 20 s"):
        found = prepare(there, tmp_path / "a", vocab_size=300)
    assert calls[0] > leaves_at
    assert json.loads((found / "manifest.json").read_text())["fingerprint"] == expected["fingerprint"]
    calls[0], back[0], leaves_at = 0, False, 14
    given = [Source.parse(f"s3://bucket/files/{name}", skip_faulty=True, store=Store(patience_s=0.3)) for name in names]
    executor = Executor("local", 3, 1)
    with (
        pytest.warns(UserWarning, match="asking again"),
        pytest.raises(StoreDownError, match="the same command goes on"),
    ):
        prepare(given, tmp_path / "b", vocab_size=300, executor=executor)
    kept = sorted(path.name for path in (tmp_path / ".b.work").glob("pieces-*/read-0-*"))
    assert kept
    away.come_back()
    calls[0] = 1000
    found = prepare(given, tmp_path / "b", vocab_size=300, executor=executor)
    assert json.loads((found / "manifest.json").read_text())["fingerprint"] == expected["fingerprint"]
    assert not (tmp_path / ".b.work").exists()


def test_an_object_that_changes_is_refused(away: Away, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"text": f"some words {n} " * 9}) + "\n" for n in range(100)]
    put_bytes("".join(rows).encode(), "s3://bucket/changing.jsonl")
    place, before = "s3://bucket/changing.jsonl", Remote.parse("s3://bucket/changing.jsonl", Store()).objects[""]
    from megaopus.corpus_tools import prepare as module

    scanned = module._scanned

    def change(*given: Any) -> Any:
        found = scanned(*given)
        put_bytes("".join(rows).replace("words 7", "words 8").encode(), place)
        return found

    monkeypatch.setattr(module, "_scanned", change)
    with pytest.raises(DataError, match=r"s3://bucket/changing\.jsonl: changed while it was being read"):
        prepare([Source.parse(place)], tmp_path / "c", vocab_size=300, rule=RULE)
    after = Remote.parse(place, Store()).objects[""]
    assert (before.size, before.tag != after.tag) == (after.size, True)  # by which a work folder is known as another's
    assert store.is_address(place)
