"""resume=auto, never, required and PATH: what each does, and what each refuses before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megaopus.checkpoint.checkpointer import COMPLETE, resolve
from megaopus.errors import CheckpointError
from megaopus.report.compare import load_run
from tests.exact.resume_runs import SELECTIONS, assert_same, choices, everything, rows, settings, snapshot, train
from tests.faults import Interrupted, at_step, interrupt, reseal

LONGER = ["resume_allow=[train.steps]"]


def fake_run(run_dir: Path, *steps: int) -> Path:
    """A run folder with complete checkpoints, as far as their names and marks go."""
    for step in steps:
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / COMPLETE).touch()
    run_dir.mkdir(exist_ok=True)
    return run_dir


def test_auto_starts_anew_or_goes_on_from_the_newest(tmp_path: Path) -> None:
    assert resolve("auto", tmp_path / "new") == []
    run = fake_run(tmp_path / "run", 10, 20, 5)
    assert names(resolve("auto", run)) == ["step_00000020", "step_00000010", "step_00000005"]
    (run / "checkpoints" / "step_00000020" / COMPLETE).unlink()
    assert names(resolve("auto", run)) == ["step_00000010", "step_00000005"]


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_required_refuses_without_a_checkpoint(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", 10)
    assert resolve("required", run) == [run / "checkpoints" / "step_00000010"]
    with pytest.raises(CheckpointError, match=r"resume=required, but .*new/checkpoints has no complete checkpoint"):
        resolve("required", tmp_path / "new")


@pytest.mark.parametrize("left", ["checkpoint", "metrics"])
def test_never_refuses_a_used_folder(left: str, tmp_path: Path) -> None:
    assert resolve("never", tmp_path / "new") == []
    run = fake_run(tmp_path / "run", *([10] if left == "checkpoint" else []))
    if left == "metrics":
        (run / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match="already holds a run, and resume=never would write over it"):
        resolve("never", run)


def test_a_path_is_where_a_new_run_begins(tmp_path: Path) -> None:
    other = fake_run(tmp_path / "other", 10, 20)
    tenth = other / "checkpoints" / "step_00000010"
    assert resolve(str(tenth), tmp_path / "new") == [tenth]
    assert names(resolve(str(other), tmp_path / "new")) == ["step_00000020", "step_00000010"]
    own = fake_run(tmp_path / "own", 12)
    assert resolve(str(other), own) == [own / "checkpoints" / "step_00000012"]


@pytest.mark.parametrize("content", ["nothing", "incomplete"])
def test_a_path_without_a_checkpoint(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    (folder / "checkpoints" / "step_00000010" if content == "incomplete" else folder).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a run folder with one"):
        resolve(str(folder), tmp_path / "new")


# -- through the whole train path ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm_up(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates with checkpoints after two and four."""
    run_dir = tmp_path_factory.mktemp("warm_up")
    assert train(settings(tiny_corpus, run_dir, "train.steps=4", "checkpoint.every=2")) == 0
    return run_dir


def test_a_new_run_starts_from_another_run(warm_up: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    before = snapshot(warm_up)
    run = tmp_path / "arm"
    chosen = ["train.steps=6", "checkpoint.every=0", f"resume={warm_up}"]
    assert train(settings(tiny_corpus, run, *chosen, *SELECTIONS["directional"])) == 0
    assert [row["step"] for row in rows(run / "selection.jsonl")] == [4, 5]
    assert [row["method"] for row in rows(run / "selection.jsonl")] == ["opus", "opus"]
    assert snapshot(warm_up) == before
    # Its own checkpoint wins from now on.
    assert train(settings(tiny_corpus, run, *chosen, "train.steps=7", *LONGER, *SELECTIONS["directional"])) == 0
    assert [row["step"] for row in rows(run / "selection.jsonl")] == [4, 5, 6]
    straight = settings(tiny_corpus, tmp_path / "straight", "train.steps=7", "selection=uniform")
    assert train(straight) == 0
    together = {**choices(warm_up), **choices(run)}
    expected = choices(tmp_path / "straight")
    assert together.keys() == expected.keys()
    for step, candidates in expected.items():
        assert [row["id"] for row in together[step]] == [row["id"] for row in candidates]


def test_rows_of_a_launch_without_checkpoints_are_not_mixed_in(
    warm_up: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "arm"
    run.mkdir()
    shutil.copy(warm_up / "metrics.jsonl", run)
    assert train(settings(tiny_corpus, run, "train.steps=5", f"resume={warm_up}")) == 0
    assert [row["step"] for row in rows(run / "metrics.jsonl") if row["kind"] == "step"] == [4]


def test_the_record_of_a_run_without_checkpoints_is_kept(
    warm_up: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(warm_up, run)
    shutil.rmtree(run / "checkpoints")
    record = [path for path in sorted(run.rglob("*")) if path.is_file() and "checkpoints" not in path.parts]
    before = {str(path.relative_to(run)): path.read_bytes() for path in record if path.name != "lock"}
    assert {"metrics.jsonl", "selection.jsonl", "config.yaml", "launches/000/config.yaml"} <= before.keys()
    assert train(settings(tiny_corpus, run, "train.steps=2", "resume_allow=[train.steps]")) == 0
    (aside,) = (run / "old_records").iterdir()
    assert f"{run} has no checkpoint of its own: the record that lay there is now in {aside}" in capsys.readouterr().out
    kept = {str(path.relative_to(aside)): path.read_bytes() for path in sorted(aside.rglob("*")) if path.is_file()}
    assert kept == before
    assert [row.step for row in load_run(aside).steps] == [0, 1, 2, 3]
    assert [row.step for row in load_run(run).steps] == [0, 1]
    shutil.rmtree(run / "checkpoints")  # once more, perhaps in the same second
    assert train(settings(tiny_corpus, run, "train.steps=1")) == 0
    assert len(list((run / "old_records").iterdir())) == 2


REFUSED = {
    "seq_len": ["data.seq_len=8"],
    "seed": ["seed=5"],
    "model.hidden_size": ["model.hidden_size=16"],
    "model.num_layers": ["model.num_layers=1"],
    "precision": ["engine.precision=bf16"],
    "optimizer": ["optim=muon"],
    "global_batch_size": ["train.global_batch_size=8", "selection.rho=1.0"],
    "num_candidates": ["selection.rho=0.25"],
}


@pytest.mark.parametrize("how", ["own", "path"])
@pytest.mark.parametrize("key", REFUSED)
def test_a_checkpoint_of_another_run_is_refused(
    key: str, how: str, warm_up: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    run_dir, more = (warm_up, []) if how == "own" else (tmp_path / "new", [f"resume={warm_up}"])
    before = snapshot(warm_up)
    with pytest.raises(CheckpointError, match="belongs to another run; these differ") as caught:
        train(settings(tiny_corpus, run_dir, "train.steps=6", *REFUSED[key], *more))
    differing = re.findall(r"^  (\S+): saved .*, now ", str(caught.value), re.MULTILINE)
    assert differing == [key]
    assert "nothing was written" in str(caught.value)
    assert snapshot(warm_up) == before
    assert not (tmp_path / "new").exists()


def test_every_difference_is_named(warm_up: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(warm_up, run)
    path = run / "checkpoints" / "step_00000004" / "state.json"
    state = json.loads(path.read_text())
    state["identity"]["corpus"] = "another corpus"
    path.write_text(json.dumps(state))
    reseal(path.parent)
    with pytest.raises(CheckpointError) as caught:
        train(settings(tiny_corpus, run, "seed=5", "optim=sgd"))
    lines = [line.strip().split(":")[0] for line in str(caught.value).splitlines() if "saved" in line]
    assert lines == ["corpus", "seed", "optimizer"]
    assert "seed: saved 1234, now 5" in str(caught.value)


SIX = ["train.steps=6", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def straight(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    run = tmp_path_factory.mktemp("straight")
    assert train(settings(tiny_corpus, run, *SIX)) == 0
    return everything(run)


@pytest.fixture(scope="module")
def killed(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, ended before its last update, with checkpoints after two and four."""
    run = tmp_path_factory.mktemp("killed")
    with at_step(5, interrupt), pytest.raises(Interrupted):
        train(settings(tiny_corpus, run, *SIX))
    return run


DAMAGE = {
    "a bit of a shard": ("weights/__0_0.distcp", "damaged, its sha256 is not the one written"),
    "a truncated shard": ("weights/__0_0.distcp", "bytes, .* were written"),
    "a missing shard": ("weights/__0_0.distcp", "No such file"),
    "a shard that is a link": ("weights/__0_0.distcp", "a link or device, not a file"),
    "the index": ("weights/.metadata", "damaged"),
    "common.pt": ("weights/common.pt", "bytes, .* were written"),
    "state.json": ("state.json", "bytes, .* were written"),
    "the manifest": ("manifest.json", "damaged, its sha256 is not the one in COMPLETE"),
    "no manifest": ("manifest.json", "missing"),
    "the mark": ("manifest.json", "damaged, its sha256 is not the one in COMPLETE"),
}


def damage(checkpoint: Path, how: str) -> None:
    path = checkpoint / DAMAGE[how][0]
    if how == "the mark":
        (checkpoint / COMPLETE).write_text("")
    elif how in ("a bit of a shard", "the index", "the manifest"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how in ("a truncated shard", "common.pt", "state.json"):
        path.write_bytes(path.read_bytes()[:100])
    elif how == "a shard that is a link":
        path.rename(checkpoint.with_name("elsewhere"))
        path.symlink_to(checkpoint.with_name("elsewhere"))
    else:
        path.unlink()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    how: str, killed: Path, straight: dict, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    newest = run / "checkpoints" / "step_00000004"
    damage(newest, how)
    left = snapshot(newest)
    assert train(settings(tiny_corpus, run, *SIX)) == 0
    name, reason = DAMAGE[how]
    said = capsys.readouterr().out
    assert re.search(f"WARNING checkpoint passed over for an older one: {newest / name}: .*{reason}", said), said
    assert "step_00000002 after 2 steps" in said
    aside = run / "checkpoints" / "damaged_00000004"
    assert list(snapshot(aside).values()) == list(left.values())  # nothing of it is deleted
    assert_same(everything(run), straight)


def test_without_a_good_checkpoint_nothing_is_started(killed: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    for step, how in ((2, "a missing shard"), (4, "a bit of a shard")):
        damage(run / "checkpoints" / f"step_{step:08d}", how)
    before = snapshot(run)
    for resume in ("auto", "required"):
        with pytest.raises(CheckpointError, match=r"is whole:\n.*step_00000004/weights.*\n.*step_00000002/weights"):
            train(settings(tiny_corpus, run, *SIX, f"resume={resume}"))
        assert snapshot(run) == before
    one = f"resume={run / 'checkpoints' / 'step_00000004'}"
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged"):
        train(settings(tiny_corpus, tmp_path / "new", one))
    assert not (tmp_path / "new").exists()


def test_a_run_folder_that_cannot_be_written(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, text: str, encoding: str) -> None:
        raise OSError(30, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refused)
        with pytest.raises(CheckpointError, match=r"run folder cannot be written .*Read-only.* set another run_dir"):
            train(settings(tiny_corpus, tmp_path / "run", "train.steps=1"))
    assert train(settings(tiny_corpus, tmp_path / "run", "train.steps=1")) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "launches").iterdir()) == ["000"]
