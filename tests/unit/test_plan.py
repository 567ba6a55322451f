"""The verb plan: its layouts, their seconds and memory, what it says and refuses; and the verdict of check."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan as benchmark
from megaopus.cli import _plan_layouts
from megaopus.cli.main import main
from megaopus.config.compose import compose
from megaopus.config.run_config import RunConfig
from megaopus.distributed.mesh import MeshShape
from megaopus.errors import DataError
from megaopus.models.flops import training_flops_per_token
from megaopus.planning import calibration, machine
from megaopus.planning.calibration import Measured
from megaopus.planning.layouts import Job, Layout, allowed, closest, fastest, rank_peak
from megaopus.planning.machine import Machine, parse_memory, verdict
from megaopus.planning.scorer_cost import online
from megaopus.planning.search import Search
from megaopus.planning.step_time import WorkCounter, tokens_per_step
from megaopus.planning.whole_run import WholeRun
from megaopus.timed_layouts import Timing, _timed, time_layouts
from tests.pool import Pool

VOCAB = 50257
XL = ["model=gpt2_medium", "model.vocab_size=50257", "train.global_batch_size=512"]


def job(*overrides: str, gpus: int = 16, memory: int | None = None, kept: frozenset[str] = frozenset()) -> Job:
    config = compose(["data.path=CORPUS", "train.micro_batch_size=1", *overrides], corpora=False)
    return Job(config, VOCAB, gpus, min(8, gpus), "bf16", "cuda", memory, kept)


def work(config: RunConfig, ranks: int, device: str = "cuda", per_node: int = 8) -> Any:
    return WorkCounter(VOCAB, ranks, "bf16", device, per_node).count(config)


# -- work and seconds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", ["", "parallel.tp=4", "parallel.pp=4", "parallel.cp=2", "parallel.pp=2 parallel.vpp=4"]
)
def test_the_ranks_together_make_training_s_flops(settings: str) -> None:
    config = job(*XL, *settings.split()).config
    found = work(config, 8)
    per_stage = 8 // config.parallel.pp
    made = found.micro_batches * per_stage * sum(stage.flops for stage in found.stages)
    expected = training_flops_per_token(config.model, VOCAB, config.data.seq_len) * tokens_per_step(config)
    assert made == pytest.approx(expected)
    config.engine.recompute = True
    head = 6 * 50304 * config.model.hidden_size * tokens_per_step(config)
    again = work(config, 8)
    assert again.micro_batches * per_stage * sum(stage.flops for stage in again.stages) == pytest.approx(
        expected + (expected - head) / 3
    )


def test_experts_count_as_often_as_a_token_uses_them() -> None:
    config = job("model=moe_tiny", "parallel.ep=4").config
    found = work(config, 4)
    expected = training_flops_per_token(config.model, VOCAB, config.data.seq_len) * tokens_per_step(config)
    assert 4 * found.micro_batches * found.stages[0].flops == pytest.approx(expected)
    assert found.stages[0].inside > 0  # tokens on their way to other ranks' experts


def test_a_pipeline_idles_as_its_formula_says() -> None:
    even = Machine(
        flop_s=0, pass_s=1, number_s=0, update_s=0, inside_s=0, between_s=0, message_s=0, told="passes take a second"
    )
    for vpp in (1, 2):
        config = job(*XL, "parallel.pp=4", f"parallel.vpp={vpp}", "train.global_batch_size=16").config
        found = work(config, 4)
        passes = 2 * config.model.num_layers / 4
        assert found.training(even) == pytest.approx(passes * 16 * (1 + 3 / (16 * vpp)))
        assert found.idle(even) == pytest.approx(1 - 1 / (1 + 3 / (16 * vpp)))
        shared = replace(even, cores=1)  # what waits leaves its core to another
        assert found.training(shared) == pytest.approx(passes * 16 * 4)


def test_messages_are_those_of_the_groups() -> None:
    """By hand: two sums of the stream in each direction and layer; gradients in fp32, over the adapters of a node."""
    config = job(*XL, "parallel.tp=2").config
    found = work(config, 16)
    stream, layers = 2 * config.data.seq_len * config.model.hidden_size, config.model.num_layers
    at_the_end = 2 * stream + 3 * 4 * config.data.seq_len  # of embedding and output layer
    assert found.stages[0].inside == pytest.approx(4 * layers * stream + at_the_end)
    assert found.stages[0].between == 0
    numbers = WorkCounter(VOCAB, 16, "bf16", "cuda", 8).count(config).update[0].numbers
    assert found.reduced[0].between == pytest.approx(2 * 7 / 8 * 4 * numbers / 4)  # 4 of a group's ranks on a node
    config.parallel.distributed_optimizer = True
    sharded = work(config, 16)
    assert sharded.reduced[0].between + sharded.update[0].between == pytest.approx(7 / 8 * 6 * numbers / 4)
    assert sharded.update[0].numbers == pytest.approx(numbers / 8)


def test_selection_takes_omega_in_the_steps_that_select() -> None:
    config = job(*XL, "selection=opus", "selection.warmup_steps=250").config
    found, device = work(config, 8), machine.gpu()
    uniform = work(job(*XL, "selection=uniform").config, 8)
    only = replace(device, number_s=0, update_s=0, inside_s=0, between_s=0, message_s=0)
    assert found.seconds(only) == pytest.approx(uniform.seconds(only) * (1 + 0.75 * online(config).omega))


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_every_layout_is_allowed_and_none_is_missing() -> None:
    planned = job("model=tiny", "train.global_batch_size=8", gpus=4)
    refused: Counter[str] = Counter()
    found = allowed(planned, refused)
    layouts = {each.layout for each in found}
    assert len(layouts) == len(found)
    for each in found[::25]:
        settings = [f"{key}={str(value).lower()}" for key, value in each.layout.settings().items()]
        compose(["data.path=CORPUS", "model=tiny", "train.global_batch_size=8", *settings], None, 4, corpora=False)
    kinds = {(each.tp, each.pp, each.cp) for each in layouts}
    assert kinds == {
        (tp, pp, 1) for tp in (1, 2, 4) for pp in (1, 2, 4) if tp * pp <= 4
    }  # cp: a part of less than 1024 positions is not tried
    assert {each.vpp for each in layouts if each.pp == 2} == {1, 2}
    assert {each.micro_batch_size for each in layouts if (each.tp, each.pp) == (1, 1)} == {1, 2}
    assert refused["train.global_batch_size"] > 0  # chunks need a multiple of pp micro-batches


def test_what_is_fixed_stays() -> None:
    planned = job(*XL, "parallel.tp=2", "engine.recompute=true", kept=frozenset({"tp", "recompute"}))
    assert {(each.layout.tp, each.layout.recompute) for each in allowed(planned, Counter())} == {(2, True)}


def test_what_the_engine_or_the_optimizer_refuses_is_left_out() -> None:
    refused: Counter[str] = Counter()
    muon = allowed(job(*XL, "optim=muon"), refused)
    assert not any(each.layout.distributed_optimizer for each in muon)
    assert refused["parallel.distributed_optimizer"] > 0
    deepspeed = allowed(job(*XL, "engine=deepspeed"), Counter())
    assert {(each.layout.pp, each.layout.cp) for each in deepspeed} == {(1, 1)}


def test_the_fastest_come_first_and_fit() -> None:
    planned = job(*XL, memory=int(6e9))
    candidates, device = allowed(planned, Counter()), machine.gpu()
    choices, without = fastest(planned, candidates, lambda each: each.work.seconds(device), 5)
    speeds = [choice.candidate.speed(device) for choice in choices]
    assert speeds == sorted(speeds, reverse=True)
    assert without > 0
    assert all(choice.peak <= planned.memory for choice in choices)  # type: ignore[operator]
    slower = {choice.candidate.layout for choice in choices}
    for each in candidates:
        if each.speed(device) > speeds[-1] and each.layout not in slower:
            assert rank_peak(planned, each.config)[0] > 6e9


def test_where_nothing_fits_the_smallest_says_by_how_much() -> None:
    planned = job(*XL, memory=int(1.2e9), gpus=4)
    candidates = allowed(planned, Counter())
    miss = closest(planned, candidates)
    assert miss is not None
    assert miss.peak == min(rank_peak(planned, each.config)[0] for each in candidates)
    assert miss.largest[0][1] <= miss.peak
    assert closest(replace(planned, memory=miss.peak), candidates) is None


# -- calibration -------------------------------------------------------------------------------------------------------


TRUE = replace(machine.cpu(2), flop_s=8e-12, pass_s=4e-3, number_s=2e-8, update_s=0.05, message_s=1e-3, inside_s=3e-9)


def small() -> Job:
    settings = ["model=tiny", "engine=cpu", "selection=uniform", "train.global_batch_size=16", "data.seq_len=256"]
    config = compose(["data.path=CORPUS", "train.micro_batch_size=1", *settings], corpora=False)
    return Job(config, 5000, 2, 2, "fp32", "cpu", None)


def test_a_plan_that_times_few_layouts_knows_the_others() -> None:
    """Steps of a machine unlike the assumed one, up to 2 % of noise: the choice, and the seconds of all layouts."""
    planned = small()
    candidates = allowed(planned, Counter())
    timings = {}
    for number, each in enumerate(candidates):
        noise = 1 + 0.02 * ((number * 7919) % 101 / 50 - 1)
        timings[each.layout] = Measured(
            layout=each.layout.told(2), training_s=noise * each.work.training(TRUE), selection_s=0.0
        )
    row = benchmark.played(planned, candidates, timings, cores=2)
    assert row["timed"] <= 7 + 2 * 3 < row["layouts"] / 3
    assert row["ratio"] <= 1.10
    assert row["place"] <= 3
    assert row["error_max"] < 0.25
    # without a calibration it does not
    assumed = [each.work.seconds(machine.cpu(2)) / timings[each.layout].step_s - 1 for each in candidates]
    assert max(map(abs, assumed)) > 0.25


def test_what_failed_is_not_chosen() -> None:
    planned = small()
    search = Search(planned, allowed(planned, Counter()), machine.cpu(2))
    first = search.best(1)[0][0].candidate.layout

    def timer(chosen: Any) -> dict[Layout, Measured]:
        timed = {each.layout: each.work.training(TRUE) for each in chosen if each.layout != first}
        return {at: Measured(layout="", training_s=seconds, selection_s=0.0) for at, seconds in timed.items()}

    search.measure(timer)
    assert first in search.failed
    assert first not in {choice.candidate.layout for choice in search.best(len(search.candidates))[0]}


def test_a_calibration_is_kept_and_a_broken_one_named(tmp_path: Path) -> None:
    planned, path = small(), tmp_path / "runs" / "calibration.json"
    rows = [
        (each.work, Measured(layout="", training_s=each.work.training(TRUE), selection_s=0.0))
        for each in allowed(planned, Counter())[::9]
    ]
    about: dict[str, Any] = {"device": "a CPU", "ranks": 2, "parameters": 7, "precision": "fp32"}
    made = calibration.calibrate(machine.cpu(2), rows, **about)
    assert made.error < 0.02
    calibration.save(made, path)
    assert calibration.load(path) == made
    assert calibration.load(tmp_path / "none.json") is None
    for broken in ("{", json.dumps({**json.loads(path.read_text()), "version": 9}), "[]"):
        path.write_text(broken)
        with pytest.raises(DataError, match=f"{path}.*remove it, or name another with --calibration"):
            calibration.load(path)


# -- the verb ----------------------------------------------------------------------------------------------------------


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["plan", *arguments]) == status
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines()[:40]), default=0) <= 400
    return out if status != 2 or out else err


def test_a_plan_without_a_corpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = ["--calibration", str(tmp_path / "none.json")]
    out = plan(capsys, *XL, "selection=opus", "--gpus", "8", "--memory", "80GB", "--top", "3", *kept)
    table = [line for line in out.splitlines() if line.startswith(("┃", "│", "┏", "└"))]
    assert max(map(len, table)) <= 100
    assert "unknown without a corpus: tell its size with --pool-tokens" in out
    assert "ASSUMED, not measured: 396 TFLOP/s" in out
    command = shlex.split(out.splitlines()[-1])
    at = command.index("train")
    assert "data.path=CORPUS" in command
    compose(command[at + 1 :], None, 8, corpora=False)  # what it prints starts
    assert "omega" in out
    told = plan(capsys, *XL, "selection=opus", "--gpus", "8", "--pool-tokens", "10M", *kept)
    assert "epochs of the pool" in told
    assert "WARNING in 1,000 steps" in told
    assert "selection.guards.exposure_cap = 1" in told


def test_a_plan_of_a_corpus(tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model=tiny", "engine=cpu", f"data.path={tiny_corpus}", "train.epochs=2", "data.seq_len=64"]
    out = plan(capsys, *given, "--gpus", "2", "--calibration", str(tmp_path / "none.json"))
    assert "2.0" in next(line for line in out.splitlines() if "epochs of the pool" in line)
    assert "rank-hours" in out
    assert "ASSUMED, not measured: 35 GFLOP/s of a core" in out


def test_where_nothing_fits_it_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, *XL, "--gpus", "2", "--memory", "3GB", status=2)
    assert "nothing fits: the smallest, " in out
    assert "too much" in out
    assert "--gpus 4, the fewest of twice, four times" in out
    none = plan(capsys, "model=tiny", "model.vocab_size=300", "--gpus", "7", "train.global_batch_size=16", status=2)
    assert "no layout on 7 ranks is allowed" in none


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "0: not a whole number above 0"),
        (["--gpus", "8", "--memory", "80"], "80: not a size of memory, as 80GB"),
        (["--gpus", "8", "--mfu", "40"], "40: not a share"),
        (["--gpus", "8", "--days", "5"], "--days is about failures: give --mtbf HOURS too"),
        (
            ["--gpus", "8", "--measure", "--no-corpora"],
            "--measure trains, on a corpus that is here: leave --no-corpora out",
        ),
        (
            ["--gpus", "8", "--mtbf", "9", "--days", "9"],
            "without the settings of a run --mtbf needs --checkpoint-seconds",
        ),
    ],
)
def test_bad_options_end_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_what_no_layout_makes_right_is_told_as_by_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no corpus says how many tokens" in plan(capsys, "model=gpt2_medium", "--gpus", "8", status=2)
    assert "did you mean model=gpt2_xl?" in plan(capsys, "model=gpt2-xl", "--gpus", "8", status=2)
    said = plan(capsys, *XL, "train.epochs=2", "--gpus", "8", status=2)
    assert "no corpus says how long an epoch is" in said
    said = plan(capsys, "data.path=/nowhere", "--gpus", "8", status=2)
    assert "no such folder" in said


def test_gpus_that_are_not_here_are_not_timed(tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, *XL, f"data.path={tiny_corpus}", "--gpus", "4096", "parallel.tp=8", "--measure", status=2)
    assert "--measure needs the 4096 GPUs of the plan" in said


def test_measure_chooses_what_was_timed(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its timings are made up here; the next case times a real one."""
    asked: list[list[str]] = []

    def made_up(runs: list[list[str]], config_dir: object, ranks: int, done: Any) -> list[Timing]:
        asked.extend(runs)
        return [
            Timing(failed="no memory") if "parallel.tp=2" in run else Timing(1.0 + len(asked), 0.25) for run in runs
        ]

    monkeypatch.setattr("megaopus.timed_layouts.time_layouts", made_up)
    path = tmp_path / "calibration.json"
    given = ["model=tiny", "engine=cpu", f"data.path={tiny_corpus}", "data.seq_len=64", "selection=opus"]
    out = plan(capsys, *given, "--gpus", "2", "--measure", "--calibration", str(path), "data.target_domains=[docs]")
    assert f"calibration: {path}" in out
    assert "tp2" in next(line for line in out.splitlines() if line.startswith("WARNING"))
    assert "* measured here" in out
    assert "chosen: " in out
    assert calibration.load(path) is not None
    again = plan(capsys, *given, "--gpus", "2", "--calibration", str(path), "data.target_domains=[docs]")
    assert "seconds: measured on" in again
    assert _plan_layouts.device_name("cpu") in again


def short(corpus: Path) -> list[str]:
    given = ["model=tiny", "model.num_layers=2", "engine=cpu", f"data.path={corpus}", "data.seq_len=32"]
    return [*given, "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=6", "optim.warmup_steps=1"]


def test_steps_of_a_layout_are_timed(tiny_corpus: Path, pool: Pool, tmp_path: Path) -> None:
    """By the CPU seconds of both ranks, of which choosing is a part; nothing is written."""
    selects = ["selection=opus", "selection.proxy_batch_size=4", "data.target_domains=[docs]", "parallel.pp=2"]
    overrides = [*short(tiny_corpus), *selects, f"run_dir={tmp_path}"]
    rows = pool.run(2, _timed, overrides, None, "cpu")
    assert rows[0] == rows[1]
    assert 0 < rows[0].selection_s < rows[0].step_s < 60
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_layouts_are_timed_in_ranks_of_their_own_and_what_fails_is_told(tiny_corpus: Path) -> None:
    done: list[int] = []
    uniform = [*short(tiny_corpus), "selection=uniform"]
    runs = [[*uniform, "parallel.pp=2"], [*uniform, "parallel.tp=2"], [*uniform, "parallel.tp=3"]]
    pipeline, tensor, refused = time_layouts(runs, None, 2, done.append)
    assert 0 < pipeline.step_s < 60
    assert 0 < tensor.step_s < 60
    assert "ConfigError" in refused.failed
    assert done == [1, 1, 1]


# -- what the run comes to, and check ----------------------------------------------------------------------------------


def test_the_cap_on_exposures_is_that_of_a_window() -> None:
    config = job(*XL, "selection=opus", "selection.guards.exposure_window=100", "train.steps=1000").config
    enough, short = 512 * 100, 512 * 100 - 1
    assert WholeRun.of(config, VOCAB, enough).warnings(config) == []
    (warning,) = WholeRun.of(config, VOCAB, short).warnings(config)
    assert f"a pool of {enough:,} sequences or more" in warning
    config.selection.guards.exposure_cap = 2
    assert WholeRun.of(config, VOCAB, short).warnings(config) == []
    assert WholeRun.of(config, VOCAB, enough).rows(config)["epochs of the pool"].startswith("10.00 trained on")


def test_check_says_whether_a_run_fits(tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["check", "model=tiny", "engine=cpu", "selection=uniform", f"data.path={tiny_corpus}", "--memory"]

    def said(size: str) -> str:
        assert main([*given, size]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if "verdict" in line).split("│")[2].strip()

    assert said("8GB") == "fits"
    assert said("400MiB") == "no"
    peak = 10 * 2**30
    assert [verdict(peak, int(factor * peak)) for factor in (2, 1.05, 0.99)] == ["fits", "tight", "no"]


def test_sizes_are_read() -> None:
    assert (parse_memory("80GB"), parse_memory("1.5GiB")) == (80 * 10**9, 3 * 2**29)
    for text in ("80", "GB", "-1GB", "0GB", "80 apples"):
        with pytest.raises(ValueError, match="not a size of memory"):
            parse_memory(text)


def test_a_layout_names_the_mesh_that_it_makes() -> None:
    layout = Layout(tp=2, pp=2, micro_batch_size=4, recompute=True)
    assert layout.told(16) == f"dp{MeshShape(16, 2, 2).dp} tp2 pp2 mb4 recompute"
    config = layout.put(RunConfig())
    assert Layout.of(config) == layout
    assert RunConfig().parallel.tp == 1
