"""Run folders of version 0.1, stopped mid-way: they go on as they would have, and their record can be read.

``predict``: the default recipe, a predictor that picks; ``zero``: DeepSpeed's ZeRO-1, draws and a redundancy term,
killed two updates after its checkpoint; ``cascade``: a predictor that screens, stopped within a buffer that serves two
steps; ``uniform``: uniform batches of a filtered pool, two updates skipped. Everything is done from the folder above,
by the commands of version 0.1.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest

from megaopus.checkpoint.checkpointer import complete_checkpoints
from megaopus.models import gpt
from megaopus.record.parquet import read_step
from tests.compat.v01 import EXPECTED, FIXTURE, MOVED, TOLD_OF_MOVED, command, copied, jsonl, megaopus

REL = 1e-6
"""Of losses: processors differ in the last bits."""
RUNS = list(EXPECTED)


@pytest.fixture(autouse=True)
def _deepspeed_for_zero(request: pytest.FixtureRequest) -> None:
    if "zero" in request.node.name:
        pytest.importorskip("deepspeed", reason="deepspeed is an optional extra (megaopus[deepspeed])")


@dataclass
class Resumed:
    """A run that went on to its end."""

    folder: Path
    """The run's."""
    said: str
    beside: set[str]
    """Files beside the corpus when it began."""


def go_on(place: Path, run: str, *arguments: str, padding_counts: bool = True) -> Resumed:
    """Copy a run into ``place`` and give it ``arguments``, its own command if there are none.

    ``padding_counts``: the 64 columns by which version 0.1 padded its 320 logits count in the softmax again, so that
    all else is held to the last bits; without, the run goes on as it does for its user.
    """
    copied(place, run)
    beside = files_beside(place)
    as_before = mock.patch.object(gpt, "mask_padding") if padding_counts else contextlib.nullcontext()
    with as_before, contextlib.redirect_stdout(io.StringIO()) as said:
        assert megaopus(place, *(arguments or command(run))) == 0, said.getvalue()
    return Resumed(place / "runs" / run, said.getvalue(), beside)


def files_beside(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if "runs" not in path.relative_to(place).parts}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run -> how it went on by the command of its launch.sh; each once."""
    known: dict[str, Resumed] = {}

    def of(run: str) -> Resumed:
        if run not in known:
            known[run] = go_on(tmp_path_factory.mktemp("v01") / run, run)
        return known[run]

    return of


def assert_as_expected(run: str, folder: Path) -> None:
    """The steps after the stop are the straight run's: losses, validations, skips, picks and their reasons."""
    expected = EXPECTED[run]
    metrics = jsonl(folder / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in metrics if row["kind"] == "step"}
    assert list(losses) == list(range(expected["steps"]))
    for step, loss in expected["losses"].items():
        assert losses[int(step)] == pytest.approx(float.fromhex(loss), rel=REL), step
    validations = {row["step"]: row for row in metrics if row["kind"] == "validation"}
    for step, domains in expected["validation"].items():
        row = validations[int(step)]
        for name, loss in domains.items():
            found = row["domains"][name] if name else row["loss"]
            assert found == pytest.approx(float.fromhex(loss), rel=REL), (step, name)
    assert [row["step"] for row in metrics if row.get("skipped")] == expected["skipped"]
    assert picks(folder) == expected["picked"]
    for step, columns in expected["candidates"].items():
        table = read_step(folder / "choices", int(step))
        for name, values in columns.items():
            assert_close(table[NOW.get(name, name)].to_pylist(), values)
    selections = {str(row["step"]): row for row in jsonl(folder / "selection.jsonl")}
    for step, correlation in expected["correlation"].items():
        assert selections[step][NOW.get("correlation", "correlation")] == pytest.approx(correlation, abs=0.02)
    events = {str(row["step"]) for row in jsonl(folder / "selection.jsonl") if row["events"]}
    assert events == set(expected["events"])


NOW: dict[str, str] = {"standing": "prescreen_score"}
"""Column or field of version 0.1 -> what later code calls it, where that is another name."""


def assert_close(found: list[Any], expected: list[Any]) -> None:
    """Numbers to a hundredth of the largest: utilities are differences of losses. Whole numbers and nulls: equal."""
    values = [float.fromhex(value) if isinstance(value, str) else value for value in expected]
    assert [value is None for value in found] == [value is None for value in values]
    there = [value for value in values if value is not None]
    whole = all(isinstance(value, int) for value in there)
    room = 0 if whole else 0.01 * max(map(abs, there))
    assert [value for value in found if value is not None] == pytest.approx(there, rel=0, abs=room)


def picks(folder: Path) -> dict[str, list[int]]:
    """Step -> ids trained on, part by part: later parts may have other columns than the first."""
    found: dict[str, list[int]] = {}
    for part in sorted((folder / "choices").glob("part-*.parquet")):
        for row in pq.read_table(part, columns=["step", "id", "picked"]).to_pylist():
            if row["picked"]:
                found.setdefault(str(row["step"]), []).append(row["id"])
    return found


@pytest.mark.parametrize("run", RUNS)
def test_the_command_of_launch_sh_goes_on(run: str, resumed: Any) -> None:
    after, done = resumed(run), EXPECTED[run]["done"]
    assert f"after {done} steps" in after.said
    changed = f"settings changed since that checkpoint: {TOLD_OF_MOVED}"  # nothing that was renamed counts as changed
    assert {line for line in after.said.splitlines() if "settings changed" in line} <= {changed}
    stays = "selection.gram_sketch stays per_layer, as this run began before there was a choice"
    assert (stays in after.said) == (run == "zero")
    assert_as_expected(run, after.folder)
    assert complete_checkpoints(after.folder)[-1].name == "step_00000010"


@pytest.mark.parametrize("run", RUNS)
def test_what_was_recorded_stays(run: str, resumed: Any) -> None:
    after, before, done = resumed(run), FIXTURE / "runs" / run, EXPECTED[run]["done"]
    for name in ("metrics.jsonl", "selection.jsonl"):
        old, new = jsonl(before / name), jsonl(after.folder / name)
        kept = [row for row in old if row["step"] < done or (row.get("kind") == "validation" and row["step"] == done)]
        assert new[: len(kept)] == kept
    assert (after.folder / "launches" / "000" / "config.yaml").read_bytes() == (before / "config.yaml").read_bytes()


@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_worked_out_anew(run: str, resumed: Any) -> None:
    """The traits of the sequences are found where they lie, and no other folder appears beside the corpus."""
    after = resumed(run)
    assert files_beside(after.folder.parents[1]) == after.beside


@pytest.mark.parametrize("run", [run for run in RUNS if run != "uniform"])
def test_the_micro_batch_found_before_is_kept(run: str, resumed: Any) -> None:
    """As docs/selection.md says: the last bits of utilities depend on it."""
    assert "scoring micro-batch" not in resumed(run).said


@pytest.mark.parametrize("run", RUNS)
def test_a_config_of_ones_own_goes_on(run: str, tmp_path: Path) -> None:
    """The run's config.yaml as the run.yaml of a folder of configs; as users go on: without the padding's probability.

    Of a model this young it is nearly its share of the columns, so that is what the losses on record lose.
    """
    mine = tmp_path / "configs"
    mine.mkdir()
    shutil.copy(FIXTURE / "runs" / run / "config.yaml", mine / "run.yaml")
    after = go_on(tmp_path / "place", run, "train", "--config-dir", str(mine), padding_counts=False)
    assert "settings changed" not in after.said
    expected, share = EXPECTED[run], math.log(384 / 320)
    losses = {row["step"]: row["loss"] for row in jsonl(after.folder / "metrics.jsonl") if row["kind"] == "step"}
    fallen = [float.fromhex(loss) - losses[int(step)] for step, loss in expected["losses"].items()]
    assert fallen == pytest.approx([0.95 * share] * len(fallen), abs=0.05 * share)
    assert picks(after.folder) == expected["picked"]


@pytest.mark.parametrize("run", RUNS)
def test_check_takes_the_same_settings(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, (_, *overrides) = copied(tmp_path), command(run)
    assert megaopus(place, "check", *overrides) == 0
    assert f"run_dir=runs/{run}" in capsys.readouterr().out


@pytest.mark.parametrize("run", RUNS)
def test_report_writes_a_page(run: str, tmp_path: Path, resumed: Any) -> None:
    """Of the run as it stopped, and beside itself gone on; events of old have their place on it."""
    place = copied(tmp_path, run)
    page = tmp_path / "page.html"
    assert megaopus(place, "report", f"runs/{run}", str(resumed(run).folder), "--out", str(page)) == 0
    text = page.read_text(encoding="utf-8")
    events = [event for row in jsonl(place / "runs" / run / "selection.jsonl") for event in row["events"]]
    for event in [*events, *(["update skipped"] if EXPECTED[run]["skipped"] else [])]:
        assert event.split(":")[0].split("'")[0] in text


LEAST = {"predict": 6, "zero": 8, "cascade": 5, "uniform": 6}
"""Steps on record when it stopped."""


@pytest.mark.parametrize("run", RUNS)
def test_picks_are_made_again(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every step on record, with the corpus and without; events of old say what happened to them."""
    place = copied(tmp_path, run)
    assert megaopus(place, "report", f"runs/{run}", "--replay", "all") == 0
    assert capsys.readouterr().out.strip() == f"{LEAST[run]} identical, 0 DIFFERENT, 0 not on record"
    (place / "corpus").rename(place / "elsewhere")
    away = int(run == "zero")  # an alarm on token pairs, which are in the corpus alone
    assert megaopus(place, "report", f"runs/{run}", "--replay", "all") == (3 if away else 0)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"{LEAST[run] - away} identical, 0 DIFFERENT, {away} not on record"


@pytest.mark.parametrize("run", RUNS)
def test_picks_are_made_again_over_both_launches(run: str, resumed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resumed(run).folder
    away = int(run == "cascade")  # step 5 is served by a buffer that the launch before scored
    assert megaopus(folder.parents[1], "report", f"runs/{run}", "--replay", "all") == (3 if away else 0)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"{10 - away} identical, 0 DIFFERENT, {away} not on record"


CHANGED = {
    "predict": ["data.wanted=[rivers,code]", "selection.prescreen.prior=0.5", "selection.guards.exposure_cap=2"],
    "cascade": ["selection.guards.domain_floor=0.25", "optim.matrix_lr=0.005", "selection.prescreen.refit=8"],
    "uniform": ["data.wanted=[rivers]", "train.spike_factor=0", "data.weights=[[0,{noise:1}]]"],
}


@pytest.mark.parametrize("run", CHANGED)
def test_a_change_is_allowed_by_its_old_name(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, changed = copied(tmp_path, run), CHANGED[run]
    names = [text.split("=")[0] for text in changed]
    before = {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()}
    assert megaopus(place, *command(run), *changed, f"resume_allow=[{','.join(names[1:])}]") == 2
    assert "resume_allow" in capsys.readouterr().err
    for path, content in before.items():
        assert path.name == "lock" or path.read_bytes() == content  # nothing was written
    assert megaopus(place, *command(run), *changed, f"resume_allow=[{','.join(names)}]") == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "settings changed" in line]
    assert said.count(" -> ") == len(changed) + len(MOVED)
