"""A run starts from a process that no launcher started, with every engine; what it cannot write it says beforehand."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaopus.__main__ import main
from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.cli import demo
from megaopus.cli import main as command_line
from megaopus.cli.main import verbs
from megaopus.config.run_config import SETTINGS
from megaopus.corpus_tools.workers import worker_pool
from megaopus.distributed.launcher import VARIABLES
from megaopus.engine.registry import ENGINES
from megaopus.errors import CheckpointError, DataError
from megaopus.record.parquet import ChoiceSink
from megaopus.record.sinks import METRICS_FILE, JsonlSink, read_rows
from megaopus.training.signals import INTERRUPT_EXIT_CODE, STOP_EXIT_CODE
from tests import forks
from tests.exact.resume_runs import settings, snapshot, train
from tests.unit.test_candidate_table import table_of


def start_bare(overrides: list[str]) -> int:
    assert not set(VARIABLES) & set(os.environ)
    status = main(["train", *overrides])
    assert not set(VARIABLES) & set(os.environ)
    return status


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_starts_without_a_launcher(engine: str, tiny_corpus: Path, tmp_path: Path) -> None:
    layers = ["logging.layer_grad_norm_every=2"]
    overrides = settings(tiny_corpus, tmp_path, "train.steps=2", f"engine.name={engine}", *layers)
    done = forks.call(start_bare, overrides)
    assert done.returncode == 0, done.stderr
    assert len(complete_checkpoints(tmp_path)) == 1
    first, second = (row for _, _, row in read_rows(tmp_path / METRICS_FILE) if row["kind"] == "step")
    assert {"embedding", "layers.0", "head"} < set(first["layer_grad_norms"])
    assert math.hypot(*first["layer_grad_norms"].values()) == pytest.approx(first["grad_norm"], rel=1e-5)
    assert second["layer_grad_norms"] is None


# -- paths -----------------------------------------------------------------------------------------------------------


def test_every_path_setting_says_which_addresses_it_takes() -> None:
    named = {key for key in SETTINGS if key.endswith(("path", "_dir"))}
    assert {"run_dir", "data.path", "data.text_features_path"} <= named
    assert [key for key in named if SETTINGS[key].known.schemes is None] == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run_dir=s3://bucket/run", "run_dir = 's3://bucket/run': is an address (s3://), and only paths"),
        ("run_dir=file:///runs/one", "-> name /runs/one"),
        ("data.path=gs://bucket/corpus", "data.path = 'gs://bucket/corpus': is an address (gs://)"),
        ("data.validation_path=hf://x/y", "data.validation_path = 'hf://x/y': is an address (hf://)"),
        ("resume=S3://bucket/run", "resume = 'S3://bucket/run': is an address (S3://)"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_an_address_is_refused_before_anything_runs(
    verb: str, override: str, said: str, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, *settings(tiny_corpus, tmp_path / "run", override)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 1 problem in the configuration (nothing was written):")
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "prepare --demo --out s3://b/c",
        "demo --out s3://b/c",
        "demo --real --model s3://b/m",
        "report s3://b/run",
        "score --corpus s3://b/c --method dsir",
        "prepare --demo --out c --tokenizer s3://b/t",
        "score --corpus c --method perplexity --model s3://b/m",
        "proxy --corpus c --items i --tokens 9 --out p --encoder s3://b/m",
    ],
)
def test_an_address_on_the_command_line_is_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert "is an address (s3://), and only paths of this machine's file system" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        ("prepare --out c --source", "az://b/docs.jsonl"),
        ("prepare --out c --source", "docs=gs://b/docs.jsonl,text=body"),
        ("prepare --out c --source", "hf://datasets/x/y"),
        ("proxy --corpus c --tokens 9 --out p --items", "https://host/items.jsonl"),
    ],
)
def test_a_source_that_is_an_address_is_refused(
    arguments: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments.split(), source]) == 2
    scheme = source.split("://")[0].split("=")[-1]
    said = f"error: source {source}: is an address ({scheme}://), and only paths of this machine's file system"
    assert capsys.readouterr().err.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_sources_of_a_data_config_are_no_addresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "far.yaml").write_text("prepare:\n  sources: [here, 'web=gs://b/c']\n  on_error: explode\n")
    assert main(["prepare", "--config-dir", str(tmp_path), "--data", "far", "--out", str(tmp_path / "c")]) == 2
    err = capsys.readouterr().err
    assert "data.prepare.sources = ['here', 'web=gs://b/c']: web=gs://b/c is an address (gs://), and only paths" in err
    assert "-> write hf:NAME for a data set of the hub; copy anything else here" in err
    assert "data.prepare.on_error = 'explode': unknown choice" in err


# -- disks -----------------------------------------------------------------------------------------------------------

FREE = "megaopus.fs.shutil.disk_usage"


def test_a_disk_that_is_too_small_is_foreseen(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """38,272 parameters, 12 bytes each, in two layers: three checkpoints at a time with checkpoint.keep=2."""
    size, free = 38_272 * 12 + (3 << 16), [0]
    monkeypatch.setattr(FREE, lambda path: SimpleNamespace(free=free[0]))
    overrides = settings(tiny_corpus, tmp_path / "a" / "run", "train.steps=9", "checkpoint.every=3")
    record = 9 * 1024 + 9 * 8 * 17
    free[0] = 3 * size + record - 1
    said = f"{3 * size + record:,} bytes are needed, {free[0]:,} are free: "
    said += f"about {record:,} for the record, {size:,} for each of 3 more checkpoint(s)"
    with pytest.raises(CheckpointError, match=re.escape(said) + r".*smaller checkpoint\.keep \(nothing was written\)"):
        train(overrides)
    assert list(tmp_path.iterdir()) == []
    free[0] = size + record  # saved by time, it may end before the second checkpoint
    assert train([*overrides, "checkpoint.every=15m"]) == 0
    assert "WARNING" in (out := capsys.readouterr().out)
    assert f"{3 * size + record:,} bytes are needed, {free[0]:,} are free" in out
    (saved,) = complete_checkpoints(tmp_path / "a" / "run")
    assert sum(path.stat().st_size for path in saved.rglob("*")) == pytest.approx(size, rel=0.1)


def test_a_record_that_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FREE, lambda path: SimpleNamespace(free=7))
    metrics = JsonlSink(Path("/dev/full"))
    said = r"/dev/full: cannot be written .*; the disk is full: 11 bytes are needed, 7 bytes are free; mend that"
    with pytest.raises(DataError, match=said):
        metrics.write({"step": 1})
    metrics.close()

    def refused(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megaopus.record.parquet.pq.write_table", refused)
    choices = ChoiceSink(tmp_path)
    choices.add(0, table_of())
    with pytest.raises(
        DataError, match=r"part-00000000\.parquet: cannot be written .*bytes are needed, 7 bytes are free"
    ):
        choices.flush()


# -- nothing was written ---------------------------------------------------------------------------------------------


def test_a_run_that_is_refused_has_written_no_text_features(tiny_corpus: Path, tmp_path: Path) -> None:
    """They lie beside the corpus, and were computed before the checkpoint was looked at."""
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    assert train(settings(corpus, tmp_path / "run", "train.steps=1")) == 0
    before = snapshot(tmp_path)
    chosen = ["selection=opus_cascade", "selection.proxy_batch_size=4", "selection.warmup_steps=0", "train.steps=1"]
    with pytest.raises(CheckpointError, match=r"\(nothing was written\)"):
        train(settings(corpus, tmp_path / "run", *chosen))
    assert snapshot(tmp_path) == before


def test_wandb_that_is_missing_is_told_before(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", *settings(tiny_corpus, tmp_path / "run", "logging.wandb=offline")]) == 2
    assert "(nothing was written):\n  1. logging.wandb = 'offline': the package wandb is not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_ends_with_one_line(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    stub = SimpleNamespace(DESCRIPTION="", EXAMPLES="", add_arguments=lambda parser: None, run=interrupted)
    monkeypatch.setattr(command_line, "verb_module", lambda name: stub)
    assert main([verb]) == INTERRUPT_EXIT_CODE == 130
    assert capsys.readouterr() == ("", f"\n{verb}: stopped by Ctrl-C\n")


def interrupt_workers() -> None:
    os.setsid()
    pool = worker_pool(1, print)
    pool.submit(os.getpid).result()
    try:
        threading.Timer(0.1, os.killpg, [0, signal.SIGINT]).start()
        threading.Event().wait()
    except KeyboardInterrupt:
        assert pool.submit(os.getpid).result()  # it is the parent that ends them
        pool.shutdown()


def test_workers_leave_an_interrupt_to_their_parent() -> None:
    done = forks.call(interrupt_workers)
    assert (done.returncode, done.stderr) == (0, "")


SAVES = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: (time.sleep(.3), sys.exit(143))); "
SAVES += "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
"""Saves in 0.3 seconds if it is asked to; as a terminal does, Ctrl-C reaches the parent too."""


def call_and_interrupt() -> int:
    return demo.call([sys.executable, "-S", "-c", SAVES])


def test_the_demo_lets_training_save() -> None:
    assert forks.call(call_and_interrupt).returncode == STOP_EXIT_CODE
