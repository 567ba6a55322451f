"""A package from outside the tree registers an optimizer, its operator, an estimator, an engine and a data source.

All are used, on every rank.

What a run folder names is imported for nobody who only reads it.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaopus.__main__ import main
from megaopus.config.compose import compose
from megaopus.config.parse import load
from megaopus.corpus_tools.readers.registry import READERS
from megaopus.engine.registry import ENGINES
from megaopus.errors import ConfigError
from megaopus.optim.registry import OPTIMIZERS
from megaopus.selection import build_operator
from megaopus.selection.estimators.registry import ESTIMATORS
from megaopus.selection.methods.registry import METHODS
from megaopus.selection.operators import registry as operators
from tests.exact.resume_runs import choices, rows, settings, train
from tests.pool import Pool
from tests.unit.config_corpus import write_manifest

PLUGIN = '''
"""Registers one thing of each kind."""

import csv
import torch
from megaopus.corpus_tools.readers.registry import Reader, Row, register_reader
from megaopus.engine.registry import ENGINES, register_engine
from megaopus.optim.registry import register_optimizer
from megaopus.optim.spec import Spec
from megaopus.selection import register_estimator, register_operator
from megaopus.selection.operators.maps import Diagonal
from megaopus.settings import Setting


class Heavyball(torch.optim.Optimizer):
    """W <- W - lr M, M <- beta M + G."""

    def __init__(self, groups, lr, beta):
        super().__init__(groups, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["ball"] = torch.zeros_like(p)
                    p.sub_(state["ball"].mul_(group["beta"]).add_(p.grad), alpha=group["lr"])


def heavyball(group, state, parameter):
    return Diagonal(torch.tensor(group["lr"])) if "ball" in state else None


@register_estimator("of_one_matrix", flops=(1.0, "forward and backward per candidate"), micro_batches=False)
class OfOneMatrix:
    """The alignment of the first matrix alone, from gradients of one candidate at a time."""

    def __init__(self, config):
        pass

    def uses(self, backend, gradient):
        return [next(name for name, weight in backend.parameters().items() if weight.ndim == 2)]

    def estimate(self, request):
        (name,) = self.uses(request.backend, request.proxy_gradient)
        gradients = request.backend.exact_gradients(request.candidates.batch(request.length))
        updates = [request.operator.apply({name: each[name]})[name].flatten() for each in gradients]
        return torch.stack(updates) @ request.proxy_gradient[name].double().flatten(), None


def rows(stored):
    lines = (line.decode() for line in stored.lines())
    for number, row in enumerate(csv.DictReader(lines), 1):
        yield Row(number, f"{stored.path} row {number}", row)


register_optimizer("heavyball", Spec(
    make=lambda groups, config, own, tp_group: Heavyball(groups, config.lr, own["beta"]),
    shaped=("ball",),
    settings={"beta": Setting(default=0.5, min=0, below=1, doc="Share of the past.")},
    elementwise=True,
))
register_operator("Heavyball", heavyball)
register_reader("csv", Reader(endings=(".table",), rows=rows))
register_engine("twin", ENGINES["megatron"])
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules are found in; what they register is forgotten after the test."""
    for registry in (OPTIMIZERS, READERS, ENGINES):
        monkeypatch.setattr(registry, "_entries", dict(registry))
    monkeypatch.setattr(operators, "_REGISTERED", {})
    monkeypatch.setattr(ESTIMATORS, "_entries", {entry.name: entry for entry in ESTIMATORS})
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("outside_"):
            del sys.modules[name]


@pytest.fixture
def plugin(place: Path) -> str:
    (place / "outside_plugin.py").write_text(PLUGIN)
    return "outside_plugin"


def run_of(corpus: Path, run_dir: Path, plugin: str) -> list[str]:
    return settings(
        corpus,
        run_dir,
        f"plugins=[{plugin}]",
        "optim.name=heavyball",
        "optim.lr=0.05",
        "optim.settings.beta=0.25",
        "selection=opus_exact",
        "selection.estimator=of_one_matrix",
        "selection.warmup_steps=1",
        "train.steps=3",
    )


def test_a_run_trains_and_selects_with_them_and_its_folder_is_read_without(
    tiny_corpus: Path, place: Path, plugin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "run"
    overrides = run_of(tiny_corpus, run, plugin)
    assert main(["check", *overrides, "engine.name=twin"]) == 0
    assert "fp32 ball" in capsys.readouterr().out
    assert main(["train", *overrides]) == 0
    rows = [json.loads(line) for line in (run / "selection.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["uniform", "opus", "opus"]
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] != losses[1]
    capsys.readouterr()

    del sys.modules[plugin]
    for registry, name in ((OPTIMIZERS, "heavyball"), (ENGINES, "twin"), (READERS, "csv")):
        entries = {known: entry for known, entry in registry.items() if known != name}
        monkeypatch.setattr(registry, "_entries", entries)
    ESTIMATORS.remove("of_one_matrix")
    (place / f"{plugin}.py").write_text("raise SystemExit('imported for a reader')")
    config = load(run / "config.yaml")
    assert (config.plugins, config.optim.name, config.optim.settings) == ([plugin], "heavyball", {"beta": 0.25})
    assert main(["report", str(run), "--replay", "all"]) == 0
    assert f"note: {run} names the plugin {plugin}, which is not imported here" in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(place / "page.html")]) == 0
    assert f"note: {run} names the plugin {plugin}" in capsys.readouterr().out
    score = ["score", "--corpus", str(tiny_corpus), "--method", "perplexity", "--checkpoint", str(run)]
    assert main(score) == 2
    said = capsys.readouterr().err
    assert "no optimizer 'heavyball' here" in said
    assert f"names the plugin {plugin}" in said
    assert plugin not in sys.modules


def train_on_a_rank(place: Path, overrides: list[str]) -> int:
    sys.path.insert(0, str(place))
    return train(overrides)


def test_every_rank_has_them(tiny_corpus: Path, place: Path, plugin: str, pool: Pool) -> None:
    """Two ranks and one record the same picks by the plugin's estimator, trained by its optimizer."""
    assert train(run_of(tiny_corpus, place / "one", plugin)) == 0
    assert pool.run(2, train_on_a_rank, place, run_of(tiny_corpus, place / "two", plugin)) == [0, 0]
    assert [row["method"] for row in rows(place / "two" / "selection.jsonl")] == ["uniform", "opus", "opus"]
    assert picks(place / "two") == picks(place / "one")


def picks(run_dir: Path) -> dict[int, list[int]]:
    """The candidates picked in each step."""
    return {step: [row["id"] for row in found if row["picked"]] for step, found in choices(run_dir).items()}


def test_a_corpus_is_prepared_from_a_source_of_theirs(
    place: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "docs.table").write_text("id,text\n" + "".join(f"{n},Row {n} says {'x' * n}.\n" for n in range(60)))
    prepare = ["prepare", "--source", str(place / "docs.table"), "--out", str(place / "corpus"), "--vocab-size", "300"]
    assert main(prepare) == 2
    assert "unknown ending" in capsys.readouterr().err
    assert main([*prepare, "--plugin", plugin]) == 0
    manifest = json.loads((place / "corpus" / "manifest.json").read_text())
    assert manifest["sources"][0]["documents"] == 60
    (place / "items.table").write_text("text\nRow 5 says\n")
    proxy = ["proxy", "--corpus", str(place / "corpus"), "--items", str(place / "items.table"), "--item-fields", "text"]
    some = ["--tokens", "100", "--min-tokens", "0"]
    assert main([*proxy, *some, "--out", str(place / "nearer"), "--plugin", plugin]) == 0


def test_the_module_of_the_page_works(place: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    (place / "outside_page.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    corpus = write_manifest(place / "manifest")
    config = compose([f"data.path={corpus}", "plugins=[outside_page]", "optim.name=rmsprop", "optim.lr=0.5"]).optim
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = config.spec().make([{"params": [weight]}], config, config.own_settings(), None)
    assert build_operator({"w": weight}, [optimizer]) is None
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert set(optimizer.state[weight]) == {"step", *config.spec().shaped}
    factor = build_operator({"w": weight}, [optimizer]).diagonal("w")
    torch.testing.assert_close(factor, torch.full((2, 3), 5.0))  # 0.5 / sqrt(0.01)


def test_settings_of_their_optimizers_are_validated(place: Path, plugin: str) -> None:
    corpus = write_manifest(place / "manifest")
    with pytest.raises(ConfigError, match=r"optim\.settings\.beta = 1: must lie in \[0, 1\)"):
        compose([f"data.path={corpus}", f"plugins=[{plugin}]", "optim.name=heavyball", "optim.settings.beta=1"])


def test_target_domains_that_their_methods_need_are_asked_for(place: Path) -> None:
    (place / "outside_method.py").write_text(
        "from megaopus.selection import register_method\n"
        "@register_method('theirs', flops=(0.0, 'labels alone'), needs={'wanted': 'is told what is good'})\n"
        "def theirs(step): ..."
    )
    corpus = write_manifest(place / "manifest")
    with pytest.raises(ConfigError, match=r"selection\.method = 'theirs': is told what is good\n +-> name them: data"):
        compose([f"data.path={corpus}", "plugins=[outside_method]", "selection.method=theirs"])
    METHODS.remove("theirs")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, r"1 problem .*\n.*plugins = 'outside_other': cannot be imported \(ModuleNotFoundError"),
        ("1 / 0", r"1 problem .*\n.*plugins = 'outside_other': cannot be imported \(ZeroDivisionError"),
        (
            "from megaopus.optim.registry import OPTIMIZERS, register_optimizer\nfrom dataclasses import replace\n"
            "register_optimizer('adamw', replace(OPTIMIZERS['sgd']))",
            r"1 problem .*\n.*plugins = 'adamw': two modules register this optimizer",
        ),
    ],
    ids=["missing", "broken", "name taken"],
)
def test_what_cannot_be_imported_is_one_problem(place: Path, source: str | None, said: str) -> None:
    if source is not None:
        (place / "outside_other.py").write_text(source)
    corpus = write_manifest(place / "manifest")
    theirs = [f"{key}=theirs" for key in ("optim.name", "engine.name", "selection.method", "selection.sampler")]
    with pytest.raises(ConfigError, match=said):
        compose([f"data.path={corpus}", "plugins=[outside_other]", *theirs])


def test_installed_entry_points_are_plugins(place: Path, plugin: str) -> None:
    installed = place / "outside-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[megaopus.plugins]\nours = {plugin}\n")
    config = compose([f"data.path={write_manifest(place / 'manifest')}", "optim.name=heavyball"])
    assert config.plugins == [plugin]
