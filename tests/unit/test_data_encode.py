"""prepare by workers and in chunks: the same corpus as in one go, and nothing finished is done again after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megaopus.corpus_tools import encode
from megaopus.corpus_tools import prepare as prepare_module
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import Corpus
from megaopus.errors import DataError

RULE = SplitRule(0.1, 0.1)
FEW = 4000
"""Characters of a chunk here, so that there are many."""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    rows = [{"id": f"d{i}", "text": f"Document {i}. " + f"word{i % 13} " * (i % 40)} for i in range(400)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path)


@pytest.fixture
def whole(source: Source, tmp_path: Path) -> str:
    """Fingerprint of the corpus made in one chunk."""
    return Corpus.open(prepare([source], tmp_path / "whole", vocab_size=300, rule=RULE), verify=True).fingerprint


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", FEW)
    monkeypatch.setattr(prepare_module, "CHUNK_CHARACTERS", FEW)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_corpus_does_not_depend_on_chunks_and_workers(
    source: Source, whole: str, tmp_path: Path, workers: int
) -> None:
    out = prepare([source], tmp_path / "c", vocab_size=300, rule=RULE, workers=workers)
    assert Corpus.open(out, verify=True).fingerprint == whole
    assert not (tmp_path / ".c.work").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from megaopus.corpus_tools import encode
from megaopus.corpus_tools import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split import SplitRule
encode.CHUNK_CHARACTERS = prepare.CHUNK_CHARACTERS = {few}
whole = encode.runs
def cut(entries, characters):
    for number, part in enumerate(whole(entries, characters)):
        if number == 8 and characters == encode.CHUNK_CHARACTERS:
            os.kill(os.getpid(), signal.SIGKILL)
        yield part
encode.runs = cut
prepare.prepare([Source(Path(sys.argv[1]))], sys.argv[2], vocab_size=300, rule=SplitRule(0.1, 0.1), workers={workers})
"""


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(source: Source, whole: str, tmp_path: Path, workers: int) -> None:
    script = KILLED.format(few=FEW, workers=workers)
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "killed.py").write_text(f"if __name__ == '__main__':\n{indented(script)}")
    command = [sys.executable, str(tmp_path / "killed.py"), str(source.path), str(tmp_path / "c")]
    ended = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "c").exists()
    work = tmp_path / ".c.work"
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("chunk-*.rows")}
    assert 8 - 2 * workers <= len(done) <= 8
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    seen: dict[str, int] = {}
    join = prepare_module._join

    def look(folder: Path, parts: list[encode.Chunk], *more: object) -> object:
        seen.update({part.rows.name: part.rows.stat().st_mtime_ns for part in parts})
        return join(folder, parts, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_join", look)
        out = prepare([source], tmp_path / "c", vocab_size=300, rule=RULE, workers=1, console=console)
    assert Corpus.open(out, verify=True).fingerprint == whole
    assert f"going on from what a run that was stopped left in {work}" in console.export_text()
    assert {name: seen[name] for name in done} == done
    assert len(seen) > len(done)
    assert not work.exists()


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


@pytest.mark.usefixtures("short")
def test_an_interrupted_run_is_kept_and_one_of_other_settings_starts_anew(
    source: Source, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "c", vocab_size=300, rule=RULE)
    work = tmp_path / ".c.work"
    assert len(list(work.glob("chunk-*.rows"))) > 8
    other = prepare([source], tmp_path / "c", vocab_size=280, rule=RULE)
    assert Corpus.open(other, verify=True).vocab_size == 280
    assert not work.exists()
    assert Corpus.open(tmp_path / "whole").fingerprint == whole


@pytest.mark.usefixtures("short")
def test_a_source_that_was_touched_starts_anew(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_join", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "c", vocab_size=300, rule=RULE)
    with source.path.open("a") as stream:
        stream.write('{"text": "one more", "id": "new"}\n')
    assert "new" in Corpus.open(prepare([source], tmp_path / "c", vocab_size=300, rule=RULE), verify=True).ids


@pytest.mark.usefixtures("short")
def test_a_worker_that_dies_is_said_and_what_is_finished_is_kept(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_work", die)
    with pytest.raises(DataError, match=r"a worker process died while it tokenised.*fewer --workers"):
        prepare([source], tmp_path / "c", vocab_size=300, rule=RULE, workers=2)
    assert not (tmp_path / "c").exists()
    assert (tmp_path / ".c.work" / "scan.npz").exists()
    with pytest.raises(DataError, match="workers = 0: must be at least 1"):
        prepare([source], tmp_path / "c", vocab_size=300, rule=RULE, workers=0)


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
