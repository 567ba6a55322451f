"""From text to a report in seconds: prepare, check, fifty steps with selection, a kill, the same losses as ever."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megaopus.__main__ import main
from tests.exact.resume_runs import assert_same, everything, rows
from tests.faults import Interrupted, at_step, interrupt

STEPS = 50
GOLDEN = {"first": 5.703740, "last": 3.808084, "docs": 3.293402}
"""Losses of the first and the last update and the last validation; a change of one changes what every run computes."""
WORDS = {"docs": "abcdefgh", "code": "ijklmnop", "noise": "qrstuvwx"}
"""Domain -> letters of its words, so that which domain a sequence is of can be learned."""
SETTINGS = [
    "engine=cpu",
    "engine.precision=fp32",
    "data.seq_len=16",
    "data.target_domains=[docs]",
    "model.num_layers=2",
    "model.hidden_size=32",
    f"train.steps={STEPS}",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.eval_every=25",
    "train.eval_sequences=4",
    "checkpoint.every=20",
    "optim.lr=3e-3",
    "optim.warmup_steps=5",
    "selection=opus_exact",
    "selection.warmup_steps=2",
    "selection.proxy_batch_size=4",
    "selection.score_micro_batch_size=8",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty documents of each domain in words of its own letters: the same text on every machine."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(7)
    sources = []
    for domain, letters in WORDS.items():
        known = ["".join(letters[int(draw.random() * 8)] for _ in range(5)) for _ in range(40)]
        texts = [" ".join(known[int(40 * draw.random() ** 2)] for _ in range(150)) for _ in range(30)]
        path = folder / f"{domain}.jsonl"
        path.write_text(
            "".join(json.dumps({"id": f"{domain}{n}", "text": text}) + "\n" for n, text in enumerate(texts))
        )
        sources += ["--source", f"{domain}={path}"]
    split = ["--wanted", "docs", "--proxy-fraction", "0.2", "--validation-fraction", "0.2"]
    assert main(["prepare", *sources, *split, "--vocab-size", "300", "--out", str(folder / "corpus")]) == 0
    return folder / "corpus"


def command(corpus: Path, run: Path) -> list[str]:
    return ["train", *SETTINGS, f"data.path={corpus}", f"run_dir={run}"]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert main(command(corpus, run)) == 0
    return run


def test_check_says_what_the_run_is(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *command(corpus, corpus.parent / "run")[1:]]) == 0
    assert "opus" in capsys.readouterr().out
    assert not (corpus.parent / "run").exists()


def test_fifty_steps_end_at_the_losses_they_always_did(straight: Path) -> None:
    metrics = rows(straight / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if row["kind"] == "step"]
    assert len(losses) == STEPS
    (validation,) = [row for row in metrics if row["kind"] == "validation" and row["step"] == STEPS]
    found = {"first": losses[0], "last": losses[-1], "docs": validation["domains"]["docs"]}
    assert found == pytest.approx(GOLDEN, rel=1e-4)


def test_what_was_selected_is_of_the_wanted_domain_more_often(straight: Path) -> None:
    selections = rows(straight / "selection.jsonl")[2:]
    assert {row["method"] for row in selections} == {"opus"}
    shares = [(row["share"].get("docs", 0.0), row["pool_share"].get("docs", 0.0)) for row in selections]
    assert sum(picked for picked, _ in shares) > 1.1 * sum(there for _, there in shares)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(straight: Path, corpus: Path, tmp_path: Path) -> None:
    with at_step(33, interrupt), pytest.raises(Interrupted):
        main(command(corpus, tmp_path / "run"))
    assert main(command(corpus, tmp_path / "run")) == 0
    assert_same(everything(tmp_path / "run"), everything(straight))


def test_the_report_shows_and_replays_it(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(straight), "--out", str(tmp_path / "report.html")]) == 0
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", str(straight), "--replay", "all"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{STEPS} identical, 0 DIFFERENT, 0 not on record"
