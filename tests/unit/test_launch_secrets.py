"""Tokens in the environment of a run are nowhere in its folder, nor in what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exact.resume_runs import settings, train

SECRETS = {
    "WANDB_API_KEY": "3f" * 20,
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "HUGGING_FACE_HUB_TOKEN": "hf_ZyXwVuTsRqPoNmLkJiHgFeDcBa",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIxK7MDENGxbPxRfiCYEXAMPLEKEY",
}


@pytest.mark.slow
def test_tokens_are_neither_said_nor_written(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert train(settings(tiny_corpus, tmp_path / "run", "train.steps=2", "logging.wandb=offline")) == 0
    said = "".join(capfd.readouterr())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"environment.json", "launch.sh", "config.yaml", "state.json"} <= names
    assert any(name.endswith(".wandb") for name in names), "Weights & Biases wrote too"
    for name, value in SECRETS.items():
        assert value not in said, name
        assert [path for path in files if value.encode() in path.read_bytes()] == [], name
