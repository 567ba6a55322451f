"""The walks of docs/data.md from parquet files to a running job, each command, with a small model and little text."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaopus.__main__ import main
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.data.corpus import Corpus
from tests.arrays import arrays_here

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
LITTLE = "3000 --min-tokens 0 --per-item 0 --per-near-duplicate 0"  # text that is short, alike, and of one item
SMALL = "model=tiny model.num_layers=1 model.hidden_size=16 model.num_heads=2 data.seq_len=32 train.steps=3"
SMALL += " train.global_batch_size=4 train.micro_batch_size=4 selection.warmup_steps=1 train.eval_every=0"


def commands(heading: str) -> list[list[str]]:
    """Of the first block below a heading, those that train a large model with a small one."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].replace("\\\n", " ").splitlines() if not line.startswith("#")]
    return [shlex.split(line.replace("model=gpt2_small", SMALL).replace("2000000", LITTLE)) for line in lines]


def some_text(folder: Path) -> None:
    """Write parquet files of two topics."""
    rng = np.random.default_rng(0)
    words = {
        "science": ["cell", "light", "force", "plant", "oxygen", "star"],
        "shop": ["buy", "now", "price", "sale", "cheap", "cart"],
    }
    texts = [" ".join(rng.choice(words[topic], 60)) for topic in words for _ in range(120)]
    folder.mkdir()
    for part in range(2):
        rows = texts[part::2]
        table = pa.table(
            {"text": rows, "id": [f"{part}-{n}" for n in range(len(rows))], "score": rng.random(len(rows))}
        )
        pq.write_table(table, folder / f"{part}.parquet")


def test_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    some_text(Path("parquet"))
    asked = ("Which gas does a plant give off in light?", "What makes a star shine?", "Is light a force?")
    items = [{"query": query, "choices": ["oxygen", f"cell {n}"]} for n in range(8) for query in asked]
    Path("arc_easy.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for command in commands("From a folder of parquet files to a running job"):
        assert command[:3] == ["python", "-m", "megaopus"]
        assert main(command[3:]) == 0, capsys.readouterr().err
    corpus = Corpus.open("corpus_arc", verify=True)
    text = " ".join(corpus.texts(np.flatnonzero(corpus.split_codes == 1)))
    assert "oxygen" in text
    assert "price" not in text
    assert len(Path("runs/first/metrics.jsonl").read_text().splitlines()) >= 3
    target = re.search(
        r"target: held-out slice of (\d+) items and (\d+) documents of corpus corpus_arc", capsys.readouterr().out
    )
    assert target is not None
    assert target[0] in Path("first.html").read_text()
    assert 0 < int(target[1]) < 8
    assert int(target[2]) == (corpus.split_codes == 4).sum() > 0
    assert Path("first.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_walk_from_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The array runs here, and ``aws`` is a copy by s3fs; all else is what the page has."""
    pytest.importorskip("datatrove", reason="needs datatrove (extra scale)")
    from tests import object_store as store

    monkeypatch.chdir(tmp_path)
    some_text(Path("parquet"))
    with store.object_store(tmp_path / "cache", monkeypatch):
        store.put(Path("parquet"), "s3://bucket/crawl")
        programs = arrays_here(tmp_path / "bin", monkeypatch)
        copied = False
        for command in commands("From a bucket of parquet files to a running job"):
            if command[:4] == ["aws", "s3", "cp", "--recursive"]:
                store.put(Path(command[4]), command[5])
                Path(command[4]).rename("moved")  # so that nothing is read from here
                copied = True
            else:
                assert command[:3] == ["python", "-m", "megaopus"]
                assert main(command[3:]) == 0, capsys.readouterr().err
        assert copied
        assert "--array=0-" in (programs / "script").read_text()
        here = prepare([Source(Path("parquet"), "crawl", Fields(keep=("score",)))], tmp_path / "here")
        assert Corpus.open("s3://bucket/corpus", verify=True).fingerprint == Corpus.open(here).fingerprint
    assert len(Path("runs/first/metrics.jsonl").read_text().splitlines()) >= 3
