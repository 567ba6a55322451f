"""The estimators and throughput benchmarks at a tiny size: their rows, and the tools below. No timing is judged."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import (
    columns,
    common,
    damage,
    estimators,
    faults,
    filters,
    gpu,
    pools,
    quality,
    selection_host,
    study,
    throughput,
)
from benchmarks.scoring import count_bytes
from megaopus.config.compose import compose
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.corpus import Corpus
from megaopus.data.run_data import RunData
from megaopus.data.sequences import Sequences
from megaopus.errors import EngineError
from megaopus.models.config import ModelConfig
from megaopus.optim.config import OptimConfig
from tests.pool import Pool

TINY = estimators.Plan(
    model=ModelConfig(num_layers=2, hidden_size=32, num_heads=4),
    seq_len=32,
    train_steps=15,
    micro_batch_size=8,
    num_candidates=16,
    proxy_batch_size=8,
    exact_timed=2,
    repeats=2,
    seeds=12,
    optimizers=(OptimConfig(name="adamw", lr=3e-3), OptimConfig(name="muon", lr=3e-3, matrix_lr=0.02)),
)
NAMES = [
    "exact",
    "exact_linear",
    "directional",
    "directional_e1",
    "directional_one_sided",
    "adjoint",
    "countsketch_8192",
    "countsketch_1024",
    "kronecker_8192",
    "raw_gradient",
    "high_ppl",
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def output(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rows.json and rows.machine.json of a tiny run of estimators.py, in a folder that it makes."""
    path = tmp_path_factory.mktemp("benchmark") / "new" / "rows.json"
    arguments = ["--json", str(path), "--corpus", str(tiny_corpus), "--threads", "1"]
    assert estimators.main(arguments, TINY) == 0
    return path


@pytest.fixture
def rows(output: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["optimizer"], row["estimator"]): row for row in json.loads(output.read_text())}


@pytest.mark.slow
def test_one_row_per_optimizer_and_estimator(rows: dict) -> None:
    assert list(rows) == [(optimizer, name) for optimizer in ("adamw", "muon") for name in NAMES]
    for row in rows.values():
        assert -1 <= row["spearman"] <= 1
        assert row["cost_ratio_low"] <= row["cost_ratio"] <= row["cost_ratio_high"]
        assert row["cost_ratio"] > 0
        assert row["floor_ratio"] == pytest.approx(row["cost_ratio"] / row["floor"])
        assert row["peak_mb"] is None or row["peak_mb"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fidelity_is_measured_against_the_oracle(rows: dict, optimizer: str) -> None:
    assert rows[optimizer, "exact"]["spearman"] == pytest.approx(1)
    assert rows[optimizer, "exact_linear"]["spearman_linear"] == pytest.approx(1)
    assert rows[optimizer, "directional"]["spearman"] > 0.99
    assert rows[optimizer, "high_ppl"]["spearman"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_countsketch_is_unbiased(rows: dict, optimizer: str) -> None:
    for name in ("countsketch_8192", "countsketch_1024"):
        assert -1 <= rows[optimizer, name]["over_seeds"] <= 1
        assert 0 < rows[optimizer, name]["bias_z"] < rows[optimizer, name]["bias_z_limit"]


@pytest.mark.slow
def test_floors_are_shares_of_a_training_step(rows: dict) -> None:
    floors = {name: rows["adamw", name]["floor"] for name in NAMES}
    assert floors["directional"] == floors["directional_one_sided"] == pytest.approx(2 / 3)
    assert floors["exact"] == floors["raw_gradient"] == 1
    assert floors["high_ppl"] == pytest.approx(1 / 3)
    # between the matrices' 4P of 6P and a whole training step, since attention's backward is activations alone
    assert floors["adjoint"] == floors["countsketch_8192"] == 1
    assert 2 / 3 < floors["kronecker_8192"] < 1


@pytest.mark.slow
def test_machine_is_recorded_beside_the_rows(output: Path) -> None:
    about = json.loads(output.with_suffix(".machine.json").read_text())
    assert about["threads"] == 1
    assert about["cores"] == os.cpu_count()
    assert about["cpu"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["commit"] is None or len(about["commit"]) == 40
    assert [each["optimizer"] for each in about["optimizers"]] == ["adamw", "muon"]
    assert all(each["proxy_cost_ratio"] > 0 and each["loss_last"] < each["loss_first"] for each in about["optimizers"])
    assert sorted(path.name for path in output.parent.iterdir()) == ["rows.json", "rows.machine.json"]


def test_every_stage_of_a_selection_has_its_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    plan = selection_host.Plan(candidates=96, picks=24, seq_len=16, window=3, proxy=4, repeats=1)
    for _ in range(2):
        assert selection_host.main(["--results", str(path)], plan) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["candidates"] for row in rows] == [96, 96]
    found = rows[0]["ms"]
    assert set(selection_host.BUDGET) < set(found)
    assert found["sum"] == pytest.approx(sum(found[stage] for stage in selection_host.BUDGET))


@pytest.mark.slow
def test_throughput_rows(tiny_corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "throughput.json"
    plan = throughput.Plan(shapes=(throughput.Shape(2, 32, 4, 32, 2),), repeats=2, steps=2)
    assert throughput.main(["--json", str(path), "--corpus", str(tiny_corpus), "--threads", "1"], plan) == 0
    (row,) = json.loads(path.read_text())
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["engine_tokens_per_s"] > 0
    assert row["reference_tokens_per_s"] > 0
    assert row["parameters"] == 2 * 12 * 32**2 + 2 * 13 * 32 + 2 * 32 + 384 * 32 + 32 * 32
    assert row["loss"] < math.log(384)


@pytest.mark.slow
def test_throughput_beside_another_checkout(tiny_corpus: Path, tmp_path: Path) -> None:
    """A copy whose engine rests before each update is slower by that; one that trains otherwise is refused."""
    other, path = tmp_path / "other", tmp_path / "rows.json"
    shutil.copytree(common.ROOT / "benchmarks", other / "benchmarks", ignore=shutil.ignore_patterns("results"))
    shutil.copytree(common.ROOT / "megaopus", other / "megaopus")
    helper = other / "benchmarks" / "common.py"
    text = helper.read_text()
    rests = "_own = MegatronEngine.prepare_update\n"
    rests += "MegatronEngine.prepare_update = lambda self: (time.sleep(0.2), _own(self))[1]\n"
    helper.write_text(text + rests)
    plan = throughput.Plan(shapes=(throughput.Shape(2, 32, 4, 32, 2),), repeats=3, steps=1)
    given = ["--json", str(path), "--corpus", str(tiny_corpus), "--threads", "1", "--against", str(other)]
    assert throughput.main(given, plan) == 0
    (row,) = json.loads(path.read_text())
    assert row["ratio"] > 2
    assert 2 * 32 / row["reference_tokens_per_s"] > 0.2
    helper.write_text(text.replace("seed=1234", "seed=4321"))
    with pytest.raises(EngineError, match=f"in {other}"):
        throughput.main(given, plan)


@pytest.mark.slow
def test_throughput_refuses_to_compare_different_work(tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = throughput.Plan(shapes=(throughput.Shape(2, 32, 4, 32, 2),), repeats=2, steps=2)
    monkeypatch.setattr(throughput.ReferenceGPT, "copy_weights", lambda self, source: None)
    with pytest.raises(EngineError, match="plain PyTorch"):
        throughput.main(["--corpus", str(tiny_corpus), "--threads", "1"], plan)


@pytest.mark.slow
def test_a_model_that_did_not_learn_is_refused(tiny_corpus: Path) -> None:
    plan = estimators.Plan(
        model=TINY.model,
        seq_len=32,
        train_steps=6,
        micro_batch_size=4,
        optimizers=(OptimConfig(name="sgd", lr=1e6, clip_grad=0),),
    )
    with pytest.raises(EngineError, match="sgd: the loss went from"):
        estimators.main(["--corpus", str(tiny_corpus), "--threads", "1"], plan)


def test_every_pass_is_timed_once_a_round_in_turning_order() -> None:
    order: list[str] = []
    passes = {name: (lambda name=name: order.append(name)) for name in "abc"}
    with common.progress(Console(quiet=True)) as bar:
        seconds = common.interleaved(passes, 2, "wall", bar, "test")
    assert "".join(order) == "abcbcacab"  # the first round only warms up
    assert [len(values) for values in seconds.values()] == [2, 2, 2]


def test_ratio_is_taken_round_by_round() -> None:
    # the machine slows down eightfold half-way: a ratio of sums or of medians would be off
    ratio = common.Ratio.of([1.0, 1.0, 8.0, 8.0, 8.0], [2.0, 2.0, 16.0, 16.0, 10.0])
    assert ratio.median == pytest.approx(0.5)
    assert ratio.low <= ratio.median <= ratio.high
    assert common.Ratio.of([1.0, 1.0], [2.0, 2.0], scale=4).median == pytest.approx(2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_counts_what_was_freed_again_and_only_that_call() -> None:
    def peak_of(megabytes: int) -> float:
        return common.peak_mb(lambda: torch.ones(megabytes * 250_000).sum()) or 0.0

    assert peak_of(200) == pytest.approx(200, abs=20)
    assert peak_of(40) == pytest.approx(40, abs=20)


def test_spearman_and_bias() -> None:
    values = torch.tensor([3.0, -1.0, 2.0, 10.0])
    assert estimators.spearman(values, values.exp()) == pytest.approx(1)
    assert estimators.spearman(values, -values) == pytest.approx(-1)
    # ranks 2, 0, 1, 3 and 0, 1, 2, 3: 1 - 6 (4 + 1 + 1 + 0) / (4 * 15)
    assert estimators.spearman(values, torch.arange(4.0)) == pytest.approx(0.4)
    noise = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    limit = estimators.chance_z(32, 16, trials=500)
    assert estimators.largest_z(noise) < limit
    assert estimators.largest_z(noise + 1.0) > limit


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    common.write_results(path, [{"a": 1}], {})
    with pytest.raises(TypeError):
        common.write_results(path, [{"a": object()}], {})
    assert json.loads(path.read_text()) == [{"a": 1}]


def test_the_cpu_clock_does_not_count_waiting() -> None:
    with common.progress(Console(quiet=True)) as bar:
        seconds = common.interleaved({"sleep": lambda: time.sleep(0.5)}, 2, "cpu", bar, "test")
    assert max(seconds["sleep"]) < 0.5


def test_what_a_selection_sends_grows_with_candidates_alone(pool: Pool) -> None:
    alone, two, more = (pool.run(ranks, count_bytes, size)[0] for ranks, size in ((1, 32), (2, 32), (2, 64)))
    assert alone["bytes_per_rank"] == alone["gradient_bytes_per_rank"] == 0
    # With them goes whether the proxy gradient is finite. A first scored step compares two lengths of the step. A rank
    # hashes half of the candidates.
    assert two["bytes_per_rank"] == 8 * (2 * (32 + 1) + 16)
    assert more["bytes_per_rank"] == 8 * (2 * (64 + 1) + 32)
    assert two["gradient_bytes_per_rank"] == more["gradient_bytes_per_rank"] > 0


def test_damaged_text_is_damaged_as_it_says() -> None:
    draw, left, right = random.Random(0), "left " * 60, "right " * 60
    lines = damage.two_columns(left, right).splitlines()
    assert len(lines) > 3
    assert all(line.startswith("left left") and line.endswith("right right") for line in lines)
    words = [f"learn{i} " for i in range(2000)]
    misread = damage.misread(words, draw)
    changed = [pair for pair in zip(words, misread, strict=True) if pair[0] != pair[1]]
    assert len(changed) / len(words) == pytest.approx(damage.MISREAD, abs=0.04)
    text = [f"{draw.randrange(30)} " for _ in range(5000)]
    known = set(zip(text, text[1:], text[2:], strict=False))
    made = damage.Trigrams([text]).text(400, draw)
    assert len(made) == 400
    assert sum(each in known for each in zip(made, made[1:], made[2:], strict=False)) > 380


def test_changed_texts_of_the_pools_keep_what_they_should() -> None:
    text = "".join(f"w{i % 50}{'abc'[i % 3]} " for i in range(600))
    words = pools.words_of(text)
    assert "".join(words) == text
    draw = random.Random(0)
    assert sorted(pools.shuffled_words(words, draw)) == sorted(words)
    blocks = pools.shuffled_blocks(words, draw)
    assert sorted(blocks) == sorted(words)
    assert blocks != words
    neighbours = set(itertools.pairwise(words))
    kept = [pair in neighbours for pair in itertools.pairwise(blocks)]
    assert sum(kept) >= len(words) * (1 - 1 / pools.BLOCK_WORDS) - 1
    repeated = pools.repeated_passages([str(i) for i in range(600)], draw)
    assert len(repeated) == 600
    assert len(set(repeated)) < 350
    ranked = pools.ranks([text])
    places = {word: place for place, word in enumerate(ranked)}
    replaced = pools.replaced_words(words, draw, ranked, places)
    changed = [(a.strip(), b.strip()) for a, b in zip(words, replaced, strict=True) if a != b]
    assert len(changed) / len(words) == pytest.approx(pools.REPLACED, abs=0.06)
    assert all(abs(places[a] - places[b]) <= max(1, pools.NEAR * places[a]) for a, b in changed)


@pytest.mark.slow
def test_filters_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On text in which foreign words and repetition are easily seen, at a size at which no model learns anything."""
    words = {"books": "abcdefgh", "french_novels": "uvwxyz", "tldr_pages": "mnop"}
    draw = random.Random(0)
    for name, letters in words.items():
        known = ["".join(draw.choices(letters, k=5)) for _ in range(200)]
        texts = [" ".join(draw.choices(known, k=600)) for _ in range(70)]
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as stream:
            stream.write("".join(json.dumps({"id": f"{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    small = ("model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "optim.warmup_steps=1")
    monkeypatch.setattr(filters, "TRAIN", (*filters.TRAIN, *small))
    path = tmp_path / "rows.json"
    arguments = ["--data", str(tmp_path), "--json", str(path), "--threads", "1", "--folder", str(tmp_path / "runs")]
    assert filters.main(arguments, filters.Plan(2, 150_000, 8, (1,))) == 0
    rows = {(row["method"], row["contamination"]): row for row in json.loads(path.read_text())}
    assert list(rows) == [(name, kind) for name in filters.METHODS for kind in filters.CONTAMINATIONS]
    assert all(0 <= row["auc"] <= 1 and row["seeds"] == 1 for row in rows.values())
    assert rows["dsir", "foreign"]["auc"] == 1
    assert rows["dsir", "boilerplate"]["auc"] == 1


def test_a_study_refuses_to_go_on_with_other_texts(tiny_corpus: Path, tmp_path: Path) -> None:
    texts = {"docs": [(str(number), f"a text of its own, number {number} of sixty") for number in range(60)]}
    pools.prepare_texts(tmp_path / "corpus", lambda: texts, SplitRule(0.2, 0.2, ("docs",)), vocab_size=300)
    copy = shutil.copytree(tiny_corpus, tmp_path / "copy")
    first, same, other = (
        study.task("arm", "arm/1", [f"data.path={path}", "data.target_domains=[docs]", "data.seq_len=16"], {})
        for path in (tiny_corpus, copy, tmp_path / "corpus")
    )
    assert first.key == same.key == other.key
    results = study.Results(tmp_path / "rows.jsonl")
    study.refuse_other_corpora([first, other], results)
    results.add(first.key, {"corpora": first.corpora})
    study.refuse_other_corpora([first, same], results)
    with pytest.raises(SystemExit, match="of other corpora"):
        study.refuse_other_corpora([first, other], results)


def test_area_under_the_curve_counts_ties_half() -> None:
    better, worse = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0])
    assert filters.area(better, worse) == pytest.approx((1 + 0 + 1 + 0.5 + 1 + 1) / 6)


SMALL = [text for text in columns.REFERENCE if not text.startswith("optim.warmup")]
SMALL += ["train.steps=2", "optim.warmup_steps=0", "data.seq_len=32", "model.hidden_size=48"]


@pytest.mark.slow
def test_columns_of_the_quality_study_are_made_once(tiny_corpus: Path, tmp_path: Path) -> None:
    place = tmp_path / "corpus"
    place.symlink_to(tiny_corpus)
    corpus = Corpus.open(place)
    for name in quality.FILTERS:
        columns.ensure_column(corpus, name, reference=SMALL)
        made = (tmp_path / "corpus.scores" / name / "column.json").stat().st_mtime_ns
        columns.ensure_column(corpus, name, reference=SMALL)
        assert (tmp_path / "corpus.scores" / name / "column.json").stat().st_mtime_ns == made
        config = compose([f"data.path={place}", "data.seq_len=32", *quality.FILTERS[name]])
        assert 0 < len(RunData.open(config.data, config.data_needs()).pool) < len(Sequences(corpus, "pool", 32)) / 3


UNDER_FAULTS = """
import sys
from pathlib import Path
from benchmarks.faulty_run import Fault, launch, settings
corpus, run_dir = map(Path, sys.argv[1:])
overrides = [*settings(corpus, run_dir, []), "data.seq_len=16"]
ran = launch(overrides, 1, Fault("SIGTERM", "train", 16, 0, 0.0), run_dir)
sys.exit(None if (ran.codes, ran.fired, ran.first, ran.last) == ([143], True, 0, 16) else f"{ran}")
"""


@pytest.mark.slow
def test_a_start_under_faults_leaves_a_line_an_update(tiny_corpus: Path, tmp_path: Path) -> None:
    """The bad updates are skipped, and the signal stops it. In a process of its own: it forks."""
    command = [sys.executable, "-c", UNDER_FAULTS, str(tiny_corpus), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "batches").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(17))
    assert [line["step"] for line in lines if line["skipped"]] == [5, 9, 14]


def test_faults_are_summed_up() -> None:
    good = {"finished": True, "same": True, "wrong_ids": 0, "goodput": 0.5, "naive_goodput": 0.25, "background": False}
    rows = [
        {**good, "episode": 0, "kind": "SIGTERM", "handled": True, "lost_steps": 0},
        {**good, "episode": 0, "kind": "deleted file", "handled": False, "lost_steps": None},
        {**good, "episode": 1, "kind": "SIGTERM", "handled": True, "lost_steps": 3, "same": False, "wrong_ids": 2},
        {**good, "episode": 2, "kind": "SIGSTOP", "handled": True, "lost_steps": 7, "background": True},
    ]
    found = faults.summary(rows)
    assert (found["injected"], found["recovered"]) == (4 + 9, 2 + 6)
    assert (found["undetected_corruptions"], found["wrong_ids"]) == (1, 2)
    assert (found["max_lost_steps"], found["max_lost_steps_background"], found["save_interval"]) == (3, 7, 4)
    assert (found["goodput"], found["naive_goodput"], found["episodes"]) == (0.5, 0.25, 3)
    assert found["by_kind"]["SIGTERM"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure on")
def test_gpus_are_not_measured_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.json"
    assert gpu.main(["--json", str(rows)]) == 2
    assert "torch sees no CUDA device here, so nothing can be measured: use --fake" in capsys.readouterr().out
    assert not rows.exists()
