"""``python -m megaopus settings`` and the page that it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaopus.__main__ import main
from megaopus.config.run_config import SETTINGS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["settings", *arguments]) == 0
    return capsys.readouterr().out


def test_the_page_is_up_to_date() -> None:
    """In a process of its own: tests register things too."""
    command = [sys.executable, "-m", "megaopus", "settings", "--markdown"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == PAGE.read_text(), "python -m megaopus settings --markdown > docs/settings.md"
    assert max(map(len, PAGE.read_text().splitlines())) < 120


def test_every_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys)
    for key in SETTINGS:
        assert f"\n  {key} = " in text
        assert f"**`{key}`**" in PAGE.read_text()
    assert "optim.settings of muon: What optim.name=muon alone has." in text


def test_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys, "selection")
    assert "selection=NAME picks one of: domain_oracle, dsir" in text
    assert "selection.guards.min_ess = 1.2\n      number >= 0; may change on resume if resume_allow names it\n" in text
    assert "optim.lr" not in text
    assert "selection.rho" not in listed(capsys, "selection.guards")
    for name in ("optim", "optim.settings", "clamp"):
        assert "optim.settings.clamp = 0.01" in listed(capsys, name)


def test_a_setting_by_its_key_or_its_last_part(capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys, "optim.schedule")
    assert text == listed(capsys, "schedule")
    assert "optim.schedule = cosine\n      one of constant, cosine, wsd; " in text
    assert "optim.lr" not in text
    assert listed(capsys, "momentum_start").count("optim.settings.") == 1
    assert "selection.method = uniform" in listed(capsys, "method")


def test_an_old_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "data.wanted"]) == 0
    told = capsys.readouterr()
    assert told.err == "note: data.wanted is now data.target_domains\n"
    assert "data.target_domains = []\n" in told.out


@pytest.mark.parametrize(
    ("name", "near"), [("optm", "optim?"), ("selection.guard", "selection.guards?"), ("sedd", "seed?")]
)
def test_an_unknown_name(name: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", name]) == 2
    assert f"did you mean {near}" in capsys.readouterr().err
    assert main(["settings", "zork"]) == 2
    assert "sections: run, model, model.rope_scaling, model.router, init, data, data.filter" in capsys.readouterr().err


def test_choices_of_a_users_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text("hidden_size: 256\n")
    assert ", wide" in listed(capsys, "model", "--config-dir", str(tmp_path))
    assert "small_opus" in listed(capsys, "experiment")


def test_torch_is_imported_for_what_is_registered_alone() -> None:
    """Names of optimizers, methods, estimators and samplers are those that their files register."""
    names = sorted({key.split(".")[0] for key in SETTINGS if "." in key} - {"optim", "selection"})
    code = (
        "import sys, megaopus.__main__ as m\n"
        f"for name in {[*names, 'run', 'experiment', 'selection.guards', 'steps', 'optim.lr']}:\n"
        "    assert m.main(['settings', name]) == 0\n"
        "sys.exit(', '.join({'torch', 'hydra', 'omegaconf', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_a_reader_who_has_seen_enough_gets_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "megaopus", "settings", "train"], check=False, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.stderr == b""


@pytest.mark.parametrize("verb", ["train", "check"])
def test_help_points_to_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "'python -m megaopus settings' lists them all" in " ".join(capsys.readouterr().out.split())
