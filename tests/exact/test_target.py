"""A run on a corpus with a held-out target tells the loss on it first, as an evaluation apart finds it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaopus.data.corpus import Corpus
from megaopus.report.compare import load_run
from megaopus.report.target import target_of
from megaopus.training.trainer import Trainer
from tests.exact.resume_runs import SELECTIONS, assert_same, everything, rows, settings, train
from tests.harness import TokenCandidates

SEQ_LEN, EACH = 16, 4  # of ``settings``


def sequences_of(folder: Path) -> dict[str, torch.Tensor]:
    """Evenly spaced sequences of each part of a target, read and cut by hand: (EACH, SEQ_LEN + 1)."""
    documents = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    tokens = np.fromfile(folder / "tokens.bin", json.loads((folder / "manifest.json").read_text())["token_dtype"])
    streams: dict[str, list[int]] = {}
    for row, end in zip(documents, np.cumsum([row["length"] for row in documents]).tolist(), strict=True):
        streams.setdefault(row["domain"], []).extend(tokens[end - row["length"] : end].tolist())
    cut = {
        part: torch.tensor([ids[at : at + SEQ_LEN + 1] for at in range(0, len(ids) - SEQ_LEN, SEQ_LEN)])
        for part, ids in streams.items()
    }
    assert all(len(every) > 2 * EACH for every in cut.values())
    return {part: every[[len(every) * (2 * n + 1) // (2 * EACH) for n in range(EACH)]] for part, every in cut.items()}


@pytest.fixture
def apart(target_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Mean token loss of each part of the target at each validation, of tokens that no class of ours has read."""
    found: list[dict[str, float]] = []
    parts, validate = sequences_of(target_corpus / "target"), Trainer._validate

    def validated(trainer: Trainer, recorder: Any) -> Any:
        losses = {
            part: trainer.engine.evaluate(TokenCandidates(tokens, torch.arange(len(tokens)))).mean()
            for part, tokens in parts.items()
        }
        found.append({part: float(loss) for part, loss in losses.items()})
        return validate(trainer, recorder)

    monkeypatch.setattr(Trainer, "_validate", validated)
    return found


def test_the_loss_on_the_target_is_the_first_number(
    target_corpus: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    apart: list[dict[str, float]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing of the training depends on it; resumed: ``test_resume.py``."""
    corpus, more = target_corpus, [*SELECTIONS["directional"], "train.steps=4", "train.eval_every=2"]
    more.append(f"data.proxy_path={corpus}")
    assert train(settings(tiny_corpus, tmp_path / "straight", *more)) == 0
    said = capsys.readouterr().out
    straight = everything(tmp_path / "straight")
    validations = [row for row in straight["metrics"] if row["kind"] == "validation"]
    assert [row["target"] for row in validations] == [pytest.approx(losses, rel=1e-6) for losses in apart]
    assert len({row["loss"] for row in validations}) == len(validations) == 3
    told = []
    for row in validations:
        assert row["loss"] == pytest.approx((row["target"]["items"] + row["target"]["nearest"]) / 2, rel=1e-12)
        assert row["mean_loss"] == pytest.approx(sum(row["domains"].values()) / 3, rel=1e-12)
        parts = ", ".join(f"{part} {loss:.3f}" for part, loss in row["target"].items())
        told.append(f"target loss {row['loss']:.4f} ({parts}) | mean over all domains {row['mean_loss']:.4f} | code ")
    assert all(
        line.split(" tokens | ")[1].startswith(text) for line, text in zip(lines(said, "validation"), told, strict=True)
    )
    (last,) = lines(said, "done: ")
    ends = validations[-1]
    assert f" | last target loss {ends['loss']:.4f} | mean over all domains {ends['mean_loss']:.4f} | saved in" in last
    counts = Corpus.open(corpus / "target").manifest["counts"]
    items, documents = (counts[part]["target"]["documents"] for part in ("items", "nearest"))
    target = f"held-out slice of {items} items and {documents} documents of corpus {corpus}"
    assert f" | target: {target}" in said
    assert target_of(load_run(tmp_path / "straight")).told == target

    monkeypatch.undo()
    plain = without_target(corpus, tmp_path / "plain")
    others = [text.replace(str(corpus), str(plain)) for text in more]
    assert train(settings(tiny_corpus, tmp_path / "without", *others)) == 0
    without = everything(tmp_path / "without")
    assert [row["target"] for row in rows(tmp_path / "without" / "metrics.jsonl") if row["kind"] == "validation"] == [
        {"docs": row["domains"]["docs"]} for row in validations
    ]
    assert_same({**without, "metrics": []}, {**straight, "metrics": []})


def lines(said: str, start: str) -> list[str]:
    return re.findall(rf"^{start}.*$", said, re.MULTILINE)


def without_target(corpus: Path, out: Path) -> Path:
    """Copy a corpus as it would be had nothing been written of what was held out."""
    shutil.copytree(corpus, out)
    shutil.rmtree(out / "target")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["target"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out
