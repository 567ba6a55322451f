"""An installed wheel does what a checkout does: it brings configs and launch files, and its verbs run from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megaopus import __version__
from megaopus.corpus_tools.demo_corpus import build_demo_corpus
from megaopus.distributed.launcher import without_launcher

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "megaopus", "configs", "launch")
LIMITS = {"docs": 300_000, "code": 120_000, "readmes": 80_000, "noise": 120_000}
STEPS = 5


def python(*arguments: str | Path, place: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in ``cwd`` with what is installed in ``place``, and nothing of the checkout."""
    inherited = without_launcher(os.environ)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of these sources in it."""
    folder = tmp_path_factory.mktemp("install")
    (folder / "sources").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "sources" / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / "sources")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", folder / "place"]
    python("-m", "pip", "install", folder / "sources", *options, place=folder, cwd=folder)
    shutil.rmtree(folder / "sources")
    return folder / "place"


def files(folder: Path, kinds: tuple[str, ...] = ("",)) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in found if path.name.endswith(kinds)}


def test_the_wheel_has_every_module_config_and_launch_file(place: Path) -> None:
    installed = place / "megaopus"
    assert (place / f"megaopus-{__version__}.dist-info").is_dir()
    for name in ("configs", "launch"):
        assert files(installed / name) == files(ROOT / name)
    modules = {name for name in files(installed) if not name.startswith(("configs/", "launch/"))}
    assert modules == files(ROOT / "megaopus", (".py", "py.typed"))
    assert os.access(installed / "launch" / "torchrun.sh", os.X_OK)


def test_a_demo_from_the_wheel(place: Path, tmp_path: Path) -> None:
    code = "import megaopus; from megaopus.config.compose import default_config_dir as d; print(megaopus.__file__, d())"
    where = python("-c", code, place=place, cwd=tmp_path).stdout.split()
    assert where == [str(place / "megaopus" / "__init__.py"), str(place / "megaopus" / "configs")]
    build_demo_corpus(tmp_path / "demo" / "corpus", vocab_size=512, limits=LIMITS)
    script = place / "bin" / "megaopus"
    said = python(script, "demo", "--steps", str(STEPS), "--out", "demo", place=place, cwd=tmp_path).stdout
    assert "final target loss (docs)" in said
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["steps"] == STEPS
    run = tmp_path / "demo" / "opus_seed1234"
    assert len((run / "selection.jsonl").read_text().splitlines()) == STEPS
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["packages"]["megaopus"], environment["git"]) == (__version__, None)
    assert "python -m megaopus train experiment=demo" in (run / "launch.sh").read_text()
    said = python(script, "check", "experiment=demo", "data.path=demo/corpus", place=place, cwd=tmp_path).stdout
    assert "Start it with:" in said


def test_a_corpus_by_a_shipped_config(place: Path, tmp_path: Path) -> None:
    rows = [{"text": f"Page {number} of many", "id": f"p{number}", "score": number, "url": "u"} for number in range(99)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", "fineweb_edu", "--source", "web=pages.jsonl", "--vocab-size", "300", "--out", "corpus"]
    python("-m", "megaopus", "prepare", *options, place=place, cwd=tmp_path)
    row = json.loads((tmp_path / "corpus" / "documents.jsonl").read_text().splitlines()[4])
    assert row["columns"]["score"] == 4  # configs/data/fineweb_edu.yaml keeps it


def test_launch_files_of_the_wheel_start_its_modules(place: Path, tmp_path: Path) -> None:
    arguments = ["--gpus-per-node", "1", "--time", "10", "--dry-run", "--unchecked", "--", "run_dir=runs/first"]
    script = python("-m", "megaopus.launch.submit", *arguments, place=place, cwd=tmp_path).stdout
    assert script.startswith("#!")
    assert "run_dir=runs/first" in script
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "DRY_RUN": "1"}
    starter = place / "megaopus" / "launch" / "torchrun.sh"
    done = subprocess.run([starter, "2", "seed=1"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-6:] == ["--nproc-per-node", "2", "-m", "megaopus", "train", "seed=1"]


def test_an_installed_copy_is_no_checkout(place: Path, tmp_path: Path) -> None:
    """The commit of a repository that merely has the installed package in it says nothing of the package."""
    shutil.copytree(place, tmp_path / "site")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    code = "from megaopus.run_folder import _git_revision; print(_git_revision())"
    assert python("-c", code, place=tmp_path / "site", cwd=tmp_path).stdout == "None\n"
