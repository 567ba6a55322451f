"""Every verb that makes something ends in a line that says how long it took, where it lies and what comes next."""

from types import SimpleNamespace

import pytest

from megaopus.cli import main as cli
from megaopus.cli.main import verb_module, verb_parser, verbs

MADE = {
    "prepare": (["--source", "text=a.jsonl", "--out", "my corpus"], "python -m megaopus check data.path='my corpus'"),
    "proxy": (
        ["--corpus", "c", "--items", "i.jsonl", "--tokens", "9", "--out", "o"],
        "python -m megaopus train data.path=o",
    ),
    "score": (["--corpus", "c", "--method", "dsir"], "train data.path=c data.filter.column=dsir data.filter.keep=0.3"),
    "features": (["data.path=c"], "python -m megaopus train data.path=c"),
    "report": (["runs/a"], "open the page in a browser"),
    "import": (["model"], "train model=hf model.hf=model init.path=model data.path=CORPUS"),
    "eval": (["model", "--out", "e.json"], "eval another model with --against e.json"),
    "export": (["runs/a", "--out", "m"], "AutoModelForCausalLM.from_pretrained('m')"),
}
OWN = {"train", "demo", "check", "plan", "settings"}
"""Those that end in a line of their own (tests of theirs hold it), and a list."""


def test_every_verb_has_a_last_line() -> None:
    assert {name for name in verbs() if hasattr(verb_module(name), "closing")} == set(MADE)
    assert set(verbs()) == set(MADE) | OWN


@pytest.mark.parametrize("name", MADE)
def test_the_last_line(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, following = MADE[name]
    parser, verb = verb_parser(name), SimpleNamespace(run=lambda args: 0, closing=verb_module(name).closing)
    monkeypatch.setattr(cli, "verb_module", lambda _: verb)
    monkeypatch.setattr(cli, "verb_parser", lambda _: parser)
    assert cli.main([name, *arguments]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("done in 0s | ")
    assert following in line


def test_what_fails_has_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = verb_parser("report")
    monkeypatch.setattr(cli, "verb_module", lambda _: SimpleNamespace(run=lambda args: 1, closing=lambda args: "x"))
    monkeypatch.setattr(cli, "verb_parser", lambda _: parser)
    assert cli.main(["report", "runs/a"]) == 1
    assert capsys.readouterr().out == ""
