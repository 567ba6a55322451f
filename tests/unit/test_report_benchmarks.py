"""Benchmarks on the report's page: what is shown of evaluations, and that nobody wins within the noise."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaopus.errors import DataError
from megaopus.report import drawing
from megaopus.report.arms import find_arms
from megaopus.report.benchmarks import section
from megaopus.report.compare import load_run
from megaopus.report.page import _Page, find_baseline, write_report
from tests.unit.evaluations import ItemRows, add_history, write_evaluation
from tests.unit.report_runs import TOKENS, write_run

BOOKS = {"corpus": "c", "split": "validation", "domain": "books", "sequences": 64, "tokens": 8192}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that were never evaluated."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "uniform", "uniform", steps=101, seed=1)
    write_run(root / "opus", "opus", steps=101, seed=2)
    return root


@pytest.fixture
def root(bare: Path, tmp_path: Path) -> Path:
    shutil.copytree(bare, tmp_path / "runs")
    return tmp_path / "runs"


def page(root: Path, *names: str) -> str:
    """The part of the page that is about benchmarks, its pictures left out."""
    runs = {name: load_run(root / name) for name in names or ("uniform", "opus")}
    return section(runs, find_arms(runs), find_baseline(runs), html.escape, lambda histories, keys: "")


def told(text: str) -> list[list[str]]:
    """The cells of every row, without marks."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]


def tasks(seed: int, share: float = 0.5, bits: float = 2.0, items: int = 200) -> dict[str, ItemRows]:
    """Items that are as hard for every run: a run of a larger ``share`` has the same right, and more."""
    found: dict[str, ItemRows] = {}
    for name in ("arc", "piqa"):
        hard = np.random.default_rng([*name.encode()]).random(items)
        near = np.random.default_rng(seed).normal(0, 0.02, items)
        found[name] = [
            {"text": f"{name} <{n}>", "acc": float(at + off < share), "bits_per_byte": bits + off}
            for n, (at, off) in enumerate(zip(hard.tolist(), near.tolist(), strict=True))
        ]
    return found


def train(run: Path, shares: list[float]) -> None:
    for at, share in enumerate(shares):
        add_history(run, 101 + at, tasks(100 + at, share), tokens=(101 + at) * TOKENS)


QUIET, LOUD = [0.50, 0.51, 0.5, 0.49, 0.5], [0.3, 0.5, 0.4, 0.6, 0.5]


def test_runs_without_evaluations_have_no_section(root: Path) -> None:
    assert page(root) == ""


@pytest.mark.parametrize(
    ("histories", "share", "lead", "verdict"),
    [
        ((QUIET, QUIET), 0.75, r"opus is better than uniform \(average of 2 tasks, acc: \+0\.\d+ ±", "better"),
        ((QUIET, QUIET), 0.25, "opus is worse than uniform", "worse"),
        (
            (LOUD, LOUD),
            0.75,
            r"no difference can be told from noise .* not against what training",
            "not told from noise",
        ),
        ((QUIET, QUIET), 0.51, r"no difference can be told from noise \([^)]*\)\. Of 6", "not told from noise"),
        ((QUIET, []), 0.75, "what another seed would change is not known", "training noise not known"),
    ],
    ids=["better", "worse", "within training", "within items", "unknown"],
)
def test_differences_are_told_only_beyond_noise(
    root: Path, histories: tuple[list[float], list[float]], share: float, lead: str, verdict: str
) -> None:
    for name, seed, here, history in zip(("uniform", "opus"), (1, 2), (0.5, share), histories, strict=True):
        write_evaluation(root / name, tasks(seed, here))
        train(root / name, history)
    text = page(root)
    assert re.search(lead, text)
    rows = [row for row in told(text) if row[:2] == ["average of 2 tasks", "acc"]]
    assert [row[-1].endswith(verdict) for row in rows] == [True]
    if verdict in ("not told from noise", "training noise not known"):
        assert not re.search("opus is (better|worse)|uniform is (better|worse)", text)
        assert "0 can be told to be better, 0 to be worse" in text


def test_scores_name_protocol_items_and_errors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_evaluation(root / "uniform", tasks(1))
    train(root / "opus", QUIET)
    monkeypatch.setattr(drawing, "DPI", 20)
    monkeypatch.setattr(_Page, "_figures", lambda self: "")  # those of the rest take a second
    runs = {name: load_run(root / name) for name in ("uniform", "opus")}
    text = write_report(runs, root / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    rows = {tuple(row[:2]): row for row in told(text) if len(row) == 6}
    assert rows["task", "metric"][4:] == ["uniformstep 100", "opusstep 105, in training"]
    arc = rows["arc", "acc"]
    assert arc[2:4] == ["200", "0"]
    values = [each["acc"] for each in tasks(1)["arc"]]
    error = np.std(values, ddof=1) / np.sqrt(200)
    assert arc[4] == f"{np.mean(values):.4f} ± {error:.4f}"
    assert ("arc", "bits_per_byte") in rows
    assert "Protocol lm-eval. ±: standard error of the sampling of items" in text
    assert "opus is not compared with uniform: uniform has no evaluation during training" in text
    assert text.count("bars: one standard error") == 4  # two pictures, each with its alternative text
    spread = [row for row in told(text) if row[:3] == ["opus", "arc", "acc"]]
    assert spread[0][3] == "5"


def test_other_prompts_and_protocols_are_said_and_not_compared(root: Path) -> None:
    write_evaluation(root / "uniform", tasks(1))
    write_evaluation(root / "opus", tasks(2, 0.9), protocol="opus")
    text = page(root)
    assert "by protocol lm-eval," in text
    assert "evaluate both by one" in text
    assert "(protocol opus)" in text
    assert not [row for row in told(text) if "better" in row]
    write_evaluation(root / "opus", tasks(2, 0.9), prompts="f" * 16)
    text = page(root)
    assert "have other prompts" in text
    assert "(other prompts)" in text
    assert not [row for row in told(text) if "better" in row]


def test_perplexity_of_domains(root: Path) -> None:
    for name, nats in (("uniform", 3.25), ("opus", 3.125)):
        loss: dict[str, Any] = BOOKS | {"nats_per_token": nats, "bits_per_byte": nats / 3, "stderr": 0.02}
        write_evaluation(root / name, {}, perplexity=[loss])
    text = page(root)
    assert ["c", "validation", "books", "3.2500 ± 0.0200", "1.0833", "3.1250 ± 0.0200", "1.0417"] in told(text)
    assert "Benchmarks" not in text


def test_contamination_by_task(root: Path) -> None:
    tasks = [
        {"task": "arc", "items": 10, "too_short": 2, "pool": 4, "proxy": None, "picks": 1},
        {"task": "<b>", "items": 3, "too_short": 3, "pool": 0, "proxy": 0, "picks": 0},
    ]
    content = {"format": 1, "ngram": 13, "shortest": 8, "notes": ["no <proxy> is read"], "tasks": tasks}
    (root / "opus/contamination.json").write_text(json.dumps(content))
    text = page(root)
    assert ["opus", "arc", "10", "2", "4 (50.0%)", "not known", "1 (12.5%)"] in told(text)
    assert ["opus", "&lt;b&gt;", "3", "3", "0", "0", "0"] in told(text)
    assert "share 13 words in a row" in text
    assert "opus: no &lt;proxy&gt; is read" in text
    (root / "opus/contamination.json").write_text("[]")
    with pytest.raises(DataError, match=r"contamination\.json: not of the form"):
        page(root)


def test_arms_of_several_seeds_are_compared_over_seeds(root: Path) -> None:
    for seed in (3, 4):
        for name in ("uniform", "opus"):
            shutil.copytree(root / name, root / f"{name}_seed{seed}")
            config = root / f"{name}_seed{seed}/config.yaml"
            config.write_text(re.sub(r"seed: \d", f"seed: {seed}", config.read_text()))
    names = [f"{name}{end}" for name in ("uniform", "opus") for end in ("", "_seed3", "_seed4")]
    for at, name in enumerate(names):
        write_evaluation(root / name, tasks(at, 0.5 + 0.01 * at + 0.2 * name.startswith("opus")))
    text = page(root, *names)
    assert "opus is better than uniform (average of 2 tasks" in text
    assert "the spread between seeds" in text
    write_evaluation(root / names[-1], tasks(9, 0.1))  # a seed that failed: nothing is told any more
    assert "Between opus and uniform no difference can be told from noise" in page(root, *names)
