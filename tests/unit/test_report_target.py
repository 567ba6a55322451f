"""The report says which target its losses are of, and compares runs on one target alone."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megaopus.data.target import Target
from megaopus.report.arms import find_arms
from megaopus.report.compare import compare, load_run
from megaopus.report.drawing import inks
from megaopus.report.figures import domain_figure
from megaopus.report.page import _Page
from megaopus.report.target import target_of
from tests.unit.report_runs import write_run
from tests.unit.test_report_page import cells, report


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(_Page, "_figures", lambda page: "")


HELD_OUT = Target(told="held-out slice of 120 items and 80 documents of corpus c/arc", key="held out abc", named=True)
OTHER = replace(HELD_OUT, told="held-out slice of 7 items of corpus c/csqa", key="held out def")
TARGETS = {
    # how runs name a target: what the report calls it
    "nothing": ({}, "none named, the mean over all domains"),
    "domains": ({"domains": "docs"}, "domains docs"),
    "held out": ({"held_out": HELD_OUT}, HELD_OUT.told),
    "held out, domains named too": ({"held_out": HELD_OUT, "domains": "docs"}, HELD_OUT.told),
}


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("case", TARGETS)
def test_report_says_which_target_it_speaks_of(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss on it comes first, the mean over all domains beside it; verdict and ratios are on it."""
    given, told = TARGETS[case]
    short = {"steps": 160, **given}
    runs = [write_run(tmp_path / name, name, pace=pace, **short) for name, pace in (("uniform", 1.0), ("opus", 2.5))]
    page = report(*runs, "--out", tmp_path / "page.html")
    assert capsys.readouterr().out.startswith(f"target: {told}\n")
    uniform, opus = (load_run(run) for run in runs)
    found = compare(uniform, opus, 100)
    records = opus.validations[-3:]
    final = sum(record.loss for record in records) / 3
    mean = sum(sum(record.domains.values()) / 4 for record in records) / 3
    assert found.final_loss == pytest.approx(final)
    opening = re.findall("<p>(.*?)</p>", page)[0]
    named = case != "nothing"
    loss = "target loss" if named else "loss"
    assert opening.startswith(f"Final {loss}: uniform {found.uniform_final_loss:.4f}, opus {final:.4f}; ")
    assert opening.endswith(f"target: {told}.")
    assert ("mean over all domains: uniform" in opening) == named
    assert f"opus reaches uniform&#x27;s final {loss} of {found.uniform_final_loss:.3f} after" in page
    rows = cells(page)
    header, row = rows[3], next(row for row in rows[4:] if row[0] == "opus")
    assert header[:3] == (
        ["run", "final target loss", "mean over all domains"] if named else ["run", "final loss", "tokens"]
    )
    assert row[1 : 2 + named] == [f"{final:.4f}", f"{mean:.4f}"][: 1 + named]
    assert row[-2] == f"{found.tokens_ratio:.2f}"
    panels = [
        axis.get_title("left") for axis in domain_figure({"opus": opus}, inks(find_arms({"opus": opus}), None), 0).axes
    ]
    assert panels[4:] == (["target: items", "target: nearest"] if "held out" in case else [])
    parts = {row[0]: row[1:3] for row in rows if row[0].startswith("target: ")}
    held = {"target: items": -0.25, "target: nearest": 0.25} if "held out" in case else {}
    assert parts == {
        part: [f"{each + shift:.3f}" for each in (found.uniform_final_loss, final)] for part, shift in held.items()
    }


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("case", ["two slices", "a slice and none", "changed on the way"])
def test_runs_of_different_targets_are_compared_by_the_mean_over_all_domains(case: str, tmp_path: Path) -> None:
    first = {"two slices": {"held_out": OTHER}, "a slice and none": {"domains": "docs"}}.get(
        case, {"held_out": HELD_OUT}
    )
    runs = [
        write_run(tmp_path / "uniform", "uniform", steps=160, **first),
        write_run(tmp_path / "opus", "opus", steps=160, pace=2.5, held_out=HELD_OUT),
    ]
    if case == "changed on the way":
        path = runs[1] / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "target": {}} if row["kind"] == "validation" and row["step"] < 130 else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(*runs, "--out", tmp_path / "page.html")
    assert "target: none in common, the mean over all domains." in page
    loaded = [load_run(run) for run in runs]
    means = [sum(sum(record.domains.values()) / 4 for record in run.validations[-3:]) / 3 for run in loaded]
    assert f"Final loss: uniform {means[0]:.4f}, opus {means[1]:.4f}; target:" in page
    why = {"changed on the way": "The target of opus was changed on the way: losses on this page are means"}
    both = f"The runs have different targets (uniform: {target_of(loaded[0]).told}; opus: {HELD_OUT.told}): losses on"
    assert why.get(case, both) in page
